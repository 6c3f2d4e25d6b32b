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


def unsupported_reason(model: nn.Module, is_harmless: Callable[[Any], bool]) -> str | None:
    """Name a module that does more than its class says, and what to do; None if none does.

    Args:
        model: The model.
        is_harmless: Whether a forward hook may go uncalled.
    """
    for name, part in model.named_modules():
        name = name or "model"
        if _package(type(part)) == "peft":
            return f"{name} is an adapter ({_kind(part)}); merge it first (merge_and_unload)"
        if "forward" in vars(part):
            return f"{name} has a forward of its own; delete it, or use the model as it is"
        if not all(is_harmless(hook) for hook in forward_hooks(part)):
            return f"{name} has a forward hook; remove it, or use the model as it is"
        if _is_changed(part):
            return f"{name} is a {_kind(part)}; replace it by the plain layer that it stands for"
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            if isinstance(tensor, UninitializedTensorMixin):
                return f"{name} has a weight that is not initialised; call the model once"
            if tensor is not None and type(tensor) not in PLAIN_TENSORS:
                return f"{name} has a weight of type {type(tensor).__name__}; use a plain tensor"
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
    part: nn.Module, expected: Callable[[Any], nn.Module], config: Any
) -> str | None:
    """Say where a part has other modules than its configuration builds; None if it has not.

    Args:
        part: Part of a model.
        expected: Builds the part.
        config: The model's configuration.
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
    missing = blueprint.keys() - modules.keys()
    return f"{min(missing)} is missing" if missing else None


def _shapes(module: nn.Module) -> list[torch.Size]:
    return [parameter.shape for parameter in module.parameters(recurse=False)]
