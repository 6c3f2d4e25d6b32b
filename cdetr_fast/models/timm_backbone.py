"""timm's models as backbones: made with the arguments of a configuration, for images of any size.

Models with a fixed image size (Swin, ViT, EVA, ...) get timm's options for others where it has
them, and images are padded to the multiples that a model runs at. What works is found by runs on
the meta device, which compute nothing.
"""

import functools
from collections.abc import Collection
from typing import Any, NamedTuple

import timm
import torch
from timm.models.efficientnet import EfficientNetFeatures
from timm.models.mobilenetv3 import MobileNetV3Features
from torch import Tensor, nn

from cdetr_fast.common.errors import first_line
from cdetr_fast.common.validation import shortened
from cdetr_fast.config.backbone import BackboneConfig
from cdetr_fast.models.feature_maps import FeatureBackbone, dependencies, probe

# Families that run at any size, as each layer reads the one before it: no need to find that out.
_SIMPLE = {"convnext", "efficientnet", "mobilenetv3", "regnet", "resnet"}
# Options of timm with which models of a fixed size run at others, in the order of preference.
_ANY_SIZE: tuple[dict[str, Any], ...] = (
    {},
    {"dynamic_img_size": True},
    {"strict_img_size": False},
)
_MULTIPLES = (1, 4, 8, 14, 16, 32, 64)
_PROBE = (97, 131)
# High-resolution nets keep a map at stride 4 to the end; the part before they branch counts.
_EARLY_PARTS = {"hrnet": ("conv1", "bn1", "conv2", "bn2", "layer1")}


class _Traits(NamedTuple):
    """Traits of a timm model, found by runs on the meta device; names are of parameters.

    Attributes:
        options: Arguments for other image sizes than the model's own.
        multiple: As in `FeatureBackbone`, like the following.
        image_size: The only size.
        early: Up to stride 4.
        unread_by_last: Not behind the coarsest map.
        unread: Behind no map.
    """

    options: dict[str, Any]
    multiple: int
    image_size: tuple[int, int] | None
    early: frozenset[str]
    unread_by_last: frozenset[str]
    unread: frozenset[str]


def build_timm(config: BackboneConfig, paper: bool) -> FeatureBackbone:
    """Return the timm model of a configuration.

    Args:
        config: Of `model_type="timm_backbone"`.
        paper: Take the default `out_indices` for the four coarsest maps of a backbone that has no
            stem among its maps, and drop blocks that nothing reads; transformers does neither.

    Raises:
        ValueError: timm does not have the model, or it does not take these arguments, has no
            feature maps, or runs at one image size that the arguments do not name.
    """
    name = config.backbone
    if name is None or not timm.is_model(name):
        raise ValueError(f"backbone: expected the name of a timm model, got {name!r}")
    arguments = config.timm_arguments
    out_indices = tuple(config.out_indices or (-1,))
    if paper:
        out_indices = _available_indices(name, out_indices)
    family = timm.model_entrypoint(name).__module__.rpartition(".")[2]
    extra = arguments.keys() - {"output_stride"}
    traits = None
    if family not in _SIMPLE or extra:
        traits = _traits(name, config.num_channels, out_indices, arguments)
        arguments = traits.options | arguments
    try:
        module = timm.create_model(
            name,
            pretrained=config.use_pretrained_backbone,
            features_only=True,
            in_chans=config.num_channels,
            out_indices=out_indices,
            **arguments,
        )
    except (AssertionError, IndexError, KeyError, RuntimeError, TypeError) as error:
        raise _cannot_build(name, arguments | {"out_indices": out_indices}, error) from error
    if paper:
        _drop_unread_blocks(module)
    channels = _feature_info(module).channels()
    if traits is None:
        unread = _behind_the_last_map(module)
        return FeatureBackbone(module, channels, _early_by_name(module), unread, unread)
    early = _early_by_name(module) or traits.early
    if family in _EARLY_PARTS:
        early = _parameters_in(module, _EARLY_PARTS[family])
    return FeatureBackbone(
        module,
        channels,
        early,
        traits.unread_by_last,
        traits.unread,
        traits.multiple,
        traits.image_size,
    )


def _available_indices(name: str, out_indices: tuple[int, ...]) -> tuple[int, ...]:
    """Shift the default `[1, 2, 3, 4]`, which counts a stem that not every backbone reports."""
    if out_indices != (1, 2, 3, 4):
        return out_indices
    stages = _stage_count(name)
    return tuple(index + stages - 5 for index in out_indices) if stages == 4 else out_indices


@functools.cache
def _stage_count(name: str) -> int:
    return len(_feature_info(_without_weights(name, 3, None, {})).info)


def _without_weights(
    name: str,
    channels: int,
    out_indices: tuple[int, ...] | None,
    arguments: dict[str, Any],
    device: str = "meta",
) -> nn.Module:
    """Make a model whose weights do not count, in eval mode.

    On a CPU instead of the meta device, if timm computes while it builds, as older releases do.
    """
    chosen: dict[str, Any] = {} if out_indices is None else {"out_indices": out_indices}
    try:
        with torch.device(device), torch.random.fork_rng(devices=[]):
            model = timm.create_model(
                name, pretrained=False, features_only=True, in_chans=channels, **chosen, **arguments
            )
    except (AssertionError, IndexError, KeyError, RuntimeError, TypeError) as error:
        if device == "meta" and "meta" in str(error).lower():
            return _without_weights(name, channels, out_indices, arguments, "cpu")
        raise _cannot_build(name, arguments | chosen, error) from error
    return model.eval()


def _cannot_build(name: str, arguments: dict[str, Any], error: Exception) -> ValueError:
    return ValueError(
        f"backbone: expected a feature backbone of timm and arguments that it takes, got {name!r} "
        f"with {shortened(arguments)}, where timm says: {_told(error)}"
    )


