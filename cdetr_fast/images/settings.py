"""Settings of the image processor: declared, checked, and stored in preprocessor_config.json."""

import copy
import json
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, overload

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode

from cdetr_fast.common.files import (
    ADDED_BY_CALLERS,
    DOWNLOAD_OPTIONS,
    make_folder,
    read_json,
    resolve_file,
    write_text,
)
from cdetr_fast.common.host_classes import inherit_from_hosts
from cdetr_fast.common.hub import upload
from cdetr_fast.common.validation import (
    Before,
    Bounds,
    Checked,
    Expected,
    field_types,
    unknown_keyword,
)

# transformers and torchvision name the filters differently; NEAREST_EXACT is PIL's NEAREST.
INTERPOLATION = {
    Image.Resampling.NEAREST: InterpolationMode.NEAREST_EXACT,
    Image.Resampling.BOX: InterpolationMode.BOX,
    Image.Resampling.BILINEAR: InterpolationMode.BILINEAR,
    Image.Resampling.HAMMING: InterpolationMode.HAMMING,
    Image.Resampling.BICUBIC: InterpolationMode.BICUBIC,
    Image.Resampling.LANCZOS: InterpolationMode.LANCZOS,
}
PREPROCESSOR_NAME = "preprocessor_config.json"
PROCESSOR_NAME = "processor_config.json"  # of a whole processor, with this one inside
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_DEFAULT_SIZE = {"shortest_edge": 800, "longest_edge": 1333}
_SIZE_FORMS = (
    {"shortest_edge", "longest_edge"},
    {"shortest_edge"},
    {"longest_edge"},
    {"height", "width"},
    {"max_height", "max_width"},
)
_DEPRECATED = {
    "max_size": "size={'shortest_edge', 'longest_edge'}",
    "pad_and_return_pixel_mask": "do_pad",
}
# Keys of preprocessor_config.json files that have no effect on this processor.
_IGNORED_KEYS = {
    "image_processor_type",
    "feature_extractor_type",
    "processor_class",
    "auto_map",
    "use_fast",
    "_valid_processor_keys",
    "do_center_crop",
    "crop_size",
    "default_to_square",
    "image_seq_length",
}


