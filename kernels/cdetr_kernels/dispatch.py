"""Choice of the implementation that runs an operator, with the reason.

An operator has a table of implementations, best first, that ends with its PyTorch reference.
`backend="auto"` takes the first one that supports the arguments; one that needs evidence on the
device is taken where a record says that it is right and faster for such calls, see
`cdetr_kernels.evidence`. An implementation that is asked for by name and cannot run raises
`RuntimeError` with the reason: a request is never answered silently by another implementation.

The environment variable `CDETR_FAST_BACKEND` names the implementation, with or without evidence,
that "auto" takes wherever it can run. It is read once, when this module is imported.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from cdetr_kernels.evidence import Evidence, Finding

BACKENDS = ("auto", "torch", "triton", "native")
"""Values of `backend`. "cuda" is accepted too: "native", for tensors on a GPU only."""


def _preference() -> str:
    name = os.environ.get("CDETR_FAST_BACKEND", "auto")
    if name not in BACKENDS:
        raise ValueError(f"CDETR_FAST_BACKEND: expected one of {BACKENDS}, got {name!r}")
    return name


PREFERRED = _preference()


# As triton, which decides when it is imported whether it interprets kernels on a CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Choice:
    """The implementation that `backend="auto"` takes for one kind of calls, and the reasons.

    Args:
        op: Name of the operator.
        path: Name of the implementation.
        reasons: Why it is taken, and others are not; equal ones are equal for all operators.
        calls: Which calls; all if empty.
        figure: What was measured, if anything was.
        date: When.
    """

    op: str
    path: str
    reasons: tuple[str, ...]
    calls: str = ""
    figure: str = ""
    date: str = ""

    @property
    def reason(self) -> str:
        """Return all reasons as a line."""
        return "; ".join(self.reasons)


def _supports_everything(*_: Any) -> None:
    return None


def _no_classes(*_: Any) -> tuple[int, ...]:
    return ()


@dataclass(frozen=True)
class Implementation:
    """One implementation of an operator.

    Args:
        run: Takes the operator's arguments.
        unsupported_reason: Returns why it cannot run on the operator's arguments, None if it can.
            It is called in every call, so it has to be cheap. With the first argument alone it
            answers for the device.
        evidence_on: Types of the devices on which "auto" takes it only where a record says that it
            is right and faster.
    """

    run: Callable[..., Any]
    unsupported_reason: Callable[..., str | None] = _supports_everything
    evidence_on: tuple[str, ...] = ()


@dataclass(frozen=True)
class Operator:
    """One operator and its implementations.

    Args:
        name: Public name of the operator.
        implementations: Implementations by backend name, best first.
        classify: Returns the class of a call, given the operator's arguments: numbers and flags
            that decide which path is the faster one. Calls of one class share their evidence.
        dtype_of: Returns the dtype that a call computes in; None is that of the first tensor.
    """

    name: str
    implementations: dict[str, Implementation]
    classify: Callable[..., tuple[int | bool | str, ...]] = _no_classes
    dtype_of: Callable[..., torch.dtype] | None = None
    _taken: dict[int, dict[tuple[Any, ...], str]] = field(default_factory=dict, compare=False)

    def __call__(self, backend: str, *args: Any) -> Any:
        """Run the implementation that `backend` names.

        Raises:
            ValueError: `backend` is not one of `BACKENDS`.
            RuntimeError: The implementation was asked for by name and this build does not have it,
                or it cannot run on these tensors.
        """
        if backend == "auto":
            return self.implementations[self.select(*args)].run(*args)
        requested = backend
        if backend == "cuda":
            backend = "native"
        if backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
        if backend not in self.implementations:
            reason: str | None = self._missing_reason(backend)
        else:
            reason = self.implementations[backend].unsupported_reason(*args)
        if reason is None and requested == "cuda":
            device_type = _tensor(args[0]).device.type
            reason = None if device_type == "cuda" else f"the tensors are on {device_type}"
        if reason is not None:
            raise RuntimeError(f"{self.name}: backend {requested!r} cannot run: {reason}")
        return self.implementations[backend].run(*args)

    def select(self, *args: Any) -> str:
        """Return the name of the implementation that "auto" takes for these arguments."""
        preferred = self.implementations.get(PREFERRED)
        if preferred is not None and preferred.unsupported_reason(*args) is None:
            return PREFERRED
        # Written for speed, as it runs in every call.
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        device_type = "cpu" if first.is_cpu else "cuda" if first.is_cuda else first.device.type
        if device_type == "cuda" or (INTERPRETED and device_type == "cpu"):
            path = self._by_evidence(first, args)
            if path is not None and self.implementations[path].unsupported_reason(*args) is None:
                return path
        for name, implementation in self.implementations.items():
            if device_type in implementation.evidence_on:
                continue
            if implementation.unsupported_reason(*args) is None:
                return name
        raise AssertionError(f"{self.name}: expected the last implementation to run everywhere")

    def _by_evidence(self, first: Tensor, args: tuple[Any, ...]) -> str | None:
        dtype = first.dtype if self.dtype_of is None else self.dtype_of(*args)
        if torch.compiler.is_compiling():
            backward = torch.is_grad_enabled()
            return _constant_path(self.name, first.device, dtype, backward) or None
        taken = self._taken.get(first.get_device())
        if taken is None:
            taken = self._take(first)
        if not taken:
            return None
        return taken.get((torch.is_grad_enabled(), dtype, self.classify(*args)))

    def _take(self, first: Tensor) -> dict[tuple[Any, ...], str]:
        """Read the evidence about this operator, at its first call."""
        from cdetr_kernels import evidence  # a tenth of the package's import, and CPUs need none

        known = evidence.of(first.device)
        _say_without_record(known, first.device)
        found = {call: x.path for call, x in known.taken(self.name).items()}
        if not any(x.mode == evidence.BACKWARD for x in known.findings(self.name)):
            # It has no gradient, so gradients make no difference.
            found |= {(True, *call): path for (_, *call), path in found.items()}
        self._taken[first.get_device()] = found
        return found

    def supported(self, tensor: torch.Tensor) -> list[str]:
        """Return the backends that can run where a tensor is."""
        return [
            name
            for name, implementation in self.implementations.items()
            if implementation.unsupported_reason(tensor) is None
        ]

    def needs_evidence(self, device_type: str) -> list[str]:
        """Return the implementations that "auto" takes on a device only with evidence."""
        return [x for x, one in self.implementations.items() if device_type in one.evidence_on]

    def choices(self, device: torch.device | str = "cpu") -> list[Choice]:
        """Return what "auto" takes on a device, and why: a line for each kind of calls measured.

        Files are read, but the evidence of this process is not fixed by it.
        """
        tensor = torch.empty(0, device=device)
        where = tensor.device
        preferred = self.implementations.get(PREFERRED)
        if preferred is not None and preferred.unsupported_reason(tensor) is None:
            return [Choice(self.name, PREFERRED, (f"CDETR_FAST_BACKEND={PREFERRED}",))]
        known = None
        if where.type == "cuda" or INTERPRETED:
            from cdetr_kernels import evidence

            known = evidence.peek(where)
        findings = known.findings(self.name) if known is not None else []
        if findings and known is not None:
            taken = set(map(id, known.taken(self.name).values()))
            return [_choice_of(x, id(x) in taken) for x in findings]
        selected = next(
            name
            for name, one in self.implementations.items()
            if where.type not in one.evidence_on and one.unsupported_reason(tensor) is None
        )
        reasons = []
        for name in BACKENDS[2:]:
            if name == selected:
                reasons.append(f"{name} runs on {where.type}")
            elif name not in self.implementations:
                reasons.append(self._missing_reason(name))
            else:
                reason = self.implementations[name].unsupported_reason(tensor)
                if reason is None and known is not None:
                    reason = f"{known.source}; `cdetr-fast qualify` makes a record"
                reasons.append(f"not {name}: {reason or 'slower here'}")
        return [Choice(self.name, selected, tuple(reasons))]

    def choice(self, device: torch.device | str = "cpu") -> Choice:
        """Return the first line of `choices`."""
        return self.choices(device)[0]

    def _missing_reason(self, backend: str) -> str:
        return f"this version of cdetr_kernels has no {backend} path for it"


def _choice_of(finding: "Finding", is_taken: bool) -> Choice:
    from cdetr_kernels.evidence import RIGHT

    speed_up, path = finding.speed_up, finding.path
    if is_taken:
        reason = f"{path} is right, and the fastest here"
    elif finding.verdict != RIGHT:
        reason = f"not {path}: {finding.verdict}" + f" ({finding.reason})" * bool(finding.reason)
    else:
        reason = f"not {path}: right, but not faster" if speed_up else f"not {path}: not timed"
    figure = "" if speed_up is None else f"{finding.ms:.4f} ms, {speed_up:.2f} times as fast"
    calls = f"{finding.dtype} {finding.label}, {finding.mode}"
    taken = path if is_taken else "torch"
    return Choice(finding.operator, taken, (reason,), calls, figure, finding.date)


@torch.compiler.assume_constant_result
def _constant_path(name: str, device: torch.device, dtype: torch.dtype, backward: bool) -> str:
    """Return the path that a graph takes for calls of any size, "" if evidence names none."""
    from cdetr_kernels import evidence

    known = evidence.of(device)
    _say_without_record(known, device)
    found = known.constant(name, dtype, backward)
    if found is None and not any(x.mode == evidence.BACKWARD for x in known.findings(name)):
        found = known.constant(name, dtype, False)
    return found or ""


def _say_without_record(known: "Evidence", device: torch.device) -> None:
    if known.record is None and device.type == "cuda":
        from cdetr_kernels.evidence import say_once

        say_once(
            f"{known.source}, so PyTorch's own operators run on it. "
            "`cdetr-fast qualify`, or `qualify()` of the kernels, tries them in about 90 seconds."
        )


def _tensor(first: Tensor | Sequence[Tensor]) -> Tensor:
    """Return an operator's first argument: a tensor, or the first of several images."""
    return first if isinstance(first, Tensor) else first[0]


def bucket(value: int, *limits: int) -> int:
    """Return the smallest limit that a number does not exceed, 0 if it exceeds all."""
    for limit in limits:
        if value <= limit:
            return limit
    return 0
