"""Backbones of transformers (`AutoBackbone`) in this package's models, and their checkpoints."""

from typing import Any

import torch
from torch import Tensor

from cdetr_fast.common.errors import first_line
from cdetr_fast.common.validation import did_you_mean
from cdetr_fast.models.feature_maps import FeatureBackbone, dependencies, probe

try:
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING_NAMES
except ImportError as error:
    raise ImportError(
        "backbone_config: a backbone that is neither timm's nor 'resnet' is one of transformers', "
        "which cannot be imported; pip install 'cdetr-fast[transformers]'"
    ) from error

_PROBE = (128, 160)
_MAP_DIMENSIONS = 4
_CHANNELS = 3  # of images, where a configuration does not say (TextNet)


def build_backbone(fields: dict[str, Any]) -> FeatureBackbone:
    """Return the backbone of a configuration, with transformers' initial weights.

    Args:
        fields: Of the backbone's configuration, `model_type` among them.

    Raises:
        ValueError: transformers has no such backbone, or does not take the fields.
    """
    module = _make(fields)
    every = frozenset(name for name, _ in module.named_parameters())
    channels = getattr(module.config, "num_channels", _CHANNELS)
    try:
        with torch.device("meta"):
            blueprint = _make(fields).eval()
            all_maps = _with_all_maps(fields, module.stage_names).eval()
        maps, size = _run(blueprint, channels)
    except ValueError:  # some make tensors on the CPU, such as LW-DETR's
        blueprint = _make(fields).eval()
        all_maps = _with_all_maps(fields, module.stage_names).eval()
        maps, size = _run(blueprint, channels)
    _check_maps(module, maps)
    early = [x for x in probe(all_maps, channels, size) if size[0] // x.shape[-2] <= 4]
    return FeatureBackbone(
        module,
        list(module.channels),
        early=dependencies(all_maps, early[-1:]),
        unread_by_last=every - dependencies(blueprint, maps[-1:]),
        unread=every - dependencies(blueprint, maps),
        image_size=None if size == _PROBE else size,
    )


def _check_maps(module: Any, maps: list[Tensor]) -> None:
    """Refuse a backbone whose output is not what transformers' models read of it."""
    shapes = [tuple(x.shape) for x in maps]
    if any(len(x) != _MAP_DIMENSIONS for x in shapes) or [x[1] for x in shapes] != module.channels:
        raise ValueError(
            "backbone_config: expected a backbone that returns maps [B, C, H, W] with C of its "
            f"channels, {module.channels}, got {type(module).__name__}, which returns {shapes}"
        )


def _run(blueprint: Any, channels: int) -> tuple[list[Tensor], tuple[int, int]]:
    """Return the maps of a backbone on the meta device, and the size of the image."""
    own = getattr(blueprint.config, "image_size", None) or _PROBE
    own = (own, own) if isinstance(own, int) else tuple(own)
    for size in (_PROBE, own):
        try:
            return probe(blueprint, channels, size), size
        except Exception as error:  # transformers' code, which may do anything
            reason = error
    raise ValueError(
        f"backbone_config: expected a backbone that runs, got {type(blueprint).__name__}, which "
        f"says for images of {own[0]}x{own[1]}: {first_line(reason)}"
    ) from reason


def _make(fields: dict[str, Any]) -> Any:
    kind = fields["model_type"]
    if kind not in MODEL_FOR_BACKBONE_MAPPING_NAMES:
        close = did_you_mean(kind, MODEL_FOR_BACKBONE_MAPPING_NAMES)
        raise ValueError(
            "backbone_config.model_type: expected 'timm_backbone', 'resnet' or a backbone of "
            f"transformers, got {kind!r}{close}"
        )
    # The dtype is that of the model around it.
    fields = {name: value for name, value in fields.items() if name not in ("dtype", "torch_dtype")}
    try:
        config = CONFIG_MAPPING[kind].from_dict(fields)
        return transformers.AutoBackbone.from_config(config)
    except (AttributeError, KeyError, TypeError, ValueError, StrictDataclassError) as error:
        raise ValueError(
            f"backbone_config: expected the fields of a backbone of type {kind!r}, for which "
            f"transformers says: {first_line(error)}"
        ) from error


def _with_all_maps(fields: dict[str, Any], stages: list[str]) -> Any:
    try:
        return _make(fields | _outputs(stages, 0))
    except ValueError:  # MaskFormer's Swin has a stem, but does not return it
        return _make(fields | _outputs(stages, 1))


def _outputs(stages: list[str], first: int) -> dict[str, Any]:
    return {"out_features": stages[first:], "out_indices": list(range(first, len(stages)))}


def names_in_memory(
    model_class: str, fields: dict[str, Any], state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Rename (and split or join) the weights of a checkpoint as transformers does on loading.

    transformers has renamed the parts of some backbones, and writes checkpoints by the old names.

    Args:
        model_class: Name of the class that the checkpoint is of.
        fields: The model's configuration.
        state_dict: Weights, by the names on disk.
    """
    config = _model_config(fields)
    model, report = getattr(transformers, model_class).from_pretrained(
        None,
        config=config,
        state_dict=state_dict,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    # What it did not find keeps its name, for our own report.
    absent = set(report["missing_keys"]) | {key for key, *_ in report["mismatched_keys"]}
    named = {key: tensor for key, tensor in model.state_dict().items() if key not in absent}
    return named | {key: state_dict[key] for key in report["unexpected_keys"] if key in state_dict}


def names_on_disk(
    model_class: str, fields: dict[str, Any], state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Rename weights as transformers does on saving; the reverse of `names_in_memory`."""
    with torch.device("meta"):
        model = getattr(transformers, model_class)(_model_config(fields))
    named: dict[str, Tensor] = revert_weight_conversion(model, state_dict)
    return named


def _model_config(fields: dict[str, Any]) -> Any:
    """Return transformers' configuration, without loss weights, which may be floats here."""
    kept = {k: v for k, v in fields.items() if not k.endswith(("_cost", "_coefficient"))}
    return transformers.ConditionalDetrConfig.from_dict(kept)