def as_size(value: Any) -> dict[str, int]:
    """Return a size in its dictionary form.

    Args:
        value: A dictionary in one of the forms of `resized_hw`; (height, width); or the shortest
            edge.

    Raises:
        ValueError: `value` has none of these forms.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        value = {"shortest_edge": value, "longest_edge": _DEFAULT_SIZE["longest_edge"]}
    elif isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    elif not isinstance(value, Mapping):
        # transformers' SizeDict is not a Mapping: iterating it gives (name, value) pairs.
        try:
            value = dict(value)
        except (TypeError, ValueError):
            raise ValueError(
                f"expected a dict, (height, width) or an integer, got {value!r}"
            ) from None
    size = {key: edge for key, edge in value.items() if edge is not None}
    if set(size) not in _SIZE_FORMS:
        forms = " or ".join(str(sorted(form)) for form in _SIZE_FORMS)
        raise ValueError(f"expected keys {forms}, got {size!r}")
    for edge in size.values():
        if isinstance(edge, bool) or not isinstance(edge, int) or edge < 1:
            raise ValueError(f"expected positive integers, got {size!r}")
    return size


def _as_pad_size(value: Any) -> dict[str, int] | None:
    """Return the size of a padded batch as {"height", "width"}; an integer is both."""
    if value is None:
        return None
    size = as_size((value, value) if isinstance(value, int) else value)
    if set(size) != {"height", "width"}:
        raise ValueError(f"expected keys ['height', 'width'], got {size!r}")
    return size


def _as_resampling(value: Any) -> Image.Resampling:
    for resampling, interpolation in INTERPOLATION.items():
        if value == interpolation or (isinstance(value, int) and value == resampling):
            return resampling
    if value == InterpolationMode.NEAREST:
        return Image.Resampling.NEAREST
    raise ValueError


def _as_channel_values(value: Any) -> float | tuple[float, ...]:
    if isinstance(value, int | float):
        return float(value)
    if not isinstance(value, Sequence) or not all(isinstance(v, int | float) for v in value):
        raise ValueError
    return tuple(value)


def _as_device(value: Any) -> torch.device | None:
    try:
        return None if value is None else torch.device(value)
    except (RuntimeError, TypeError):
        raise ValueError from None


def _as_name(value: Any) -> Any:
    """Return the text of an enumeration of names (transformers has them); others as they are."""
    return getattr(value, "value", value)


_ChannelValues = Annotated[
    float | tuple[float, ...],
    Before(_as_channel_values),
    Expected("a number or one per channel"),
]
_ChannelOrder = Annotated[Literal["channels_first", "channels_last"] | None, Before(_as_name)]


class StoredSettings(Checked):
    """Settings as attributes, checked when they are set, and stored as preprocessor_config.json.

    None means the default, as in transformers, so null in a file does too. A derived class sets
    another default as a class attribute.
    """

    format: Annotated[Literal["coco_detection", "coco_panoptic"], Before(_as_name)] = (
        "coco_detection"
    )
    do_resize: bool = True
    size: Annotated[dict[str, int], Before(as_size)] = _DEFAULT_SIZE
    resample: Annotated[
        Image.Resampling,
        Before(_as_resampling),
        Expected("a PIL.Image.Resampling or its number"),
    ] = Image.Resampling.BILINEAR
    do_rescale: bool = True
    rescale_factor: Annotated[float | int, Bounds(1e-12)] = 1 / 255
    do_normalize: bool = True
    image_mean: _ChannelValues = IMAGENET_MEAN
    image_std: _ChannelValues = IMAGENET_STD
    do_convert_annotations: bool | None = None
    do_pad: bool = True
    pad_size: Annotated[dict[str, int] | None, Before(_as_pad_size)] = None
    do_convert_rgb: bool | None = None
    data_format: _ChannelOrder = None
    input_data_format: _ChannelOrder = None
    device: Annotated[torch.device | None, Before(_as_device), Expected("a torch device")] = None
    return_tensors: Annotated[Literal["pt", "np"] | None, Before(_as_name)] = None
    disable_grouping: bool | None = None
    compat: Literal["paper", "transformers"] = "paper"

    def __init__(self, **settings: Any) -> None:
        inherit_from_hosts()
        for name in setting_names():
            setattr(self, name, None)  # the default
        self._set(without_deprecated(settings), type(self).__name__)
        if self.do_convert_annotations is None:
            self.do_convert_annotations = self.do_normalize

    def __setattr__(self, name: str, value: Any) -> None:
        if value is None and name in field_types(StoredSettings):
            value = getattr(type(self), name)
        super().__setattr__(name, value)

    def _set(self, settings: Mapping[str, Any], owner: str) -> None:
        """Set several settings; TypeError, which names `owner`, for an unknown one."""
        for name, value in settings.items():
            if name not in setting_names():
                raise unknown_keyword(owner, name, setting_names())
            setattr(self, name, value)

    def with_overrides(self, overrides: Mapping[str, Any], owner: str) -> Self:
        """Return a copy with some settings changed.

        Args:
            overrides: Settings by name; None means the default.
            owner: Name of the caller, for the error about an unknown setting.
        """
        changed = copy.copy(self)
        changed._set(overrides, owner)
        return changed

    @overload
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        return_unused_kwargs: Literal[False] = ...,
        **kwargs: Any,
    ) -> Self: ...

    @overload
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        return_unused_kwargs: bool,
        **kwargs: Any,
    ) -> Any: ...

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Read a processor from a folder, a JSON file, or the hub.

        Args:
            pretrained_model_name_or_path: Folder, JSON file, or id of a model on the hub.
            return_unused_kwargs: Whether to return (processor, unknown keyword arguments).
            **kwargs: `revision`, `subfolder`, `cache_dir`, `token`, `local_files_only`,
                `force_download`; and arguments of the class, which override the file. `use_fast` is
                accepted and has no effect: there is one implementation.

        Raises:
            OSError: The file does not exist or is not a JSON object.
            TypeError: An argument is unknown (without `return_unused_kwargs`).
        """
        in_pipeline = kwargs.get("_from_pipeline") is not None
        for name in ("use_fast", *ADDED_BY_CALLERS):
            kwargs.pop(name, None)
        download = {name: kwargs.pop(name) for name in DOWNLOAD_OPTIONS if name in kwargs}
        settings = _read_settings(pretrained_model_name_or_path, download)
        known = {*setting_names(), *_DEPRECATED}
        unused = {name: kwargs.pop(name) for name in list(kwargs) if name not in known}
        # transformers' pipelines hand arguments of the model to the processor too.
        if unused and not (return_unused_kwargs or in_pipeline):
            raise unknown_keyword("from_pretrained", next(iter(unused)), sorted(known))
        processor = cls.from_dict(settings, **kwargs)
        return (processor, unused) if return_unused_kwargs else processor

    @classmethod
    def from_dict(cls, image_processor_dict: Mapping[str, Any], **overrides: Any) -> Self:
        """Make a processor from the content of a preprocessor_config.json of transformers 4 or 5.

        Unknown keys are named in a warning and left out.
        """
        content = {k: v for k, v in image_processor_dict.items() if k not in _IGNORED_KEYS}
        content = without_deprecated(content, warn=False)
        unknown = sorted(content.keys() - set(setting_names()))
        if unknown:
            warnings.warn(f"{cls.__name__}: unknown settings are left out: {unknown}", stacklevel=2)
        known = {name: content[name] for name in content if name not in unknown}
        return cls(**(known | without_deprecated(overrides)))

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike[str]) -> Self:
        """Read a processor from a preprocessor_config.json file."""
        return cls.from_dict(read_json(Path(json_file)))

    def to_dict(self) -> dict[str, Any]:
        """Return the settings that are not None, in the form that JSON and transformers take.

        `compat` is included only if it is not the default.
        """
        content = {name: getattr(self, name) for name in setting_names()}
        content["resample"] = int(content["resample"])
        if content["device"] is not None:
            content["device"] = str(content["device"])
        if content["compat"] == "paper":
            del content["compat"]
        content = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in content.items()
            if value is not None
        }
        # The same for every class: transformers finds its own class by it.
        return content | {"image_processor_type": "ConditionalDetrImageProcessor"}

    def to_json_string(self) -> str:
        """Return `to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write `to_json_string` to a file; an interrupted write leaves the old file."""
        write_text(Path(json_file_path), self.to_json_string())

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        push_to_hub: bool = False,
        **push_options: Any,
    ) -> list[str]:
        """Write preprocessor_config.json into a folder (created if necessary); return its path.

        Args:
            save_directory: The folder.
            push_to_hub: Upload it too.
            **push_options: As in `push_to_hub`; `repo_id` is the folder's name unless given.

        Raises:
            TypeError: Options for an upload without push_to_hub=True.
        """
        if push_options and not push_to_hub:
            raise TypeError(f"save_pretrained: unknown keyword {next(iter(push_options))!r}")
        folder = make_folder(save_directory)
        self.to_json_file(folder / PREPROCESSOR_NAME)
        if push_to_hub:
            push_options.setdefault("repo_id", folder.resolve().name)
            upload(folder, [PREPROCESSOR_NAME], what="image processor", **push_options)
        return [str(folder / PREPROCESSOR_NAME)]

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload preprocessor_config.json to a repository on the hub; return the commit's URL.

        Args:
            repo_id: Name of the repository, created if necessary.
            **options: As in `cdetr_fast.common.hub.upload`.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            commit = upload(
                Path(folder), [PREPROCESSOR_NAME], repo_id, what="image processor", **options
            )
        return str(commit.commit_url)

    @classmethod
    def get_image_processor_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read the settings of a processor as they are in the file.

        Args:
            pretrained_model_name_or_path: As in `from_pretrained`.
            **kwargs: Download options of `from_pretrained`; all others are returned.

        Returns:
            The settings, and the unused keyword arguments.
        """
        download = {name: kwargs.pop(name) for name in DOWNLOAD_OPTIONS if name in kwargs}
        return dict(_read_settings(pretrained_model_name_or_path, download)), kwargs

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"


def has_settings(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder has the file of an image processor."""
    return any(Path(folder, name).is_file() for name in (PREPROCESSOR_NAME, PROCESSOR_NAME))


