"""`BackboneConfig`: the part of the configuration that describes the backbone."""

import copy
import warnings
from typing import Any, ClassVar, Literal, Self, get_args

from cdetr_fast.common.validation import Checked, IntList, PositiveInt, StrList, refuse

# Those of transformers without parameters of their own; `models.activations` has the functions.
ActivationName = Literal[
    "gelu",
    "gelu_accurate",
    "gelu_fast",
    "gelu_new",
    "gelu_python",
    "gelu_pytorch_tanh",
    "hardswish",
    "leaky_relu",
    "linear",
    "mish",
    "quick_gelu",
    "relu",
    "relu2",
    "relu6",
    "sigmoid",
    "silu",
    "swish",
    "tanh",
]
ACTIVATION_NAMES: tuple[str, ...] = get_args(ActivationName)


class BackboneConfig(Checked):
    """The convolutional backbone: a timm model, or the ResNet that transformers has itself.

    Args:
        model_type: "timm_backbone" or "resnet".
        **fields: For "timm_backbone": backbone (a timm name), num_channels, features_only,
            use_pretrained_backbone, out_indices, out_features, output_stride, freeze_batch_norm_2d.
            For "resnet": num_channels, embedding_size, hidden_sizes, depths, layer_type,
            hidden_act, downsample_in_first_stage, downsample_in_bottleneck, out_features,
            out_indices, stage_names. Others are kept as attributes and written back.

    transformers 5 ignores `use_pretrained_backbone`; here it is honoured when a model is built from
    a configuration (never when a checkpoint is loaded).

    Raises:
        ValueError, TypeError: A field has a value that cannot be used; the message names it.
    """

    _prefix: ClassVar[str] = "backbone_config."

    model_type: Literal["timm_backbone", "resnet"]
    num_channels: PositiveInt
    out_indices: IntList | None
    out_features: StrList | None
    # Of timm's; a "resnet" does not have these in its file, but they can be read.
    backbone: str | None = None
    features_only: Literal[True] = True
    use_pretrained_backbone: bool = False
    output_stride: Literal[8, 16, 32] | None = None
    freeze_batch_norm_2d: bool = False
    # Of a "resnet"
    embedding_size: PositiveInt
    hidden_sizes: IntList
    depths: IntList
    layer_type: Literal["basic", "bottleneck"]
    hidden_act: ActivationName
    downsample_in_first_stage: bool
    downsample_in_bottleneck: bool
    stage_names: StrList | None

    _DEFAULTS: ClassVar[dict[str, dict[str, Any]]] = {
        "timm_backbone": {
            "backbone": None,
            "num_channels": 3,
            "features_only": True,
            "use_pretrained_backbone": False,
            "out_indices": [-1],
            "out_features": None,
            "output_stride": None,
            "freeze_batch_norm_2d": False,
        },
        "resnet": {
            "num_channels": 3,
            "embedding_size": 64,
            "hidden_sizes": [256, 512, 1024, 2048],
            "depths": [3, 4, 6, 3],
            "layer_type": "bottleneck",
            "hidden_act": "relu",
            "downsample_in_first_stage": False,
            "downsample_in_bottleneck": False,
            "out_features": None,
            "out_indices": None,
        },
    }

    def __init__(
        self, model_type: Literal["timm_backbone", "resnet"] = "timm_backbone", **fields: Any
    ) -> None:
        self.model_type = model_type
        for name, value in (copy.deepcopy(self._DEFAULTS[model_type]) | fields).items():
            setattr(self, name, value)
        if model_type == "resnet":
            self._align_stages()
        elif self.backbone is None:
            refuse("backbone_config.backbone", "the name of a timm model", None, TypeError)

    @classmethod
    def of(cls, value: Any) -> Self:
        """Copy a `BackboneConfig`, a transformers config, or a dict with `model_type`."""
        fields = value.to_dict() if hasattr(value, "to_dict") else value
        if not isinstance(fields, dict):
            refuse("backbone_config", "a dict or a configuration object", value, TypeError)
        return cls(**{"model_type": None, **copy.deepcopy(fields)})

    def _align_stages(self) -> None:
        """Set stage_names, and derive out_features from out_indices or the reverse."""
        names = ["stem"] + [f"stage{index + 1}" for index in range(len(self.depths))]
        self.stage_names = names
        if len(self.hidden_sizes) != len(self.depths):
            refuse(
                "backbone_config.hidden_sizes",
                f"{len(self.depths)} channel counts (as depths)",
                self.hidden_sizes,
            )
        if self.out_features is None:
            indices = [len(names) - 1] if self.out_indices is None else self.out_indices
            if not all(-len(names) <= index < len(names) for index in indices):
                refuse("backbone_config.out_indices", f"indices into {names}", indices)
            self.out_features = [names[index] for index in indices]
        if not set(self.out_features) <= set(names):
            refuse("backbone_config.out_features", f"a subset of {names}", self.out_features)
        if self.out_indices is None:
            self.out_indices = [names.index(feature) for feature in self.out_features]
        if [names[index] for index in self.out_indices] != self.out_features:
            refuse(
                "backbone_config.out_indices",
                f"the indices of {self.out_features}",
                self.out_indices,
            )

    @property
    def timm_kwargs(self) -> dict[str, Any] | None:
        """Keyword arguments for timm (`backbone_kwargs` in transformers 4); None for a ResNet."""
        if self.model_type != "timm_backbone":
            return None
        stride = {} if self.output_stride is None else {"output_stride": self.output_stride}
        return {
            "out_indices": list(self.out_indices or ()),
            "in_chans": self.num_channels,
            **stride,
        }

    def merged(self, changes: Any) -> Any:
        """Return the fields with changes; the changes alone where they are of another type."""
        if not isinstance(changes, dict):
            return changes
        if changes.get("model_type", self.model_type) != self.model_type:
            return changes
        fields = self.to_dict()
        if changes.get("backbone", self.backbone) != self.backbone:
            for name in ("out_features", "stage_names"):  # names of the old one's layers
                fields.pop(name, None)
        return fields | changes

    def to_dict(self) -> dict[str, Any]:
        """Return every field, those kept from a file included, as plain values."""
        return copy.deepcopy(self.__dict__)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BackboneConfig) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]  # mutable, so not hashable

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.__dict__.items())
        return f"BackboneConfig({fields})"


