"""`qualify`: finds out on this machine which kernels are right and faster, and records it."""

import datetime
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cdetr_kernels import evidence, registry
from cdetr_kernels.evidence import BACKWARD, FORWARD, RIGHT, Choice, Evidence, Finding, Record
from cdetr_kernels.gpu.configurations import MANY
from cdetr_kernels.qualification import compilation, store, tuning
from cdetr_kernels.qualification.children import NOT_TRIED, Children, Outcome
from cdetr_kernels.qualification.plan import (
    CHECK,
    LEVELS,
    TIME,
    Task,
    deadlines,
    tasks,
)

_LEAST_SECONDS = 5.0  # of an operator
Tiles = dict[str, Choice]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Report:
    """Findings of a qualification, and where they are kept.

    Args:
        record: The findings.
        file: Where they are kept, None if they could not be.
        unsaved_reason: Why not.
        later: Whether they count from the next process on, as this one has made calls already.
    """

    record: Record
    file: Path | None
    unsaved_reason: str = ""
    later: bool = False

    @property
    def rejected(self) -> list[Finding]:
        """Return the findings of paths that are not right, or could not be tried."""
        return [x for x in self.record.findings if x.verdict != RIGHT]

    @property
    def taken(self) -> list[Finding]:
        """Return the findings by which "auto" takes a kernel."""
        known = Evidence(self.record, "")
        names = dict.fromkeys(x.operator for x in self.record.findings)
        return [x for name in names for x in known.taken(name).values()]

    def details(self) -> list[str]:
        """Return a line for each rejected finding."""
        return [
            f"{x.operator} {x.path}, {x.dtype} {x.label}, {x.mode}: {x.verdict}"
            + f" ({x.reason})" * bool(x.reason)
            for x in self.rejected
        ]

    def summary(self) -> str:
        """Return a line with the figures, and where they are."""
        findings = self.record.findings
        kept = str(self.file) if self.file else f"not kept: {self.unsaved_reason}"
        return (
            f"{len(findings)} kinds of calls: kernels taken in {len(self.taken)}, "
            f"rejected or not tried in {len(self.rejected)}; {kept}"
        )


def qualify(
    device: torch.device | str | None = None,
    operators: Sequence[str] | str | None = None,
    level: str = "quick",
    *,
    say: Say | None = None,
) -> Report:
    """Find out which kernels are right and faster on a GPU, and record it for "auto".

    Each operator with kernels runs in a process of its own with a time limit, so a kernel that
    crashes, hangs or takes all memory is a line of the report. Checked are outputs and gradients
    against fp64 (at most twice torch's own error), repeatability bit by bit, memory around outputs
    and inputs, strides, and capture in a CUDA graph; then each is timed beside PyTorch's operators.

    The record is read at the first call of an operator in a process, and holds until its end.

    Args:
        device: A GPU; None takes the current one. Under TRITON_INTERPRET=1 it may be a CPU.
        operators: Names of the operators; None takes all.
        level: "quick" (at most 90 seconds: what the models of cdetr_fast call) or "full" (all
            sizes, dtypes and tiles: up to half an hour).
        say: Called with a line about each operator.

    Raises:
        ValueError: An operator or a level is unknown.
        RuntimeError: There is no GPU, or none that another process can use.
    """
    target = usable_device(device)
    names = _operators(operators)
    if level not in LEVELS:
        raise ValueError(f"level: expected one of {', '.join(LEVELS)}, got {level!r}")
    later = evidence.is_fixed(target)
    record = Record(evidence.key(target), *_found(target, names, level, say or (lambda _: None)))
    try:
        file: Path | None = store.write(record)
        reason = ""
    except OSError as error:
        file, reason = None, f"the record cannot be written ({error})"
        if not later:
            evidence.fix(target, Evidence(record, reason))
    return Report(record, file, reason, later)


