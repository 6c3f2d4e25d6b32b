"""Check of whether a model is what its classes and its configuration say.

Transformations read weights past the modules that hold them. So a module with something attached (a
hook, an adapter, a parametrisation, a `forward` of its own) is refused by name, and a part that was
replaced runs as it is.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]  # unlisted

from cdetr_fast.models.projections import PLAIN_TENSORS

_KNOWN_PACKAGES = ("torch", "timm", "cdetr_fast", "transformers")
_CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)


def unsupported_reason(
    model: nn.Module, is_harmless: Callable[[Any], bool], own_hooks: bool = True
) -> str | None:
    """Name a module that does more than its class says, and what to do; None if none does.

    Args:
        model: The model.
        is_harmless: Whether a forward hook may go uncalled.
        own_hooks: Name the model itself for its hooks, too.
    """
    for name, part in model.named_modules():
        name = name or "model"
        if _package(type(part)) == "peft":
            return f"{name} is an adapter ({_kind(part)}); merge it first (merge_and_unload)"
        if "forward" in vars(part):
            return f"{name} has a forward of its own; delete it, or use the model as it is"
        hooks = forward_hooks(part) if own_hooks or part is not model else []
        if not all(is_harmless(hook) for hook in hooks):
            return f"{name} has a forward hook; remove it, or use the model as it is"
        if _is_changed(part):
            return f"{name} is a {_kind(part)}; replace it by the plain layer that it stands for"
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            if isinstance(tensor, UninitializedTensorMixin):
                return f"{name} has a weight that is not initialised; call the model once"
            if tensor is not None and type(tensor) not in PLAIN_TENSORS:
                return f"{name} has a weight of type {type(tensor).__name__}; use a plain tensor"
    return None


@torch.no_grad()
def nan_reason(model: nn.Module) -> str | None:
    """Name a tensor of a model that has NaN, such as after a training that diverged; or None.

    On CPUs a convolution or product that is fused with its ReLU makes 0 of NaN, so that what the
    model predicts would look sound. Costs a pass over the weights, and waits for the device once.
    """
    tensors = {name: x for name, x in model.state_dict().items() if x.is_floating_point()}
    device = next(iter(tensors.values())).device
    sums = [x.sum(dtype=torch.float32).to(device) for x in tensors.values()]
    for name, is_nan in zip(tensors, torch.stack(sums).isnan().tolist(), strict=True):
        if is_nan:
            return f"{name} has NaN; load weights of a training that did not diverge"
    return None


def forward_hooks(module: nn.Module) -> list[Any]:
    """Return the hooks of a module that its call runs before and after its forward."""
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


def _is_changed(part: nn.Module) -> bool:
    """Return whether a module's class is derived from one that transformations look for."""
    if isinstance(part, nn.Linear) and type(part) is not nn.Linear:
        return True
    if torch.nn.utils.parametrize.is_parametrized(part):
        return True
    return _package(type(part)) not in _KNOWN_PACKAGES and any(
        _package(base) in _KNOWN_PACKAGES and base not in _CONTAINERS for base in type(part).__mro__
    )


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def _kind(part: nn.Module) -> str:
    return f"{_package(type(part))} {type(part).__name__}"


def first_difference(
    part: nn.Module, expected: Callable[[Any], nn.Module], config: Any, settings: bool = False
) -> str | None:
    """Return where a part differs from what its configuration builds, or None.

    Args:
        part: Part of a model.
        expected: Builds the part.
        config: The model's configuration.
        settings: Also compare what the modules are set to, such as strides and scales.
    """
    with torch.device("meta"):
        blueprint = dict(expected(config).named_modules())
    modules = dict(part.named_modules())
    for name, module in modules.items():
        if name not in blueprint:
            return f"{name} is an additional {type(module).__name__}"
        if type(module) is not type(blueprint[name]):
            kind = type(blueprint[name]).__name__
            return f"{name} is a {type(module).__name__}, not a {kind}"
        if _shapes(module) != _shapes(blueprint[name]):
            return f"{name} is not of the shape that the configuration says"
        if settings and (change := _changed_setting(module, blueprint[name])) is not None:
            return f"{name}.{change}" if name else change
    missing = blueprint.keys() - modules.keys()
    return f"{min(missing)} is missing" if missing else None


def _shapes(module: nn.Module) -> list[torch.Size]:
    return [parameter.shape for parameter in module.parameters(recurse=False)]


_SETTING = (bool, int, float, str, tuple, type(None))
_NOT_AT_INFERENCE = ("drop", "checkpointing", "training", "inplace")
"""Parts of the names of settings that decide nothing in an evaluation."""


def _changed_setting(module: nn.Module, built: nn.Module) -> str | None:
    """Return which setting of a module differs from that of the module built for comparison."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return None
    for name, expected in vars(built).items():
        if name.startswith("_") or any(part in name for part in _NOT_AT_INFERENCE):
            continue
        found = vars(module).get(name)
        if isinstance(expected, _SETTING) and isinstance(found, _SETTING) and found != expected:
            return f"{name} is {found!r}, not {expected!r} as the configuration says"
    return None