def make_backbone(
    backbone_config: Any, v4: dict[str, Any], num_channels: int, dilation: bool
) -> BackboneConfig:
    """Return the configuration of a backbone from the keywords of a model's.

    Args:
        backbone_config: As in `BackboneConfig.of`; None if only the keywords of v4 describe it.
        v4: `backbone`, `use_timm_backbone`, `use_pretrained_backbone` and `backbone_kwargs` of
            transformers 4, as far as they are given.
        num_channels: Of the images.
        dilation: Whether the last stage is dilated instead of strided.

    Raises:
        ValueError, TypeError: The keywords contradict each other, or one cannot be used.
    """
    name, use_timm = v4.get("backbone"), v4.get("use_timm_backbone", True)
    options = dict(v4.get("backbone_kwargs") or {})
    pretrained = v4.get("use_pretrained_backbone")
    if backbone_config is not None:
        made = BackboneConfig.of(backbone_config)
        is_timm = made.model_type == "timm_backbone"
        if name is not None and is_timm and name != made.backbone:
            refuse("backbone", f"{made.backbone!r} as in backbone_config", name)
        if v4.get("use_timm_backbone") and not is_timm:
            expected = f"False with backbone_config of type {made.model_type!r}"
            refuse("use_timm_backbone", expected, True)
        if options:
            refuse("backbone_kwargs", "None next to backbone_config", options)
        if pretrained is not None and is_timm:  # v4 files say True for other types, to no effect
            made.use_pretrained_backbone = pretrained
        if dilation and is_timm and made.output_stride is None:
            warnings.warn(
                "dilation=True has no effect: backbone_config.output_stride is None", stacklevel=4
            )
        return made
    if use_timm:
        made = BackboneConfig(
            "timm_backbone",
            backbone=name or "resnet50",
            num_channels=options.pop("in_chans", options.pop("num_channels", num_channels)),
            out_indices=options.pop("out_indices", [1, 2, 3, 4]),
            use_pretrained_backbone=pretrained or False,
            **options,
        )
        if dilation and made.output_stride is None:
            made.output_stride = 16
        return made
    if name not in (None, "resnet50"):
        refuse("backbone", "backbone_config instead when use_timm_backbone=False", name)
    return BackboneConfig(
        "resnet", **{"num_channels": num_channels, "out_features": ["stage4"]} | options
    )
