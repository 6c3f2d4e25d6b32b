"""The settings of the image processor: defaults, checks, and preprocessor_config.json."""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode

from cdetr_fast.common import validation as check
from cdetr_fast.common.files import (
    DOWNLOAD_OPTIONS,
    make_folder,
    read_json,
    resolve_file,
    write_atomically,
)
from cdetr_fast.images import targets as annotations
from cdetr_fast.images.sizes import check_pad_size, check_size

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


def _check_resample(name: str, value: Any) -> Image.Resampling:
    for resampling, interpolation in INTERPOLATION.items():
        if value == interpolation or (isinstance(value, int) and value == resampling):
            return resampling
    if value == InterpolationMode.NEAREST:
        return Image.Resampling.NEAREST
    check.refuse(name, "a PIL.Image.Resampling or its number", value)


def _check_channel_values(name: str, value: Any) -> float | tuple[float, ...]:
    if isinstance(value, int | float):
        return float(value)
    if not isinstance(value, Sequence) or not all(isinstance(v, int | float) for v in value):
        check.refuse(name, "a number or one per channel", value)
    return tuple(value)


def _check_device(name: str, value: Any) -> torch.device:
    try:
        return torch.device(value)
    except (RuntimeError, TypeError):
        check.refuse(name, "a torch device", value)


# Every setting: its default, and the check that also brings it into its stored form. None means the
# default, as in transformers, so that null in a file does too.
SETTINGS = {
    "format": ("coco_detection", check.choice(*annotations.FORMATS)),
    "do_resize": (True, check.flag),
    "size": ({"shortest_edge": 800, "longest_edge": 1333}, check_size),
    "resample": (Image.Resampling.BILINEAR, _check_resample),
    "do_rescale": (True, check.flag),
    "rescale_factor": (1 / 255, check.number(1e-12)),
    "do_normalize": (True, check.flag),
    "image_mean": (IMAGENET_MEAN, _check_channel_values),
    "image_std": (IMAGENET_STD, _check_channel_values),
    "do_convert_annotations": (None, check.flag),
    "do_pad": (True, check.flag),
    "pad_size": (None, check_pad_size),
    "do_convert_rgb": (None, check.flag),
    "data_format": (None, check.choice("channels_first", "channels_last")),
    "input_data_format": (None, check.choice("channels_first", "channels_last")),
    "device": (None, _check_device),
    "return_tensors": (None, check.choice("pt", "np")),
    "disable_grouping": (None, check.flag),
    "compat": ("paper", check.choice("paper", "transformers")),
}

# Keys of preprocessor_config.json files that say nothing about how this processor works.
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


