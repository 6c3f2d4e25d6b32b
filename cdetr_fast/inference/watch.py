"""Notices that a model is no longer the one that something was prepared from."""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class Watch:
    """Remembers a module's tensors, submodules and settings, and says what has changed since.

    Versions and addresses are compared, and on a CPU some values of each tensor, as what is written
    through `.data` or numpy counts no version. Asking costs 0.2 ms for a ResNet-50 model, and never
    waits for a device.

    Args:
        module: The module.
        settings: Other values that matter, by name, read anew at each question; None has none.
        contents: Also notice writes to tensors, not only other tensors and modules.
    """

    def __init__(
        self, module: nn.Module, settings: "Settings | None" = None, contents: bool = True
    ) -> None:
        self._settings = settings
        self._values = None if settings is None else settings.read()
        self._states: list[dict[str, Any]] = []
        self._owners: list[dict] = []  # of each member, with its name there
        self._names: list[str] = []
        self._members: list[nn.Module | Tensor] = []
        for part in module.modules():
            self._states.append(part.__dict__)
            for owner in (part._modules, part._parameters, part._buffers):
                members = {name: x for name, x in owner.items() if x is not None}
                self._owners += [owner] * len(members)
                self._names += members
                self._members += members.values()
        self._tensors = [x for x in self._members if isinstance(x, Tensor)]
        self._counting: list[Tensor] = []
        self._samples: list[np.ndarray] = []
        if contents:
            # Tensors made in inference mode count no versions.
            self._counting = [x for x in self._tensors if not x.is_inference()]
            self._samples = [view for x in self._tensors if (view := _sample(x)) is not None]
        self._marks = self._read()

    def _read(self) -> tuple[list, ...]:
        return (
            [tensor._version for tensor in self._counting],
            list(map(Tensor.data_ptr, self._tensors)),
            [view.tobytes() for view in self._samples],
        )

    def change(self) -> str | None:
        """Says what has changed since, or returns None."""
        if not all(map(operator.is_, map(dict.get, self._owners, self._names), self._members)):
            return "a module or tensor is another one"
        if self._read() != self._marks:
            return "a tensor has been written to"
        if self._settings is not None and self._settings.read() != self._values:
            return "the configuration has changed"
        return None

    def attachment(self, is_harmless: Callable[[Callable], bool]) -> str | None:
        """Says that a submodule has a hook (but a harmless one) or is in training mode, or None."""
        for state in self._states[1:]:  # the model's own hooks run whatever its forward does
            hooks = (*state["_forward_hooks"].values(), *state["_forward_pre_hooks"].values())
            if not all(map(is_harmless, hooks)):
                return "a submodule has a forward hook"
            if state["training"]:
                return "a submodule is in training mode"
        return None


class Settings:
    """Fields of a configuration that decide what is computed."""

    _FIELDS = ("auxiliary_loss", "compat")

    def __init__(self, config: Any) -> None:
        self._config = config

    def read(self) -> tuple[Any, ...]:
        return tuple(getattr(self._config, field, None) for field in self._FIELDS)


# Values of a tensor: what writes past autograd, an optimiser or an average, writes all of them.
_SAMPLED = 4
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _sample(tensor: Tensor) -> np.ndarray | None:
    """A view of the bits of some values, spread over a tensor's memory; None if not on a CPU."""
    integers = _INTEGERS.get(tensor.element_size())
    if not tensor.is_cpu or tensor.numel() == 0 or integers is None:
        return None
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in strides)
    count = min(_SAMPLED, last + 1)
    step = max(1, last // max(1, count - 1))
    return tensor.detach().as_strided((count,), (step,)).view(integers).numpy()


def attached(module: nn.Module, is_harmless: Callable[[Callable], bool]) -> str | None:
    """Names a submodule that does more than its class says: a hook, an adapter, a new forward."""
    for name, part in module.named_modules():
        if "forward" in vars(part):
            return f"{name or 'model'} has a forward of its own"
        if not all(
            map(is_harmless, (*part._forward_hooks.values(), *part._forward_pre_hooks.values()))
        ):
            return f"{name or 'model'} has a forward hook"
        if isinstance(part, nn.Linear) and type(part) is not nn.Linear:
            return f"{name} is a {type(part).__name__}"
        for parameter in part._parameters.values():
            if parameter is not None and type(parameter) not in (nn.Parameter, Tensor):
                return f"{name} has a weight of type {type(parameter).__name__}"
            if isinstance(parameter, torch.nn.parameter.UninitializedTensorMixin):
                return f"{name} has a weight that is not initialised"
    return None
