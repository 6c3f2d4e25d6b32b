"""Choice of the implementation that runs an operator, with the reason.

An operator has a table of implementations, best first, that ends with its PyTorch reference.
`backend="auto"` takes the first one that supports the arguments and is not opt-in. An
implementation that is asked for by name and cannot run raises `RuntimeError` with the reason: a
request is never answered silently by another implementation.

The environment variable `CDETR_FAST_BACKEND` names the implementation, opt-in or not, that "auto"
takes wherever it can run. It is read once, when this module is imported.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

BACKENDS = ("auto", "torch", "triton", "native")
"""Values of `backend`. "cuda" is accepted too: "native", for tensors on a GPU only."""


def _preference() -> str:
    name = os.environ.get("CDETR_FAST_BACKEND", "auto")
    if name not in BACKENDS:
        raise ValueError(f"CDETR_FAST_BACKEND: expected one of {BACKENDS}, got {name!r}")
    return name


PREFERRED = _preference()


@dataclass(frozen=True)
class Choice:
    """The implementation that `backend="auto"` takes for one operator, and the reason."""

    op: str
    path: str
    reason: str


def _supports_everything(*_: Any) -> None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One implementation of an operator.

    Args:
        run: Takes the operator's arguments.
        unsupported_reason: Returns why it cannot run on the operator's arguments, None if it can.
            It is called in every call, so it has to be cheap. With the first argument alone it
            answers for the device.
        opt_in_reason: Why "auto" skips it; it then runs only when asked for by name.
        opt_in_device: Type of the devices that `opt_in_reason` is limited to; None is all.
    """

    run: Callable[..., Any]
    unsupported_reason: Callable[..., str | None] = _supports_everything
    opt_in_reason: str | None = None
    opt_in_device: str | None = None


@dataclass(frozen=True)
class Operator:
    """One operator and its implementations.

    Args:
        name: Public name of the operator.
        implementations: Implementations by backend name, best first.
    """

    name: str
    implementations: dict[str, Implementation]

    def __call__(self, backend: str, *args: Any) -> Any:
        """Run the implementation that `backend` names.

        Raises:
            ValueError: `backend` is not one of `BACKENDS`.
            RuntimeError: The implementation was asked for by name and this build does not have it,
                or it cannot run on these tensors.
        """
        if backend == "auto":
            return self.implementations[self._select(*args)].run(*args)
        requested = backend
        if backend == "cuda":
            backend = "native"
        if backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
        if backend not in self.implementations:
            reason: str | None = self._missing_reason(backend)
        else:
            reason = self.implementations[backend].unsupported_reason(*args)
        if reason is None and requested == "cuda" and _device_type(args[0]) != "cuda":
            reason = f"the tensors are on {_device_type(args[0])}"
        if reason is not None:
            raise RuntimeError(f"{self.name}: backend {requested!r} cannot run: {reason}")
        return self.implementations[backend].run(*args)

    def supported(self, tensor: torch.Tensor) -> list[str]:
        """Return the backends that can run where a tensor is."""
        return [
            name
            for name, implementation in self.implementations.items()
            if implementation.unsupported_reason(tensor) is None
        ]

    def choice(self, device: torch.device | str = "cpu") -> Choice:
        """Return the implementation that "auto" takes for fp32 tensors on a device, and why."""
        tensor = torch.empty(0, device=device)
        selected = self._select(tensor)
        if selected == PREFERRED:
            return Choice(self.name, selected, f"CDETR_FAST_BACKEND={PREFERRED}")
        reasons = []
        for name in BACKENDS[2:]:
            if name == selected:
                reasons.append(f"{name} runs on {tensor.device.type}")
            elif name not in self.implementations:
                reasons.append(self._missing_reason(name))
            else:
                implementation = self.implementations[name]
                reason = implementation.unsupported_reason(tensor)
                if reason is None and implementation.opt_in_device in (None, tensor.device.type):
                    reason = implementation.opt_in_reason
                reasons.append(f"not {name}: {reason or 'slower here'}")
        return Choice(self.name, selected, "; ".join(reasons))

    def _select(self, *args: Any) -> str:
        preferred = self.implementations.get(PREFERRED)
        if preferred is not None and preferred.unsupported_reason(*args) is None:
            return PREFERRED
        # Written for speed, as it runs in every call: the device's name is looked up only where
        # an implementation is opt-in on some devices.
        for name, implementation in self.implementations.items():
            if implementation.opt_in_reason is not None and (
                implementation.opt_in_device is None
                or implementation.opt_in_device == _device_type(args[0])
            ):
                continue
            if implementation.unsupported_reason(*args) is None:
                return name
        raise AssertionError(f"{self.name}: expected the last implementation to run everywhere")

    def _missing_reason(self, backend: str) -> str:
        return f"this version of cdetr_kernels has no {backend} path for {self.name}"


def _device_type(first: torch.Tensor | Sequence[torch.Tensor]) -> str:
    """Return the device type of an operator's first argument: a tensor, or images."""
    return (first if isinstance(first, torch.Tensor) else first[0]).device.type
