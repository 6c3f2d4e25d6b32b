"""`BackboneConfig`: the part of the configuration that describes the backbone."""

import copy
from collections.abc import Callable
from typing import Any, ClassVar

from cdetr_fast.common import validation as check

# Those of transformers without parameters of their own; `models.activations` has the functions.
ACTIVATION_NAMES = (
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
)


class BackboneConfig:
    """The convolutional backbone: a timm model, or the ResNet that transformers has itself.

    Args:
        model_type: "timm_backbone" or "resnet".
        **fields: For "timm_backbone": backbone (a timm name), num_channels, features_only,
            use_pretrained_backbone, out_indices, out_features, output_stride, freeze_batch_norm_2d.
            For "resnet": num_channels, embedding_size, hidden_sizes, depths, layer_type,
            hidden_act, downsample_in_first_stage, downsample_in_bottleneck, out_features,
            out_indices, stage_names. Any other is kept as an attribute and written back.

    transformers 5 ignores `use_pretrained_backbone`; here it is honoured when a model is built from
    a configuration (never when a checkpoint is loaded).

    Raises:
        ValueError, TypeError: a field has a value that cannot be used; the message names it.
    """

    # What "resnet" does not have in its file, readable all the same
    backbone: str | None = None
    output_stride: int | None = None
    use_pretrained_backbone: bool = False

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
    _CHECKS: ClassVar[dict[str, Callable[[str, Any], Any]]] = {
        "model_type": check.choice(*_DEFAULTS),
        "backbone": check.text,
        "num_channels": check.integer(1),
        "features_only": check.choice(True),
        "use_pretrained_backbone": check.flag,
        "out_indices": check.optional(check.list_of(int, "a list of stage indices")),
        "out_features": check.optional(check.list_of(str, "a list of stage names")),
        "output_stride": check.optional(check.choice(8, 16, 32)),
        "freeze_batch_norm_2d": check.flag,
        "embedding_size": check.integer(1),
        "hidden_sizes": check.list_of(int, "a list of channel counts"),
        "depths": check.list_of(int, "a list of block counts"),
        "layer_type": check.choice("basic", "bottleneck"),
        "hidden_act": check.choice(*ACTIVATION_NAMES),
        "downsample_in_first_stage": check.flag,
        "downsample_in_bottleneck": check.flag,
    }

    def __init__(self, model_type: str = "timm_backbone", **fields: Any):
        self.model_type = model_type
        for name, value in (copy.deepcopy(self._DEFAULTS[model_type]) | fields).items():
            setattr(self, name, value)
        if model_type == "resnet":
            self._align_stages()

    @classmethod
    def of(cls, value: Any) -> "BackboneConfig":
        """Copies a `BackboneConfig`, a transformers config, or a dict with `model_type`."""
        fields = value.to_dict() if hasattr(value, "to_dict") else value
        if not isinstance(fields, dict):
            check.refuse("backbone_config", "a dict or a configuration object", value, TypeError)
        return cls(**{"model_type": None} | copy.deepcopy(fields))

    def _align_stages(self) -> None:
        """Derives stage_names, and out_features from out_indices or the other way round."""
        names = ["stem"] + [f"stage{index + 1}" for index in range(len(self.depths))]
        self.stage_names = names
        if len(self.hidden_sizes) != len(self.depths):
            check.refuse(
                "backbone_config.hidden_sizes",
                f"{len(self.depths)} channel counts (as depths)",
                self.hidden_sizes,
            )
        if self.out_features is None:
            indices = [len(names) - 1] if self.out_indices is None else self.out_indices
            if not all(-len(names) <= index < len(names) for index in indices):
                check.refuse("backbone_config.out_indices", f"indices into {names}", indices)
            self.out_features = [names[index] for index in indices]
        if not set(self.out_features) <= set(names):
            check.refuse("backbone_config.out_features", f"a subset of {names}", self.out_features)
        if self.out_indices is None:
            self.out_indices = [names.index(feature) for feature in self.out_features]
        if [names[index] for index in self.out_indices] != self.out_features:
            check.refuse(
                "backbone_config.out_indices",
                f"the indices of {self.out_features}",
                self.out_indices,
            )

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._CHECKS:
            value = self._CHECKS[name](f"backbone_config.{name}", value)
        super().__setattr__(name, value)

    def to_dict(self) -> dict[str, Any]:
        """Returns every field, those kept from a file included, as plain values."""
        return copy.deepcopy(self.__dict__)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BackboneConfig) and self.__dict__ == other.__dict__

    __hash__ = None

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.__dict__.items())
        return f"BackboneConfig({fields})"
