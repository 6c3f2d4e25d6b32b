"""Plan of a qualification: which calls are checked and timed, and for how long."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from cdetr_kernels import registry
from cdetr_kernels.evidence import Choice
from cdetr_kernels.testing.case import Sizes


@dataclass(frozen=True)
class Level:
    """Thoroughness of a qualification.

    Args:
        seconds: Most seconds of the whole.
        task_seconds: Most seconds of one task, compilation included.
        repeats: Timed calls.
        timing_seconds: Most seconds of one time.
    """

    seconds: float
    task_seconds: float
    repeats: int
    timing_seconds: float


LEVELS = {
    "quick": Level(85.0, 30.0, 20, 0.1),
    "full": Level(1800.0, 120.0, 100, 1.0),
}
# Shares of the time: attention has the most kernels to compile.
_WEIGHTS = {"conditional_attention": 4.0, "conditional_attention_separable": 3.0}
CHECK, TIME, TILE = "check", "time", "tile"


@dataclass(frozen=True)
class Task:
    """One piece of work of a child process.

    Args:
        what: `CHECK` (everything about the results), `TIME` (results at the model's sizes, and
            times), or `TILE` (results and times of one tile of one kernel).
        operator: Name of the operator.
        path: Name of the backend.
        dtype: dtype of the inputs, as "bfloat16".
        sizes: Arguments of the operator's `cases.make`.
        backward: Whether the operator has gradients.
        calls: Class of the calls.
        label: Sizes for the reader.
        kernel: Of a tile: "precision width kernel".
        tile: Numbers of `gpu.tiles.Tile.choice`.
    """

    what: str
    operator: str
    path: str
    dtype: str = "float32"
    sizes: Any = None
    backward: bool = False
    calls: tuple[int | bool | str, ...] = ()
    label: str = ""
    kernel: str = ""
    tile: Choice = (0, 0, 0, 0, 0, 0)

    def to_json(self) -> dict[str, Any]:
        """Return what a child process needs of it."""
        return asdict(self)


def weight(operator: str) -> float:
    """Return the share of the time that an operator gets."""
    return _WEIGHTS.get(operator, 1.0)


def tasks(operator: str, paths: list[str], level: str, device: torch.device) -> list[Task]:
    """Return the checks of an operator, and then the times; the most telling sizes first.

    float16 is last, as the fewest use it.
    """
    found = []
    for path in paths:
        for what in (CHECK, TIME):
            found += list(_tasks(operator, path, what, level, device))
    return sorted(found, key=lambda task: task.dtype == "float16")


def _tasks(operator: str, path: str, what: str, level: str, device: torch.device) -> Iterator[Task]:
    module = registry.cases(operator)
    named: dict[str, Sizes] = module.SIZES
    lists = {name: _sizes(sizes, what, level, device) for name, sizes in named.items()}
    for i in range(max(map(len, lists.values()))):
        for name, sizes in named.items():
            if i >= len(lists[name]):
                continue
            for dtype in _dtypes(sizes, level, device):
                case = module.make(dtype, "meta", **lists[name][i])
                classify = registry.operator(operator).classify
                yield Task(
                    what,
                    operator,
                    path,
                    str(dtype).removeprefix("torch."),
                    lists[name][i],
                    bool(case.gradients),
                    classify(*case.handed_on("torch")),
                    case.label,
                )


def _sizes(sizes: Sizes, what: str, level: str, device: torch.device) -> list[dict[str, Any]]:
    if device.type != "cuda":  # in the interpreter every element takes its time
        return [sizes.smallest if what == TIME and level == "quick" else sizes.small]
    if what == CHECK:
        return [sizes.small, sizes.medium]
    called = sizes.typical if sizes.called is None else sizes.called
    more = [x for x in sizes.typical if x not in called]
    return called if level == "quick" else [*called, *more]


def _dtypes(sizes: Sizes, level: str, device: torch.device) -> tuple[torch.dtype, ...]:
    if device.type != "cuda" and level == "quick":
        return sizes.dtypes[:1]
    return sizes.dtypes


def deadlines(operators: list[str], seconds: float, now: float, end: float) -> float:
    """Return when the first of some operators has to be done, so that the others get their share.

    Args:
        operators: Those that are left.
        seconds: Least seconds that it gets.
        now: The time.
        end: When all have to be done.
    """
    total = math.fsum(map(weight, operators))
    share = (end - now) * weight(operators[0]) / total
    return min(end, now + max(share, seconds))
