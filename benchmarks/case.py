"""One comparison: the same work done by several providers, timed only if their results agree."""

import dataclasses
import math
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.results import Row
from benchmarks.timing import CPU, time_in_turns
from cdetr_fast.common.errors import first_line


class GateFailed(Exception):
    """The result of a provider is not accurate enough for its time to be reported."""


class OptionError(Exception):
    """Options of a benchmark do not go together."""


class Gate(Protocol):
    """The check of accuracy.

    Called with the name of a provider, its result and that of the reference. Returns the errors by
    name, which go into the row, or raises GateFailed.
    """

    def __call__(self, provider: str, got: Any, expected: Any) -> Mapping[str, float | None]: ...


@dataclasses.dataclass(frozen=True)
class Within:
    """Gate that holds errors to limits.

    Args:
        errors: Returns the errors of a result, by name, given that of the reference.
        limits: The largest error that is accepted, by name; NaN never is.
    """

    errors: Callable[[Any, Any], dict[str, float]]
    limits: Mapping[str, float]

    def __call__(self, provider: str, got: Any, expected: Any) -> dict[str, float]:
        if expected is None:
            raise GateFailed("the reference has no result")
        errors = self.errors(got, expected)
        wrong = [
            f"{name} is {errors[name]:.3g}, expected at most {limit:.3g}"
            for name, limit in self.limits.items()
            if not errors[name] <= limit
        ]
        if wrong:
            raise GateFailed("; ".join(wrong))
        return errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison.

    Args:
        work: What is done, such as "forward".
        shape: Its sizes, for the reader.
        providers: Zero-argument functions that do it, by name; ours and its peers.
        gate: The check of accuracy. No time is reported for a provider that fails it.
        reference: The provider that results and times are compared with; the first one if None.
        dtype: dtype of the inputs.
        device: Where the providers work.
        columns: More columns that are the same for all providers.
        result: Returns what the gate sees of a provider; that of a call if None.
        gate_after: The gate looks at `result` after the timed calls, which have kept their results.
        counts: Counts operators and waits of a provider.
        memory: Measures the peak memory of a provider in MiB.
        derive: Computes further columns from a row with times.
        speed_up: Whether times are compared with that of the reference.
        refused: Why there is no provider of a name, which gets a row all the same.
        optional: Providers that may fail, since not every machine or release can run them.
        inference: Providers run in inference mode.
        warmup: Rounds that are not timed, besides the calls that the gate has looked at.
        cold: Times with cold caches, without those of the host, see `time_in_turns`.
        seconds: No round begins after this long.
    """

    work: str
    shape: str
    providers: Mapping[str, Callable[[], Any]]
    gate: Gate
    reference: str | None = None
    dtype: str = "float32"
    device: torch.device = CPU
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    result: Callable[[str], Any] | None = None
    gate_after: bool = False
    counts: Callable[[str], dict[str, Any]] | None = None
    memory: Callable[[str], float | None] | None = None
    derive: Callable[[Row], dict[str, Any]] | None = None
    speed_up: bool = True
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    optional: Collection[str] = ()
    inference: bool = False
    warmup: int = 0
    cold: bool = False
    seconds: float = math.inf

    def measure(self, repeats: int) -> list[Row]:
        """Check and time the providers; those that fail have a reason and no time."""
        refused = [self._named(name) | {"not measured": why} for name, why in self.refused.items()]
        if not self.providers:
            return refused
        with torch.inference_mode(self.inference):
            return self._measure(repeats) + refused

    def _measure(self, repeats: int) -> list[Row]:
        rows = {name: self._named(name) for name in self.providers}
        if not self.gate_after:
            self._check(rows)
        times = self.time([name for name, row in rows.items() if _runs(row)], repeats)
        if self.gate_after:
            self._check(rows)
        reference = times.get(self.reference or next(iter(self.providers)))
        for name, row in rows.items():
            if not _runs(row):
                continue
            accuracy = row.pop("accuracy")
            row |= times[name]
            if reference and self.speed_up:
                row["speed-up"] = reference["ms"] / row["ms"]
            row |= self.derive(row) if self.derive else {}
            if self.memory:
                row["peak MiB"] = self.memory(name)
            row |= self.counts(name) if self.counts else {}
            row["accuracy"] = accuracy
        return list(rows.values())

    def time(self, providers: list[str], repeats: int) -> dict[str, dict[str, float]]:
        """Time providers in turns; see `time_in_turns`."""
        return time_in_turns(
            {name: self.providers[name] for name in providers},
            repeats,
            warmup=self.warmup,
            device=self.device,
            cold=self.cold,
            seconds=self.seconds,
        )

    def failures(self, rows: list[Row]) -> list[Row]:
        """Return the rows without a time whose providers should have one."""
        may_fail = {*self.optional, *self.refused}
        return [row for row in rows if not _runs(row) and row["provider"] not in may_fail]

    def _named(self, provider: str) -> Row:
        names = {"work": self.work, "shape": self.shape, "dtype": self.dtype}
        return {**names, "provider": provider, **self.columns}

    def _check(self, rows: dict[str, Row]) -> None:
        reference = self.reference or next(iter(self.providers))
        expected = None
        for name in (reference, *(x for x in rows if x != reference)):
            try:
                got = self.result(name) if self.result else self.providers[name]()
                expected = got if name == reference else expected
                rows[name]["accuracy"] = self.gate(name, got, expected)
            except Exception as error:  # whatever it is, the others are measured
                kind = "" if isinstance(error, GateFailed) else f"{type(error).__name__}: "
                rows[name]["not measured"] = f"{kind}{first_line(error)}"[:200]
                print(f"{name}: {rows[name]['not measured']}", file=sys.stderr)


def _runs(row: Row) -> bool:
    return "not measured" not in row


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference of two tensors."""
    return (a - b).abs().max().item() if a.numel() else 0.0


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Return the norm of a difference relative to that of the second tensor."""
    return ((a - b).norm() / b.norm()).item()
