"""`ConditionalDetrConfig`: the fields of transformers' class of that name, and its config.json.

Both generations of the file are read: v4 (`backbone`, `use_timm_backbone`, `backbone_kwargs`, ...)
and v5 (`backbone_config`). The v5 form is written. One field is ours: `compat` (see the class).
"""

import copy
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from cdetr_fast.common import validation as check
from cdetr_fast.common.files import (
    DOWNLOAD_OPTIONS,
    make_folder,
    read_json,
    resolve_file,
    write_atomically,
)
from cdetr_fast.config.backbone import ACTIVATION_NAMES, BackboneConfig
from cdetr_fast.config.compat import departure_of

CONFIG_NAME = "config.json"


def _alias(name: str) -> property:
    return property(
        lambda self: getattr(self, name), lambda self, value: setattr(self, name, value)
    )


class ConditionalDetrConfig:
    """Configuration of a model, with the fields, defaults and aliases of transformers 5.

    Args:
        compat: "paper" (default) follows the authors; "transformers" reproduces transformers'
            departures from them, for weights that were trained with those.
        backbone_config: Dict, `BackboneConfig` or transformers config; default timm's resnet50. The
            v4 keywords `backbone`, `use_timm_backbone`, `use_pretrained_backbone` and
            `backbone_kwargs` are taken in its place. Its `num_channels` is the one that counts.
        num_labels, id2label, label2id: The classes, by number or by name (default 2).
        **kwargs: The other fields, as annotated below. Drop-out and layer drop are probabilities,
            the `*_cost` and `*_coefficient` fields weights >= 0.

    Raises:
        TypeError: An unknown keyword (the message has the closest known one), or a wrong type.
        ValueError: A value out of range; the message names field, expected and got.

    Note: transformers keeps unknown keywords without a word; here only those of a config.json are
    kept. Weights that are no integers (`class_cost=2.5`) work here, but transformers 5 refuses to
    read them. `label2id` follows from `id2label` where only one is given; transformers leaves None.
    """

    model_type: ClassVar[str] = "conditional_detr"
    # Trainer keeps all other outputs of an evaluation in memory; logits and boxes stay at 1 and 2.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        *("past_key_values", "auxiliary_outputs", "last_hidden_state"),
        *("decoder_hidden_states", "decoder_attentions", "cross_attentions"),
        *("encoder_last_hidden_state", "encoder_hidden_states", "encoder_attentions"),
    ]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
        "num_hidden_layers": "encoder_layers",
    }
    hidden_size = _alias("d_model")
    num_attention_heads = _alias("encoder_attention_heads")
    num_hidden_layers = _alias("encoder_layers")
    torch_dtype = _alias("dtype")
    use_return_dict = _alias("return_dict")
    name_or_path = _alias("_name_or_path")

    compat: Literal["paper", "transformers"] = "paper"
    backbone_config: BackboneConfig | dict | None = None
    num_channels: int = 3
    num_queries: int = 300
    encoder_layers: int = 6
    encoder_ffn_dim: int = 2048
    encoder_attention_heads: int = 8
    decoder_layers: int = 6
    decoder_ffn_dim: int = 2048
    decoder_attention_heads: int = 8
    encoder_layerdrop: float = 0.0
    decoder_layerdrop: float = 0.0
    is_encoder_decoder: bool = True
    activation_function: str = "relu"
    d_model: int = 256
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    init_std: float = 0.02
    init_xavier_std: float = 1.0
    auxiliary_loss: bool = False
    position_embedding_type: Literal["sine", "learned"] = "sine"
    dilation: bool = False
    class_cost: float = 2
    bbox_cost: float = 5
    giou_cost: float = 2
    mask_loss_coefficient: float = 1
    dice_loss_coefficient: float = 1
    cls_loss_coefficient: float = 2
    bbox_loss_coefficient: float = 5
    giou_loss_coefficient: float = 2
    focal_alpha: float = 0.25
    # Common to all models of transformers
    output_attentions: bool = False
    output_hidden_states: bool = False
    return_dict: bool = True
    dtype: torch.dtype | None = None
    chunk_size_feed_forward: int = 0
    problem_type: str | None = None
    architectures: list[str] | None = None
    transformers_version: str | None = None
    id2label: dict[int, str] | None = None
    label2id: dict[str, int] | None = None
    _name_or_path: str = ""
    _attn_implementation: str | None = None

    _CHECKS: ClassVar[dict[str, Callable[[str, Any], Any]]] = {
        "compat": check.choice("paper", "transformers"),
        "backbone_config": lambda name, value: BackboneConfig.of(value),
        "num_channels": check.integer(1),
        "num_queries": check.integer(1),
        "encoder_layers": check.integer(0),
        "encoder_ffn_dim": check.integer(1),
        "encoder_attention_heads": check.integer(1),
        "decoder_layers": check.integer(1),
        "decoder_ffn_dim": check.integer(1),
        "decoder_attention_heads": check.integer(1),
        "encoder_layerdrop": check.number(0, 1),
        "decoder_layerdrop": check.number(0, 1),
        "is_encoder_decoder": check.flag,
        "activation_function": check.choice(*ACTIVATION_NAMES),
        "d_model": check.integer(1),
        "dropout": check.number(0, 1),
        "attention_dropout": check.number(0, 1),
        "activation_dropout": check.number(0, 1),
        "init_std": check.real(0),
        "init_xavier_std": check.real(0),
        "auxiliary_loss": check.flag,
        "position_embedding_type": check.choice("sine", "learned"),
        "dilation": check.flag,
        "class_cost": check.weight,
        "bbox_cost": check.weight,
        "giou_cost": check.weight,
        "mask_loss_coefficient": check.weight,
        "dice_loss_coefficient": check.weight,
        "cls_loss_coefficient": check.weight,
        "bbox_loss_coefficient": check.weight,
        "giou_loss_coefficient": check.weight,
        "focal_alpha": check.real(0, 1),
        "output_attentions": check.optional(check.flag),
        "output_hidden_states": check.optional(check.flag),
        "return_dict": check.optional(check.flag),
        "dtype": check.optional(check.dtype),
        "chunk_size_feed_forward": check.integer(0),
        "problem_type": check.choice(
            None, "regression", "single_label_classification", "multi_label_classification"
        ),
        "architectures": check.optional(check.list_of(str, "a list of class names")),
        "transformers_version": check.optional(check.text),
        "id2label": check.optional(check.labels_by_id),
        "label2id": check.optional(check.ids_by_label),
        "_name_or_path": lambda name, value: str(value),
        "_attn_implementation": check.choice(None, "eager", "sdpa"),
    }
    # v4 keywords that describe the backbone, and v4 fields that files carry and no model reads.
    _V4_BACKBONE: ClassVar[tuple[str, ...]] = (
        "backbone",
        "use_timm_backbone",
        "use_pretrained_backbone",
        "backbone_kwargs",
    )
    _V4_UNREAD: ClassVar[tuple[str, ...]] = (
        "max_position_embeddings",
        "scale_embedding",
        "classifier_dropout",
        "tie_word_embeddings",
        "torchscript",
        "use_cache",
    )
    _RENAMED: ClassVar[dict[str, str]] = {
        **attribute_map,
        "torch_dtype": "dtype",
        "use_return_dict": "return_dict",
        "name_or_path": "_name_or_path",
        "attn_implementation": "_attn_implementation",
    }

    def __init__(self, **kwargs: Any):
        for name in kwargs:
            if name not in self._known():
                raise check.unknown_keyword(type(self).__name__, name, self._known())
        check.choice(self.model_type)("model_type", kwargs.pop("model_type", self.model_type))
        for alias, name in self._RENAMED.items():
            if alias not in kwargs:
                continue
            value = kwargs.pop(alias)
            if name in kwargs and alias in self.attribute_map and kwargs[name] != value:
                check.refuse(alias, f"{kwargs[name]!r} as {name} (it is the same field)", value)
            if kwargs.get(name) is None:
                kwargs[name] = value
        num_labels = kwargs.pop("num_labels", None)
        v4_backbone = {name: kwargs.pop(name) for name in self._V4_BACKBONE if name in kwargs}
        backbone_config = kwargs.pop("backbone_config", None)

        for name in self._CHECKS:
            if name != "backbone_config":
                setattr(self, name, kwargs.pop(name, getattr(type(self), name)))
        for name, value in kwargs.items():  # _V4_UNREAD
            setattr(self, name, value)
        self.backbone_config = self._make_backbone(backbone_config, v4_backbone)
        self._make_labels(num_labels)
        self.validate()

    @classmethod
    def _known(cls) -> list[str]:
        return [
            *cls._CHECKS,
            *cls._RENAMED,
            *cls._V4_BACKBONE,
            *cls._V4_UNREAD,
            "num_labels",
            "model_type",
        ]

    def _make_backbone(self, backbone_config: Any, v4: dict[str, Any]) -> BackboneConfig:
        name, use_timm = v4.get("backbone"), v4.get("use_timm_backbone", True)
        options = dict(v4.get("backbone_kwargs") or {})
        pretrained = v4.get("use_pretrained_backbone")
        if backbone_config is not None:
            made = BackboneConfig.of(backbone_config)
            is_timm = made.model_type == "timm_backbone"
            if name is not None and is_timm and name != made.backbone:
                check.refuse("backbone", f"{made.backbone!r} as in backbone_config", name)
            if v4.get("use_timm_backbone") and not is_timm:
                expected = f"False with backbone_config of type {made.model_type!r}"
                check.refuse("use_timm_backbone", expected, True)
            if options:
                check.refuse("backbone_kwargs", "None next to backbone_config", options)
            if (
                pretrained is not None and is_timm
            ):  # v4 files say True for other types, to no effect
                made.use_pretrained_backbone = pretrained
            if self.dilation and is_timm and made.output_stride is None:
                warnings.warn(
                    "dilation=True has no effect: backbone_config.output_stride is None",
                    stacklevel=4,
                )
            return made
        if use_timm:
            made = BackboneConfig(
                "timm_backbone",
                backbone=name or "resnet50",
                num_channels=options.pop(
                    "in_chans", options.pop("num_channels", self.num_channels)
                ),
                out_indices=options.pop("out_indices", [1, 2, 3, 4]),
                use_pretrained_backbone=pretrained or False,
                **options,
            )
            if self.dilation and made.output_stride is None:
                made.output_stride = 16
            return made
        if name not in (None, "resnet50"):
            check.refuse(
                "backbone", "backbone_config in its place when use_timm_backbone=False", name
            )
        return BackboneConfig(
            "resnet", **{"num_channels": self.num_channels, "out_features": ["stage4"]} | options
        )

    def _make_labels(self, num_labels: int | None) -> None:
        if self.id2label is None and self.label2id is not None:
            self.id2label = {index: label for label, index in self.label2id.items()}
        if self.id2label is None:
            self.num_labels = 2 if num_labels is None else num_labels
        elif num_labels is not None and num_labels != len(self.id2label):
            warnings.warn(
                f"num_labels={num_labels} does not fit the {len(self.id2label)} names of id2label: "
                "the classes are renamed LABEL_0, LABEL_1, ...",
                stacklevel=4,
            )
            self.num_labels = num_labels
        if self.label2id is None:
            self.label2id = {label: index for index, label in self.id2label.items()}

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._CHECKS:
            value = self._CHECKS[name](name, value)
        super().__setattr__(name, value)

    def validate(self) -> None:
        """Checks the fields against each other.

        Raises:
            ValueError: d_model does not fit the heads or the sine code.
        """
        for heads in ("encoder_attention_heads", "decoder_attention_heads"):
            if self.d_model % getattr(self, heads):
                check.refuse(
                    "d_model", f"a multiple of {heads}={getattr(self, heads)}", self.d_model
                )
        if self.d_model % 4:
            check.refuse("d_model", "a multiple of 4 (sine and cosine of x and of y)", self.d_model)

    @property
    def num_labels(self) -> int:
        """Number of classes K, the length of `id2label`; setting another one renames them all."""
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, value: int) -> None:
        if self.id2label is None or len(self.id2label) != value:
            self.id2label = {
                index: f"LABEL_{index}" for index in range(check.integer(1)("num_labels", value))
            }
            self.label2id = {label: index for index, label in self.id2label.items()}

    @property
    def backbone(self) -> str | None:
        """Name of the backbone in timm (v4 field, read-only view of `backbone_config`)."""
        return getattr(self.backbone_config, "backbone", None)

    @property
    def use_timm_backbone(self) -> bool:
        """Whether the backbone is timm's (v4 field, read-only view of `backbone_config`)."""
        return self.backbone_config.model_type == "timm_backbone"

    @property
    def use_pretrained_backbone(self) -> bool:
        """Whether a model built from this starts from ImageNet weights (v4 field, read-only)."""
        return self.backbone_config.use_pretrained_backbone

    @property
    def backbone_kwargs(self) -> dict[str, Any] | None:
        """Keyword arguments for timm (v4 field, read-only view of `backbone_config`)."""
        if not self.use_timm_backbone:
            return None
        made = self.backbone_config
        stride = {} if made.output_stride is None else {"output_stride": made.output_stride}
        return {"out_indices": list(made.out_indices), "in_chans": made.num_channels, **stride}

    # Reading --------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        subfolder: str = "",
        cache_dir: str | os.PathLike | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        return_unused_kwargs: bool = False,
        **overrides: Any,
    ) -> "ConditionalDetrConfig | tuple[ConditionalDetrConfig, dict[str, Any]]":
        """Reads a config.json and applies overrides.

        Args:
            name_or_path: A folder, a JSON file, or the id of a model on the hub.
            revision: Branch, tag or commit on the hub.
            subfolder: Folder inside the folder or repository.
            cache_dir: Where downloads are kept, if not in the cache of `huggingface_hub`.
            token: Access token for the hub.
            local_files_only: Use what is in the cache, and fetch nothing.
            force_download: Fetch even what is in the cache.
            return_unused_kwargs: Return (config, overrides that are no fields); else those are
                refused.
            **overrides: Fields that take the place of the file's.

        Raises:
            OSError: There is no such file, or it is no JSON.
            ValueError, TypeError: As in the constructor.
        """
        fields = cls.get_config_dict(
            name_or_path,
            revision=revision,
            subfolder=subfolder,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
        )[0]
        overrides.setdefault("name_or_path", os.fspath(name_or_path))
        return cls.from_dict(fields, return_unused_kwargs=return_unused_kwargs, **overrides)

    @classmethod
    def get_config_dict(
        cls, name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads a config.json into a dict, as it is in the file.

        Args:
            name_or_path: A folder, a JSON file, or the id of a model on the hub.
            **kwargs: Download options of `from_pretrained`; all others are handed back.

        Returns:
            The file's content, and the keyword arguments that were not used.
        """
        options = {name: kwargs.pop(name) for name in DOWNLOAD_OPTIONS if name in kwargs}
        if os.path.isfile(name_or_path):
            return read_json(Path(name_or_path)), kwargs
        return read_json(resolve_file(name_or_path, CONFIG_NAME, **options)), kwargs

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike) -> "ConditionalDetrConfig":
        """Reads one JSON file."""
        return cls.from_dict(read_json(Path(json_file)))

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], *, return_unused_kwargs: bool = False, **overrides: Any
    ) -> "ConditionalDetrConfig | tuple[ConditionalDetrConfig, dict[str, Any]]":
        """Makes a configuration from the content of a config.json (transformers v4, v5 or ours).

        A dict without `compat`, or with `transformers_version`, was written by transformers. Where
        its weights can only be right with transformers' departures from the paper, the result has
        compat="transformers", with a UserWarning that says why.

        Args:
            config_dict: Fields; unknown ones are kept as attributes and written back.
            return_unused_kwargs: Return (config, overrides that are no fields); else those are
                refused.
            **overrides: Fields that take the place of the dict's; `compat` given here always wins.
        """
        fields = copy.deepcopy(config_dict)
        if fields.get("dtype", 0) is None and fields.get("torch_dtype") is not None:
            del fields["dtype"]
        if fields.get("model_type") is None:
            fields.pop("model_type", None)
        if fields.get("dilation", 0) is None:  # written by v4 for backbones that are not timm's
            fields["dilation"] = False
        for alias, name in cls.attribute_map.items():
            # v4 wrote num_hidden_layers too, and left it behind when encoder_layers was overridden
            if name in fields:
                fields.pop(alias, None)
        known = cls._known()
        extra = {name: fields.pop(name) for name in list(fields) if name not in known}
        config = cls(**fields)
        for name, value in extra.items():
            if hasattr(cls, name):
                raise ValueError(f"config.json: {name!r} is no field, but the name of a method")
            setattr(config, name, value)

        known += extra
        unused = {name: overrides.pop(name) for name in list(overrides) if name not in known}
        if unused and not return_unused_kwargs:
            raise check.unknown_keyword(cls.__name__, next(iter(unused)), known)
        # transformers keeps our `compat` when it writes a file anew, but trains in its own way.
        by_transformers = "compat" not in fields or config.transformers_version is not None
        config.transformers_version = None
        if by_transformers and config.compat == "paper" and "compat" not in overrides:
            reason = departure_of(config)
            if reason:
                config.compat = "transformers"
                warnings.warn(
                    f"this config.json was written by transformers, and there {reason}: loaded "
                    "with compat='transformers' (the argument compat='paper' overrides this). Give "
                    "the image processor the same compat.",
                    stacklevel=3,
                )
        config._override(overrides)
        return (config, unused) if return_unused_kwargs else config

    def _override(self, fields: dict[str, Any]) -> None:
        """Applies keyword arguments to what a file said."""
        check.choice(self.model_type)("model_type", fields.pop("model_type", self.model_type))
        fields = {self._RENAMED.get(name, name): value for name, value in fields.items()}
        if fields.get("dtype") == "auto":
            del fields["dtype"]
        num_labels = fields.pop("num_labels", None)
        v4 = {name: fields.pop(name) for name in self._V4_BACKBONE if name in fields}
        backbone = fields.pop("backbone_config", None)
        if "id2label" in fields:
            fields.setdefault("label2id", None)
        self.update(fields)
        self._make_labels(num_labels)
        if backbone is not None:
            self.backbone_config = self._merged_backbone(backbone)
        elif v4 or "dilation" in fields:
            if v4.pop("use_timm_backbone", self.use_timm_backbone) != self.use_timm_backbone:
                expected = f"{self.use_timm_backbone}, as in the file"
                check.refuse("use_timm_backbone", expected, not self.use_timm_backbone)
            changes = dict(v4.pop("backbone_kwargs", None) or {}) | v4
            if "in_chans" in changes:
                changes["num_channels"] = changes.pop("in_chans")
            if "dilation" in fields and self.use_timm_backbone:
                changes.setdefault("output_stride", 16 if self.dilation else None)
            self.backbone_config = self._merged_backbone(changes)

    def _merged_backbone(self, changes: Any) -> Any:
        """Puts changes over the backbone of the file, unless they describe another type whole."""
        current = self.backbone_config.to_dict()
        if not isinstance(changes, dict):
            return changes
        if changes.get("model_type", current["model_type"]) != current["model_type"]:
            return changes
        if changes.get("backbone", self.backbone) != self.backbone:
            for name in ("out_features", "stage_names"):  # names of the old one's layers
                current.pop(name, None)
        return current | changes

    # Writing --------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Returns every field as plain values, unknown ones of a file included, in v5's form."""
        fields = {
            name: copy.deepcopy(value)
            for name, value in self.__dict__.items()
            if name != "_attn_implementation"
        }
        fields["backbone_config"] = self.backbone_config.to_dict()
        fields["dtype"] = None if self.dtype is None else str(self.dtype).removeprefix("torch.")
        fields["model_type"] = self.model_type
        return fields

    def to_diff_dict(self) -> dict[str, Any]:
        """Returns what config.json holds: `to_dict()` without common fields at their default."""
        default_labels = {0: "LABEL_0", 1: "LABEL_1"}
        common = {
            "output_attentions": False,
            "output_hidden_states": False,
            "return_dict": True,
            "dtype": None,
            "chunk_size_feed_forward": 0,
            "problem_type": None,
            "architectures": None,
            "transformers_version": None,
            "id2label": default_labels,
            "label2id": {label: index for index, label in default_labels.items()},
            "_name_or_path": self._name_or_path,
        }
        return {
            name: value
            for name, value in self.to_dict().items()
            if name not in common or value != common[name]
        }

    def to_json_string(self, use_diff: bool = True) -> str:
        """Returns `to_diff_dict()`, or with use_diff=False `to_dict()`, as JSON."""
        fields = self.to_diff_dict() if use_diff else self.to_dict()
        return json.dumps(fields, indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True) -> None:
        """Writes one JSON file; an interrupted write leaves the old file."""
        text = self.to_json_string(use_diff)
        write_atomically(Path(json_file_path), lambda path: path.write_text(text, "utf-8"))

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Writes config.json into a folder, which is made if need be.

        Raises:
            ValueError: The fields have been set to values that do not go together.
        """
        self.validate()
        folder = make_folder(save_directory)
        self.to_json_file(folder / CONFIG_NAME)

    def update(self, config_dict: dict[str, Any]) -> None:
        """Sets several attributes, and checks the whole.

        Raises:
            ValueError, TypeError: As in the constructor; nothing is changed then.
        """
        before = dict(self.__dict__)
        try:
            for name, value in config_dict.items():
                setattr(self, name, value)
            self.validate()
        except (ValueError, TypeError, AttributeError):
            self.__dict__.clear()
            self.__dict__.update(before)
            raise

    def __eq__(self, other: object) -> bool:
        """Equal fields; where the configuration was read from does not count."""
        if not isinstance(other, ConditionalDetrConfig):
            return NotImplemented
        return self.to_dict() | {"_name_or_path": ""} == other.to_dict() | {"_name_or_path": ""}

    __hash__ = None

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"