def _told(error: Exception | None) -> str:
    return f"{type(error).__name__}: {first_line(error or '')}".removesuffix(": ")


_KNOWN_TRAITS: dict[str, _Traits] = {}


def _traits(
    name: str, channels: int, out_indices: tuple[int, ...], given: dict[str, Any]
) -> _Traits:
    """Return what runs on the meta device tell, which takes seconds, once per process."""
    key = repr((name, channels, out_indices, sorted(given.items())))
    if key not in _KNOWN_TRAITS:
        _KNOWN_TRAITS[key] = _find_traits(name, channels, out_indices, given)
    return _KNOWN_TRAITS[key]


def _find_traits(
    name: str, channels: int, out_indices: tuple[int, ...], given: dict[str, Any]
) -> _Traits:
    """Find the options with which a model runs at any size, and what its maps depend on."""
    native = _native_size(name, given)
    reasons: list[Exception] = []
    for device in ("meta", "cpu"):
        for options in _ANY_SIZE:
            if options and options.keys() <= given.keys():
                continue  # the caller has decided
            try:
                model = _without_weights(name, channels, out_indices, options | given, device)
            except ValueError:  # the family does not have this option
                if not options:
                    raise
                continue
            for multiple in dict.fromkeys((*_MULTIPLES, *native)):
                height, width = (-(-size // multiple) * multiple for size in _PROBE)
                size = (height, width if width != height else width + multiple)
                maps = _try(model, channels, size, reasons)
                if maps is not None:
                    early = _early_by_gradients(name, channels, options | given, size, device)
                    return _traits_of(model, maps, early, options, multiple, None)
            if "img_size" in given and (maps := _try(model, channels, native, reasons)) is not None:
                early = _early_by_gradients(name, channels, options | given, native, device)
                return _traits_of(model, maps, early, options, 1, native)
        if not any("meta" in str(reason) for reason in reasons):
            break  # no reason to compute
    raise ValueError(
        f"backbone: expected one that runs at any image size, got {name!r}, which runs at "
        f"{native[0]}x{native[1]} alone ({_told(reasons[-1])}). For images of one size name it: "
        "backbone_kwargs={'img_size': (height, width)}"
    )


def _native_size(name: str, given: dict[str, Any]) -> tuple[int, int]:
    size = given.get("img_size")
    if size is None:
        known = timm.get_pretrained_cfg(name)
        size = known.input_size[1:] if known is not None else (224, 224)
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _try(
    model: nn.Module, channels: int, size: tuple[int, int], reasons: list[Exception]
) -> list[Tensor] | None:
    """Run a model at a size; if it cannot, return None and add the reason."""
    try:
        return probe(model, channels, size)
    except Exception as error:  # the model's own code, which may do anything
        reasons.append(error)
        return None


def _traits_of(
    model: nn.Module,
    maps: list[Tensor],
    early: frozenset[str],
    options: dict[str, Any],
    multiple: int,
    image_size: tuple[int, int] | None,
) -> _Traits:
    every = frozenset(name for name, _ in model.named_parameters())
    unread = (every - dependencies(model, maps[-1:]), every - dependencies(model, maps))
    return _Traits(options, multiple, image_size, early, *unread)


def _early_by_gradients(
    name: str, channels: int, arguments: dict[str, Any], size: tuple[int, int], device: str
) -> frozenset[str]:
    """Return what the last map at stride 4 or finer depends on."""
    # It has the strides of all maps; timm's default maps may be more than a shallow model has.
    blueprint = _without_weights(name, channels, (-1,), arguments, device)
    strides = [info["reduction"] for info in _feature_info(blueprint).info]
    last = max((index for index, stride in enumerate(strides) if stride <= 4), default=None)
    if last is None:
        return frozenset()
    model = _without_weights(name, channels, (last,), arguments, device)
    return dependencies(model, probe(model, channels, size))


def _feature_info(module: nn.Module) -> Any:
    return module.feature_info


def _early_by_name(module: nn.Module) -> frozenset[str]:
    """Return the parameters up to the end of the last module that timm names at stride <= 4."""
    stages = [stage["module"] for stage in _feature_info(module).info if stage["reduction"] <= 4]
    if not stages:
        return frozenset()
    # timm flattens some models, which turns the dots of a stage's name into underscores.
    last = {stages[-1], stages[-1].replace(".", "_")}
    parts = list(module.named_modules())
    ends = [index for index, (name, _) in enumerate(parts) if _is_within(name, last)]
    return frozenset(
        f"{prefix}.{name}" if prefix else name
        for prefix, part in parts[: max(ends, default=-1) + 1]
        for name, _ in part.named_parameters(recurse=False)
    )


def _is_within(name: str, modules: Collection[str]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def _parameters_in(module: nn.Module, parts: Collection[str]) -> frozenset[str]:
    return frozenset(name for name, _ in module.named_parameters() if _is_within(name, parts))


def _behind_the_last_map(module: nn.Module) -> frozenset[str]:
    """Return the parameters of blocks that these classes keep, and compute, for no map."""
    if not isinstance(module, (EfficientNetFeatures, MobileNetV3Features)):
        return frozenset()
    last = max(info["stage"] for info in module.feature_info.get_dicts())
    blocks = {f"blocks.{index}" for index in range(last, len(module.blocks))}
    return _parameters_in(module, blocks)


def _drop_unread_blocks(module: nn.Module) -> None:
    """Drop the blocks behind the last feature map, which cost time."""
    if isinstance(module, (EfficientNetFeatures, MobileNetV3Features)):
        last = max(info["stage"] for info in module.feature_info.get_dicts())
        module.blocks = module.blocks[:last]