class StoredSettings:
    """Holds the settings as attributes; reads and writes them as preprocessor_config.json."""

    def __init__(self, **settings: Any) -> None:
        settings = checked_settings(without_deprecated(settings), type(self).__name__)
        if settings["do_convert_annotations"] is None:
            settings["do_convert_annotations"] = settings["do_normalize"]
        for name, value in settings.items():
            setattr(self, name, value)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Reads a processor from a folder, a JSON file, or the hub.

        Args:
            pretrained_model_name_or_path: Folder, JSON file, or id of a model on the hub.
            return_unused_kwargs: Whether to return (processor, unknown keyword arguments).
            **kwargs: `revision`, `subfolder`, `cache_dir`, `token`, `local_files_only`,
                `force_download`; and arguments of the class, which override the file. `use_fast` is
                accepted and means nothing: there is one implementation.

        Raises:
            OSError: There is no such file, or it is no JSON object.
            TypeError: An argument is unknown (without `return_unused_kwargs`).
        """
        kwargs.pop("use_fast", None)
        download = {name: kwargs.pop(name) for name in DOWNLOAD_OPTIONS if name in kwargs}
        settings = _read_settings(pretrained_model_name_or_path, download)
        known = SETTINGS.keys() | {"max_size", "pad_and_return_pixel_mask"}
        unused = {name: kwargs.pop(name) for name in list(kwargs) if name not in known}
        if unused and not return_unused_kwargs:
            raise check.unknown_keyword("from_pretrained", next(iter(unused)), sorted(known))
        processor = cls.from_dict(settings, **kwargs)
        return (processor, unused) if return_unused_kwargs else processor

    @classmethod
    def from_dict(cls, image_processor_dict: Mapping[str, Any], **overrides: Any) -> Self:
        """Makes a processor from the content of a preprocessor_config.json of transformers 4 or 5.

        Keys that this processor does not know are named in a warning and left out.
        """
        content = {k: v for k, v in image_processor_dict.items() if k not in _IGNORED_KEYS}
        content = without_deprecated(content, warn=False)
        unknown = sorted(content.keys() - SETTINGS.keys())
        if unknown:
            warnings.warn(f"{cls.__name__}: unknown settings are left out: {unknown}", stacklevel=2)
        known = {name: value for name, value in content.items() if name in SETTINGS}
        return cls(**(known | without_deprecated(overrides)))

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike) -> Self:
        """Reads a processor from a preprocessor_config.json file."""
        return cls.from_dict(read_json(Path(json_file)))

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings that are not None, in the form that JSON and transformers take.

        `compat` is there only if it is not the default.
        """
        content = {name: getattr(self, name) for name in SETTINGS}
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
        # One name for all: transformers finds its own class by it.
        return content | {"image_processor_type": "ConditionalDetrImageProcessor"}

    def to_json_string(self) -> str:
        """Returns `to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """Writes `to_json_string` to a file; an interrupted write leaves the old file."""
        text = self.to_json_string()
        write_atomically(Path(json_file_path), lambda path: path.write_text(text, encoding="utf-8"))

    def save_pretrained(self, save_directory: str | os.PathLike) -> list[str]:
        """Writes preprocessor_config.json into a folder (made if need be); returns its path."""
        path = make_folder(save_directory) / PREPROCESSOR_NAME
        self.to_json_file(path)
        return [str(path)]

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload image processor",
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
    ) -> str:
        """Uploads preprocessor_config.json to a hub repository (made if need be); returns a URL."""
        from huggingface_hub import HfApi  # 0.2 s to import

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return api.upload_file(
            path_or_fileobj=self.to_json_string().encode(),
            path_in_repo=PREPROCESSOR_NAME,
            repo_id=repo_id,
            revision=revision,
            commit_message=commit_message,
        ).commit_url

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"


def without_deprecated(given: Mapping[str, Any], warn: bool = True) -> dict[str, Any]:
    """Replaces `max_size` and `pad_and_return_pixel_mask` by what takes their place."""
    given = dict(given)
    renamed = {"max_size": "size={'shortest_edge', 'longest_edge'}"}
    renamed["pad_and_return_pixel_mask"] = "do_pad"
    for name, replacement in renamed.items():
        if warn and given.get(name) is not None:
            warnings.warn(f"{name} is deprecated: use {replacement}", FutureWarning, stacklevel=3)
    max_size = given.pop("max_size", None)
    if max_size is not None:
        size = given.get("size")
        given["size"] = check_size("size", 800 if size is None else size, max_size)
    do_pad = given.pop("pad_and_return_pixel_mask", None)
    if do_pad is not None and given.get("do_pad") is None:
        given["do_pad"] = do_pad
    return given


def checked_settings(given: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """Returns all settings, checked and in their stored form; those that are None by default."""
    for name in given:
        if name not in SETTINGS:
            raise check.unknown_keyword(owner, name, list(SETTINGS))
    settings = {}
    for name, (default, checked) in SETTINGS.items():
        value = given.get(name)
        if value is None:
            value = dict(default) if isinstance(default, dict) else default
        settings[name] = None if value is None else checked(name, value)
    return settings


def _read_settings(
    name_or_path: str | os.PathLike, download: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Returns the content of the file that describes the image processor of a model."""
    if os.path.isfile(name_or_path):
        return read_json(Path(name_or_path))
    # As in transformers, a processor_config.json with an image processor inside goes first.
    try:
        content = read_json(resolve_file(name_or_path, PROCESSOR_NAME, **download))
        if "image_processor" in content:
            return content["image_processor"]
    except FileNotFoundError:
        pass  # the usual case; the other file is the one that has to be there
    return read_json(resolve_file(name_or_path, PREPROCESSOR_NAME, **download))
