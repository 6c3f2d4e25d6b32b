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

# Fields that transformers 4 and 5 give every configuration: in a timm backbone's file, they are not
# arguments of timm.
_OF_EVERY_CONFIG = frozenset(
    [
        "model_type",
        "transformers_version",
        "architectures",
        "return_dict",
        "output_hidden_states",
        "output_attentions",
        "dtype",
        "torch_dtype",
        "chunk_size_feed_forward",
        "problem_type",
        "id2label",
        "label2id",
        "num_labels",
        "_name_or_path",
        "name_or_path",
        "stage_names",
        "is_encoder_decoder",
        "_attn_implementation",
        "attn_implementation",
        "_attn_implementation_autoset",
        "torchscript",
        "use_bfloat16",
        "tf_legacy_loss",
        "pruned_heads",
        "tie_word_embeddings",
        "is_decoder",
        "cross_attention_hidden_size",
        "add_cross_attention",
        "tie_encoder_decoder",
        "finetuning_task",
        "tokenizer_class",
        "prefix",
        "bos_token_id",
        "pad_token_id",
        "eos_token_id",
        "sep_token_id",
        "decoder_start_token_id",
        "task_specific_params",
        "max_length",
        "min_length",
        "do_sample",
        "early_stopping",
        "num_beams",
        "num_beam_groups",
        "diversity_penalty",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "num_return_sequences",
        "output_scores",
        "return_dict_in_generate",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "remove_invalid_values",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
    ]
)


class BackboneConfig(Checked):
    """The backbone: a timm model, transformers' ResNet, or another backbone of transformers.

    Args:
        model_type: "timm_backbone", "resnet", or any other that transformers has a backbone for
            ("swin", "convnext", "dinov2", ...), which needs transformers when a model is built.
        **fields: For "timm_backbone": backbone (a timm name), num_channels, features_only,
            use_pretrained_backbone, out_indices, out_features, output_stride,
            freeze_batch_norm_2d; others (`img_size`, `strict_img_size`, ...) are arguments of timm.
            For "resnet": num_channels, embedding_size, hidden_sizes, depths, layer_type,
            hidden_act, downsample_in_first_stage, downsample_in_bottleneck, out_features,
            out_indices, stage_names. For the others: those of transformers' configuration, which
            are checked there. All are kept as attributes and written back.

    transformers 5 ignores `use_pretrained_backbone`; here it is honoured when a model is built from
    a configuration (never when a checkpoint is loaded).

    Raises:
        ValueError, TypeError: A field has a value that cannot be used; the message names it.
    """

    _prefix: ClassVar[str] = "backbone_config."

    model_type: str
    num_channels: PositiveInt = 3
    out_indices: IntList | None = None
    out_features: StrList | None = None
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

    def __init__(self, model_type: str = "timm_backbone", **fields: Any) -> None:
        self.model_type = model_type
        for name, value in (copy.deepcopy(self._DEFAULTS.get(model_type, {})) | fields).items():
            if model_type in self._DEFAULTS:
                setattr(self, name, value)
            else:  # of another class, in which a name may mean something else
                self.__dict__[name] = value
        if model_type == "resnet":
            self._align_stages()
        elif model_type == "timm_backbone" and self.backbone is None:
            refuse("backbone_config.backbone", "the name of a timm model", None, TypeError)

    @classmethod
    def of(cls, value: Any) -> Self:
        """Copy a `BackboneConfig`, a transformers config, or a dict with `model_type`."""
        fields = value.to_dict() if hasattr(value, "to_dict") else value
        if not isinstance(fields, dict):
            refuse("backbone_config", "a dict or a configuration object", value, TypeError)
        if fields.get("model_type") is None:
            kinds = "'timm_backbone', 'resnet' or a backbone of transformers"
            refuse("backbone_config.model_type", kinds, None)
        return cls(**copy.deepcopy(fields))

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

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "model_type" and value != self.__dict__.get(name, value):
            refuse("backbone_config.model_type", f"{self.model_type!r}, as it was made", value)
        super().__setattr__(name, value)

    @property
    def is_foreign(self) -> bool:
        """Whether the backbone is one of transformers', neither timm's nor this package's."""
        return self.model_type not in self._DEFAULTS

    @property
    def timm_arguments(self) -> dict[str, Any]:
        """Arguments for timm besides name, channels and indices, as far as they are given."""
        fields = self._DEFAULTS["timm_backbone"].keys() | _OF_EVERY_CONFIG
        given = {k: v for k, v in self.__dict__.items() if k not in fields}
        stride = {} if self.output_stride is None else {"output_stride": self.output_stride}
        return stride | given

    @property
    def timm_kwargs(self) -> dict[str, Any] | None:
        """Keyword arguments for timm (`backbone_kwargs` in transformers 4); None for a ResNet."""
        if self.model_type != "timm_backbone":
            return None
        return {
            "out_indices": list(self.out_indices or ()),
            "in_chans": self.num_channels,
            **self.timm_arguments,
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


def override_backbone(given: BackboneConfig, v4: dict[str, Any], dilation: bool | None) -> Any:
    """Return the fields of a backbone with keywords of v4 applied on top.

    Args:
        given: The configuration of the file.
        v4: As in `make_backbone`.
        dilation: Whether the last stage is dilated instead of strided; None leaves it as it is.

    Raises:
        ValueError: The keywords ask for another kind of backbone than the file has.
    """
    is_timm = given.model_type == "timm_backbone"
    if v4.get("use_timm_backbone", is_timm) != is_timm:
        refuse("use_timm_backbone", f"{is_timm}, as in the file", not is_timm)
    changes = dict(v4.get("backbone_kwargs") or {})
    changes |= {k: v for k, v in v4.items() if k not in ("use_timm_backbone", "backbone_kwargs")}
    if "in_chans" in changes:
        changes["num_channels"] = changes.pop("in_chans")
    if dilation is not None and is_timm:
        changes.setdefault("output_stride", 16 if dilation else None)
    return given.merged(changes)
