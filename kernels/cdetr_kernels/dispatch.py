"""Which implementation of an operator runs, and why.

Each operator has a table of paths, best first, that ends with its PyTorch reference.
`backend="auto"` takes the first one that can run on the tensors and is not held back; a path that
is asked for by name and cannot run raises `RuntimeError` with the reason, so a request is never
answered by another path in silence.

The environment variable `CDETR_FAST_BACKEND` names a path that "auto" takes, held back or not,
wherever it can run; it is read once, when this module is imported.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

BACKENDS = ("auto", "torch", "triton", "native")
"""What `backend` may be, and "cuda", which is "native" for tensors on a GPU only."""


def _preference() -> str:
    name = os.environ.get("CDETR_FAST_BACKEND", "auto")
    if name not in BACKENDS:
        raise ValueError(f"CDETR_FAST_BACKEND: expected one of {BACKENDS}, got {name!r}")
    return name


PREFERRED = _preference()


@dataclass(frozen=True)
class Choice:
    """The path that `backend="auto"` takes for one operator, and the reason."""

    op: str
    path: str
    reason: str


@dataclass(frozen=True)
class Path:
    """One implementation of an operator.

    Args:
        run: Takes the operator's arguments.
        reason_against: Says why it cannot run on the operator's arguments, None if it can. It is
            called in every call, so it has to be cheap; and with the first argument alone, to say
            what runs on a device.
        held_back: Why "auto" does not take it; it then runs only when asked for by name.
        held_back_on: Type of the devices that `held_back` is about; None is all.
    """

    run: Callable
    reason_against: Callable[..., str | None] = lambda *_: None
    held_back: str | None = None
    held_back_on: str | None = None

    def reason_to_hold_back(self, device_type: str) -> str | None:
        """Says why "auto" does not take it on a device."""
        return self.held_back if self.held_back_on in (None, device_type) else None


@dataclass(frozen=True)
class Operator:
    """One operator and its implementations.

    Args:
        name: Public name of the operator.
        paths: Implementations by backend name, best first.
    """

    name: str
    paths: dict[str, Path] = field(default_factory=dict)

    def __call__(self, backend: str, *args):
        """Runs the path that `backend` names.

        Raises:
            ValueError: `backend` is not one of `BACKENDS`.
            RuntimeError: The path was asked for by name and this build does not have it, or it
                cannot run on these tensors.
        """
        if backend == "auto":
            return self.paths[self._best(*args)].run(*args)
        asked_for = backend
        if backend == "cuda":
            backend = "native"
        if backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
        if backend not in self.paths:
            reason = self._absence(backend)
        else:
            reason = self.paths[backend].reason_against(*args)
        if reason is None and asked_for == "cuda" and _device_type(args[0]) != "cuda":
            reason = f"the tensors are on {_device_type(args[0])}"
        if reason is not None:
            raise RuntimeError(f"{self.name}: backend {asked_for!r} cannot run: {reason}")
        return self.paths[backend].run(*args)

    def choice(self, device: torch.device | str = "cpu") -> Choice:
        """Returns the path that "auto" takes for fp32 tensors on a device, with the reason."""
        tensor = torch.empty(0, device=device)
        best = self._best(tensor)
        if best == PREFERRED:
            return Choice(self.name, best, f"CDETR_FAST_BACKEND={PREFERRED}")
        reasons = []
        for name in BACKENDS[2:]:
            if name == best:
                reasons.append(f"{name} runs on {tensor.device.type}")
            elif name not in self.paths:
                reasons.append(self._absence(name))
            else:
                path = self.paths[name]
                reason = path.reason_against(tensor)
                reason = reason or path.reason_to_hold_back(tensor.device.type)
                reasons.append(f"not {name}: {reason or 'slower here'}")
        return Choice(self.name, best, "; ".join(reasons))

    def _best(self, *args) -> str:
        preferred = self.paths.get(PREFERRED)
        if preferred is not None and preferred.reason_against(*args) is None:
            return PREFERRED
        # Written for speed, as it runs in every call: no device is asked for its name in vain.
        for name, path in self.paths.items():
            if path.held_back is not None and (
                path.held_back_on is None or path.held_back_on == _device_type(args[0])
            ):
                continue
            if path.reason_against(*args) is None:
                return name
        raise AssertionError(f"{self.name}: the last path runs everywhere")

    def _absence(self, backend: str) -> str:
        return f"this version of cdetr_kernels has no {backend} path for {self.name}"


def _device_type(first: torch.Tensor | Sequence[torch.Tensor]) -> str:
    """Of an operator's first argument: a tensor, or images."""
    return (first if isinstance(first, torch.Tensor) else first[0]).device.type


def report(device: torch.device | str = "cpu") -> list[Choice]:
    """Returns the path that "auto" takes on a device, and why, for every operator."""
    from cdetr_kernels.ops import OPERATORS

    return [operator.choice(device) for operator in OPERATORS]