def setting_names() -> list[str]:
    """Return the names of all settings."""
    return list(field_types(StoredSettings))


def without_deprecated(given: Mapping[str, Any], warn: bool = True) -> dict[str, Any]:
    """Replace `max_size` and `pad_and_return_pixel_mask` by the settings that superseded them."""
    given = dict(given)
    for name, replacement in _DEPRECATED.items():
        if warn and given.get(name) is not None:
            warnings.warn(f"{name} is deprecated: use {replacement}", FutureWarning, stacklevel=3)
    max_size = given.pop("max_size", None)
    if max_size is not None:
        size = given.get("size")
        if size is None or isinstance(size, int):
            size = {"shortest_edge": _DEFAULT_SIZE["shortest_edge"] if size is None else size}
        if isinstance(size, Mapping) and {k for k, v in size.items() if v} == {"shortest_edge"}:
            size = {**size, "longest_edge": max_size}
        given["size"] = size
    do_pad = given.pop("pad_and_return_pixel_mask", None)
    if do_pad is not None and given.get("do_pad") is None:
        given["do_pad"] = do_pad
    return given


def _read_settings(
    name_or_path: str | os.PathLike[str], download: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Return the content of the file that describes the image processor of a model."""
    if os.path.isfile(name_or_path):
        return read_json(Path(name_or_path))
    # As in transformers, a processor_config.json with an image processor takes precedence.
    try:
        content = read_json(resolve_file(name_or_path, PROCESSOR_NAME, **download))
        if "image_processor" in content:
            return content["image_processor"]
    except FileNotFoundError:
        pass  # the usual case; only the other file is required
    return read_json(resolve_file(name_or_path, PREPROCESSOR_NAME, **download))
