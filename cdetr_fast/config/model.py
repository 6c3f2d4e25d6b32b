"""`ConditionalDetrConfig`: the fields of transformers' class of that name, and its config.json.

Both generations of the file are read: v4 (`backbone`, `use_timm_backbone`, `backbone_kwargs`, ...)
and v5 (`backbone_config`). The v5 form is written. One field is ours: `compat` (see the class).
"""

import copy
import warnings
from typing import Annotated, Any, ClassVar, Literal, Self, overload

from cdetr_fast.common.host_classes import inherit_from_hosts
from cdetr_fast.common.validation import (
    Before,
    Bounds,
    Checked,
    NonNegativeInt,
    PositiveInt,
    Probability,
    StrList,
    checked,
    field_types,
    refuse,
    unknown_keyword,
)
from cdetr_fast.config.attention import check_attn_implementation
from cdetr_fast.config.backbone import (
    ACTIVATION_NAMES,
    ActivationName,
    BackboneConfig,
    make_backbone,
    override_backbone,
)
from cdetr_fast.config.compat import departure_of
from cdetr_fast.config.field_types import (
    Dtype,
    IdsByLabel,
    LabelsById,
    NonNegativeFloat,
    Weight,
)
from cdetr_fast.config.files import CONFIG_NAME, ConfigFile

__all__ = ["ACTIVATION_NAMES", "CONFIG_NAME", "BackboneConfig", "ConditionalDetrConfig"]


def _alias(name: str) -> property:
    return property(
        lambda self: getattr(self, name), lambda self, value: setattr(self, name, value)
    )