def usable_device(device: torch.device | str | None) -> torch.device:
    """Return a device that kernels can run on.

    Raises:
        RuntimeError: It is not one.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device is None:
        device = "cpu" if interpreted or not torch.cuda.is_available() else "cuda"
    target = torch.device(device)
    if target.type == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError(f"device: {target} cannot be used: torch sees no GPU")
        index = torch.cuda.current_device() if target.index is None else target.index
        if index >= torch.cuda.device_count():
            raise RuntimeError(f"device: {target} is not there")
        return torch.device("cuda", index)
    if target.type != "cpu" or not interpreted:
        raise RuntimeError(
            f"device: expected a GPU that torch can use, got {target}; kernels run on a CPU only "
            "in triton's interpreter, under TRITON_INTERPRET=1"
        )
    return target


def _operators(operators: Sequence[str] | str | None) -> list[str]:
    if operators is None:
        return list(registry.NAMES)
    names = [operators] if isinstance(operators, str) else list(dict.fromkeys(operators))
    unknown = [name for name in names if name not in registry.NAMES]
    if unknown or not names:
        expected = ", ".join(registry.NAMES)
        raise ValueError(f"operators: expected some of {expected}, got {unknown or names}")
    return names


def _found(
    device: torch.device, names: list[str], level: str, say: Say
) -> tuple[tuple[Finding, ...], Tiles]:
    """Return the findings about operators, and the tiles that were fastest."""
    limits = LEVELS[level]
    end = time.monotonic() + limits.seconds
    paths = {name: registry.operator(name).needs_evidence(device.type) for name in names}
    names = [name for name in names if paths[name]]
    planned = {name: tasks(name, paths[name], level, device) for name in names}
    tuned = {name: tuning.tasks(planned[name], level, device) for name in names}
    every = [task for name in names for task in (*planned[name], *tuned[name])]
    findings: list[Finding] = []
    tiles: Tiles = {}
    with Children(device, limits) as children, compilation.ahead(every, device, limits):
        for i, name in enumerate(names):
            deadline = deadlines(names[i:], _LEAST_SECONDS, time.monotonic(), end)
            own, own_tiles = _qualified(
                children, planned[name], tuned[name], level, deadline,
                are_last=i == len(names) - 1,
            )  # fmt: skip
            findings += own
            tiles |= own_tiles
            say(_line(name, own))
    return tuple(findings), tiles


def _qualified(
    children: Children,
    planned: list[Task],
    tuned: list[Task],
    level: str,
    deadline: float,
    are_last: bool,
) -> tuple[list[Finding], Tiles]:
    """Check and time an operator, then try tiles in the time that is left."""
    run = children.run(planned, deadline, are_last=are_last and not tuned)
    findings = _findings(list(run), level)
    tiles: Tiles = {}
    if tuned and any(x.verdict == RIGHT for x in findings):
        tiles = _fastest(children.run(tuned, deadline, are_last=False))
        split = tuning.parts_tasks(tiles, tuned)
        # Calls with many rows fill the chip without parts.
        tiles |= {
            name: tile
            for name, tile in _fastest(children.run(split, deadline, are_last=False)).items()
            if not name.endswith(MANY)
        }
    if tiles:
        # What holds with other tiles has to be found with them; if not all is right, they are out.
        again = _findings(list(children.run(planned, deadline, tiles, are_last=are_last)), level)
        right = {(x.path, x.dtype, x.calls, x.mode) for x in findings if x.verdict == RIGHT}
        if all(x.verdict == RIGHT for x in again if (x.path, x.dtype, x.calls, x.mode) in right):
            return again, tiles
    return findings, {}


def _fastest(outcomes: Iterable[Outcome]) -> Tiles:
    """Return the fastest right tile of each kernel, where it is not that of the table."""
    best: dict[str, tuple[float, Task]] = {}
    for outcome in outcomes:
        for row in outcome.rows:
            for name, ms in row.get("ms", {}).items():
                # The table's comes first: another one has to be better by more than noise.
                if name not in best or ms < 0.97 * best[name][0]:
                    best[name] = ms, outcome.task
    return {name: task.tile for name, (_, task) in best.items() if task.label != tuning.TABLE}


def _findings(outcomes: list[Outcome], level: str) -> list[Finding]:
    """Return a finding for each time, rejected where a check of the same dtype was."""
    today = datetime.date.today().isoformat()
    rejected: dict[tuple[str, str, str], tuple[str, str]] = {}
    for outcome in outcomes:
        if outcome.task.what == CHECK:
            for mode, verdict, reason in _verdicts(outcome):
                if verdict != RIGHT:
                    where = (outcome.task.path, outcome.task.dtype, mode)
                    rejected.setdefault(where, (verdict, reason))
    found: dict[tuple[object, ...], Finding] = {}
    for outcome in outcomes:
        task = outcome.task
        if task.what != TIME:
            continue
        figures = {row["mode"]: row for row in outcome.rows}
        for mode, verdict, reason in _verdicts(outcome):
            verdict, reason = rejected.get((task.path, task.dtype, mode), (verdict, reason))
            row = figures.get(mode, {})
            finding = Finding(
                task.operator, task.path, task.dtype, task.calls, mode, verdict, reason,
                row.get("ms"), row.get("torch_ms"), task.label, level, today,
            )  # fmt: skip
            call = (task.path, task.dtype, task.calls, mode)
            found[call] = _worse(found.get(call), finding)
    return list(found.values())


def _worse(first: Finding | None, second: Finding) -> Finding:
    """Return the finding that speaks for a class: a path is taken only if all of it is better."""
    if first is None or second.verdict != RIGHT:
        return second if first is None or first.verdict == RIGHT else first
    return min(first, second, key=lambda x: (x.verdict == RIGHT, x.speed_up or 0.0))


def _verdicts(outcome: Outcome) -> list[tuple[str, str, str]]:
    """Return mode, verdict and reason; a mode that was not reached has the verdict before it."""
    rows = {row["mode"]: (row["verdict"], row["reason"]) for row in outcome.rows}
    last = (outcome.verdict or NOT_TRIED, outcome.reason)
    found = []
    for mode in (FORWARD, BACKWARD) if outcome.task.backward else (FORWARD,):
        last = rows.get(mode, last)
        found.append((mode, *last))
    return found


def _line(name: str, findings: list[Finding]) -> str:
    """Return what was found about an operator in a line."""
    right = [x for x in findings if x.verdict == RIGHT]
    faster = [x.speed_up for x in right if x.is_taken and x.speed_up]
    text = f"{name}: {len(right)} of {len(findings)} kinds of calls right, {len(faster)} faster"
    if faster:
        text += f" ({min(faster):.2f} to {max(faster):.2f} times as fast)"
    wrong = [x for x in findings if x.verdict != RIGHT]
    if wrong:
        text += f"; {wrong[0].dtype} {wrong[0].label}: {wrong[0].verdict}"
        text += f" ({wrong[0].reason})" * bool(wrong[0].reason)
    return text