class ConditionalDetrConfig(ConfigFile):
    """Configuration of a model, with the fields, defaults and aliases of transformers 5.

    Args:
        compat: "paper" (default) follows the authors; "transformers" reproduces transformers'
            departures from them, for weights that were trained with those.
        backbone_config: Dict, `BackboneConfig` or transformers config; default timm's resnet50. The
            v4 keywords `backbone`, `use_timm_backbone`, `use_pretrained_backbone` and
            `backbone_kwargs` work instead. Its `num_channels` is the one that counts.
        num_labels, id2label, label2id: The classes, by number or by name (default 2).
        **kwargs: The other fields, as annotated below. Dropout and layer drop are probabilities;
            the `*_cost` and `*_coefficient` fields are weights >= 0.

    Raises:
        TypeError: An unknown keyword (the message has the closest known one), or a wrong type.
        ValueError: A value out of range; the message names field, expected and got.

    Note: transformers silently keeps unknown keywords; here only those of a config.json are kept.
    Weights that are not integers (`class_cost=2.5`) work here, but transformers 5 refuses to read
    them. `label2id` is derived from `id2label` where only one is given; transformers leaves None.
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
    backbone_config: BackboneConfig
    num_channels: PositiveInt = 3
    num_queries: PositiveInt = 300
    encoder_layers: NonNegativeInt = 6
    encoder_ffn_dim: PositiveInt = 2048
    encoder_attention_heads: PositiveInt = 8
    decoder_layers: PositiveInt = 6
    decoder_ffn_dim: PositiveInt = 2048
    decoder_attention_heads: PositiveInt = 8
    encoder_layerdrop: Probability = 0.0
    decoder_layerdrop: Probability = 0.0
    is_encoder_decoder: bool = True
    activation_function: ActivationName = "relu"
    d_model: PositiveInt = 256
    dropout: Probability = 0.1
    attention_dropout: Probability = 0.0
    activation_dropout: Probability = 0.0
    init_std: NonNegativeFloat = 0.02
    init_xavier_std: NonNegativeFloat = 1.0
    auxiliary_loss: bool = False
    position_embedding_type: Literal["sine", "learned"] = "sine"
    dilation: bool = False
    class_cost: Weight = 2
    bbox_cost: Weight = 5
    giou_cost: Weight = 2
    mask_loss_coefficient: Weight = 1
    dice_loss_coefficient: Weight = 1
    cls_loss_coefficient: Weight = 2
    bbox_loss_coefficient: Weight = 5
    giou_loss_coefficient: Weight = 2
    focal_alpha: Annotated[float, Bounds(0, 1)] = 0.25
    # Common to all models of transformers
    output_attentions: bool | None = False
    output_hidden_states: bool | None = False
    return_dict: bool | None = True
    dtype: Dtype | None = None
    chunk_size_feed_forward: NonNegativeInt = 0
    problem_type: (
        Literal["regression", "single_label_classification", "multi_label_classification"] | None
    ) = None
    architectures: StrList | None = None
    transformers_version: str | None = None
    id2label: LabelsById
    label2id: IdsByLabel
    _commit_hash = None  # transformers 5.17's pipelines read it
    _name_or_path: Annotated[str, Before(str)] = ""
    _attn_implementation: Annotated[str | None, Before(check_attn_implementation)] = None

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
    _LABELS: ClassVar[tuple[str, ...]] = ("id2label", "label2id", "num_labels")
    _RENAMED: ClassVar[dict[str, str]] = {
        **attribute_map,
        "torch_dtype": "dtype",
        "use_return_dict": "return_dict",
        "name_or_path": "_name_or_path",
        "attn_implementation": "_attn_implementation",
    }

    def __init_subclass__(cls) -> None:
        """Leave derived classes as they are: transformers' base makes dataclasses of its own."""

    def __init__(self, **kwargs: Any) -> None:
        inherit_from_hosts()
        for name in kwargs:
            if name not in self._known():
                raise unknown_keyword(type(self).__name__, name, self._known())
        checked(Literal[self.model_type], kwargs.pop("model_type", self.model_type), "model_type")
        for alias, name in self._RENAMED.items():
            if alias not in kwargs:
                continue
            value = kwargs.pop(alias)
            if name in kwargs and alias in self.attribute_map and kwargs[name] != value:
                refuse(alias, f"{kwargs[name]!r} as {name} (it is the same field)", value)
            if kwargs.get(name) is None:
                kwargs[name] = value
        labels = {name: kwargs.pop(name, None) for name in self._LABELS}
        v4_backbone = {name: kwargs.pop(name) for name in self._V4_BACKBONE if name in kwargs}
        backbone_config = kwargs.pop("backbone_config", None)

        for name in field_types(type(self)):  # type: ignore[arg-type]  # mypy issue 11470
            if name not in ("backbone_config", *self._LABELS):
                setattr(self, name, kwargs.pop(name, getattr(type(self), name)))
        for name, value in kwargs.items():  # _V4_UNREAD
            setattr(self, name, value)
        self.backbone_config = make_backbone(
            backbone_config, v4_backbone, self.num_channels, self.dilation
        )
        self._set_labels(**labels)
        self.validate()

    @classmethod
    def _known(cls) -> list[str]:
        return [
            *field_types(cls),  # type: ignore[arg-type]  # mypy issue 11470
            *cls._RENAMED,
            *cls._V4_BACKBONE,
            *cls._V4_UNREAD,
            *cls._LABELS,
            "model_type",
        ]

    def _set_labels(
        self,
        id2label: dict[int, str] | None,
        label2id: dict[str, int] | None,
        num_labels: int | None,
    ) -> None:
        if id2label is None and label2id is not None:
            self.label2id = label2id
            id2label = {index: label for label, index in self.label2id.items()}
        if id2label is None:
            self.num_labels = 2 if num_labels is None else num_labels
            return
        self.id2label = id2label
        if label2id is None:
            label2id = {label: index for index, label in self.id2label.items()}
        self.label2id = label2id
        if num_labels is not None and num_labels != len(self.id2label):
            warnings.warn(
                f"num_labels={num_labels} does not fit the {len(self.id2label)} names of id2label: "
                "the classes are renamed LABEL_0, LABEL_1, ...",
                stacklevel=4,
            )
            self.num_labels = num_labels

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "backbone_config":  # with an error of its own fields, or of none
            value = BackboneConfig.of(value)
        super().__setattr__(name, value)

    def validate(self) -> None:
        """Check the fields against each other.

        Raises:
            ValueError: d_model does not fit the heads or the sine code.
        """
        for heads in ("encoder_attention_heads", "decoder_attention_heads"):
            if self.d_model % getattr(self, heads):
                refuse("d_model", f"a multiple of {heads}={getattr(self, heads)}", self.d_model)
        if self.d_model % 4:
            refuse("d_model", "a multiple of 4 (sine and cosine of x and of y)", self.d_model)

    @property
    def num_labels(self) -> int:
        """Number of classes K, the length of `id2label`; another number renames them all."""
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, value: int) -> None:
        count = checked(PositiveInt, value, "num_labels")
        if "id2label" not in vars(self) or len(self.id2label) != count:
            self.id2label = {index: f"LABEL_{index}" for index in range(count)}
            self.label2id = {label: index for index, label in self.id2label.items()}

    @property
    def backbone(self) -> str | None:
        """Name of the backbone in timm (v4 field, read-only view of `backbone_config`)."""
        return self.backbone_config.backbone

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
        return self.backbone_config.timm_kwargs

    # From and to dictionaries ---------------------------------------------------------------------

    @overload
    @classmethod
    def from_dict(
        cls,
        config_dict: dict[str, Any],
        *,
        return_unused_kwargs: Literal[False] = ...,
        **overrides: Any,
    ) -> Self: ...

    @overload
    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], *, return_unused_kwargs: bool, **overrides: Any
    ) -> Any: ...

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], *, return_unused_kwargs: bool = False, **overrides: Any
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Make a configuration from the content of a config.json (transformers v4, v5 or ours).

        A dict without `compat`, or with `transformers_version`, was written by transformers. If its
        weights are only right with transformers' departures from the paper, the result has
        compat="transformers", and a UserWarning says why.

        Args:
            config_dict: Fields; unknown ones are kept as attributes and written back.
            return_unused_kwargs: Return (config, overrides that are not fields) instead of refusing
                those.
            **overrides: Fields that replace those of the dict; `compat` given here always wins.
        """
        fields = copy.deepcopy(config_dict)
        fields.pop("_commit_hash", None)  # transformers 5.17's automatic classes put it in
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
            if any(name in vars(base) for base in cls.__mro__ if issubclass(base, Checked)):
                raise ValueError(f"config.json: {name!r} is not a field but the name of a method")
            setattr(config, name, value)

        known += extra
        unused = {name: overrides.pop(name) for name in list(overrides) if name not in known}
        if unused and not return_unused_kwargs:
            raise unknown_keyword(cls.__name__, next(iter(unused)), known)
        # transformers keeps our `compat` when it rewrites a file, but trains in its own way.
        by_transformers = "compat" not in fields or config.transformers_version is not None
        config.transformers_version = None
        if by_transformers and config.compat == "paper" and "compat" not in overrides:
            reason = config.departure()
            if reason:
                config.compat = "transformers"
                warnings.warn(
                    f"this config.json was written by transformers, where {reason}: loaded "
                    "with compat='transformers' (the argument compat='paper' overrides this). Give "
                    "the image processor the same compat.",
                    stacklevel=3,
                )
        config._override(overrides)
        return (config, unused) if return_unused_kwargs else config

    def departure(self) -> str | None:
        """Return how transformers departs from the authors for such a model; None if it does not.

        A sentence, for warnings. Weights that were trained there then need
        `compat="transformers"`.
        """
        return departure_of(self.auxiliary_loss, self.architectures, self.backbone_config)

    def with_overrides(self, **overrides: Any) -> Self:
        """Return a copy with other values of some fields.

        Raises:
            TypeError, ValueError: As in the constructor.
        """
        changed = copy.deepcopy(self)
        known = [*self._known(), *vars(self)]
        for name in overrides:
            if name not in known:
                raise unknown_keyword(type(self).__name__, name, known)
        changed._override(overrides)
        return changed

    def _override(self, fields: dict[str, Any]) -> None:
        """Apply keyword arguments on top of the fields of a file."""
        checked(Literal[self.model_type], fields.pop("model_type", self.model_type), "model_type")
        fields = {self._RENAMED.get(name, name): value for name, value in fields.items()}
        if fields.get("dtype") == "auto":
            del fields["dtype"]
        labels: dict[str, Any] = {"id2label": self.id2label, "num_labels": None}
        labels["label2id"] = None if "id2label" in fields else self.label2id
        labels |= {name: fields.pop(name) for name in self._LABELS if name in fields}
        v4 = {name: fields.pop(name) for name in self._V4_BACKBONE if name in fields}
        backbone = fields.pop("backbone_config", None)
        self.update(fields)
        self._set_labels(**labels)
        if backbone is not None:
            self.backbone_config = self.backbone_config.merged(backbone)
        elif v4 or "dilation" in fields:
            dilation = self.dilation if "dilation" in fields else None
            self.backbone_config = override_backbone(self.backbone_config, v4, dilation)

    def to_dict(self) -> dict[str, Any]:
        """Return every field as plain values, unknown ones of a file included, in v5's form."""
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
        """Return the content of config.json: `to_dict()` without common fields at their default."""
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

    def update(self, config_dict: dict[str, Any]) -> None:
        """Set several attributes, and check the whole.

        Raises:
            ValueError, TypeError: As in the constructor; then nothing is changed.
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
        """Compare the fields; the folder that they were read from does not count."""
        if not isinstance(other, ConditionalDetrConfig):
            return NotImplemented
        return self.to_dict() | {"_name_or_path": ""} == other.to_dict() | {"_name_or_path": ""}

    __hash__ = None  # type: ignore[assignment]  # mutable, so not hashable

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"
