"""Tiles of the attention kernels: those that are tried, and the times of one.

The parent process plans with this module, so what needs triton is imported where it is used.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from cdetr_kernels import registry
from cdetr_kernels.evidence import RIGHT, Choice, operator_of_tile
from cdetr_kernels.gpu import configurations
from cdetr_kernels.gpu.tiles import Tile
from cdetr_kernels.qualification.plan import TILE, Task
from cdetr_kernels.testing import accuracy, timing
from cdetr_kernels.testing.case import Case

# Cross-attention of one image and of one large image, of the model at batch 8, and self-attention
# of the encoder.
SHAPES: tuple[dict[str, Any], ...] = (
    {"batch": 1, "height": 25, "width": 42},
    {"batch": 1, "height": 50, "width": 84},
    {"batch": 8, "height": 25, "width": 42},
    {"batch": 4, "queries": None, "height": 25, "width": 42},
)
TINY: tuple[dict[str, Any], ...] = ({"batch": 1, "queries": 20, "height": 5, "width": 8},)
# What results are checked on, on a GPU and in the interpreter.
CHECKED = {"batch": 2, "queries": 67, "height": 13, "width": 21}
_CHECKED_IN_THE_INTERPRETER = {"batch": 1, "queries": 20, "height": 3, "width": 8}
TABLE = "table"
PASSES = ("forward", "backward_queries", "backward_keys")
# Of forward, beside the table's: programs of a multiprocessor, and fewest tiles of keys in a part.
PARTS = ((0, 8), (1, 4), (2, 4), (2, 2), (4, 2))


@dataclass(frozen=True)
class Key:
    """An entry of the table, without its architecture."""

    precision: str
    width: int
    kernel: str

    def __str__(self) -> str:
        return f"{self.precision} {self.width} {self.kernel}"

    @staticmethod
    def parse(name: str) -> "Key":
        """Return the key that a record's name stands for, without `configurations.MANY`."""
        precision, width, kernel = name.removesuffix(configurations.MANY).split(" ")
        return Key(precision, int(width), kernel)

    @property
    def is_separable(self) -> bool:
        """Whether the kernel is one of `conditional_attention_separable`."""
        return self.kernel.startswith("separable_")

    @property
    def operator(self) -> str:
        """The operator that the kernel belongs to."""
        return operator_of_tile(str(self))

    @property
    def cases(self) -> ModuleType:
        """The cases of that operator."""
        return registry.cases(self.operator)

    @property
    def pass_(self) -> str:
        """Outputs of the kernel, for either operator."""
        return self.kernel.removeprefix("separable_")


def candidates(key: Key) -> list[Tile]:
    """Return all tiles that make sense: the reviewed list."""
    # Without tensor cores a program multiplies in registers, where large tiles spill; a wide head
    # fills shared memory, so it has no deep pipelines.
    sides: tuple[int, ...] = (16, 32, 64) if key.precision == "ieee" else (32, 64, 128)
    stages: tuple[int, ...] = (1, 2) if key.width == 128 or key.precision == "ieee" else (1, 2, 3)
    if key.pass_ == "attention_map":
        stages = (1,)  # it has no loop
    # A warp of an 8-warp program has to have 16 rows or columns of its own; kernels that keep
    # scores of places in registers need the registers of 8 warps earlier.
    for_8_warps = 32 * 32 if key.is_separable else 64 * 64
    return [
        Tile(queries, keys, warps, stage)
        for queries, keys, warps, stage in itertools.product(sides, sides, (4, 8), stages)
        if warps == 4 or queries * keys >= for_8_warps
    ]


# Neighbours that spill, or load fewer than 16 bytes at once.
_POOR = {
    ("sm_120", "separable_forward"): ("fewer",),
    ("gfx942", "backward_queries"): ("fewer",),
    ("gfx942", "backward_keys"): ("fewer",),
    ("gfx942", "separable_forward"): ("more", "fewer"),
    ("gfx942", "separable_backward_queries"): ("more", "fewer"),
    ("gfx942", "separable_backward_keys"): ("fewer",),
}


def neighbours(key: Key, tile: Tile, architecture: str) -> list[Tile]:
    """Return the few that a quick qualification tries: more rows and warps, fewer, less ahead."""
    over_keys = key.pass_ == "backward_keys"
    rows = tile.keys if over_keys else tile.queries
    side = "keys" if over_keys else "queries"
    tile = Tile.of(tile.choice)  # the budgets are the table's
    found = {
        "more": replace(tile, **{side: 2 * rows}, warps=8),
        "fewer": replace(tile, **{side: max(16, rows // 2)}, warps=4),
        "less ahead": replace(tile, stages=max(1, tile.stages - 1)),
    }
    for name in _POOR.get((architecture, key.kernel), ()):
        del found[name]
    return [x for x in found.values() if x != tile]


def tasks(planned: list[Task], level: str, device: torch.device) -> list[Task]:
    """Return the tiles to try for an operator's kernels, the table's first for each of them."""
    operator = planned[0].operator
    if not operator.startswith("conditional_attention"):
        return []
    interpreted = device.type != "cuda"
    if interpreted and level == "quick":
        return []  # there are no tensor cores to fill
    prefix = "separable_" * operator.endswith("_separable")
    precisions = ("half",) if level == "quick" else ("half", "ieee", "tf32")
    found = []
    for precision, name in itertools.product(precisions[: 1 if interpreted else None], PASSES):
        key = Key(precision, 32, prefix + name)
        stored = _stored(key, device)
        others = candidates(key)
        if level != "full":
            others = neighbours(key, stored, _architecture(device))
        others = [Tile(16, 32, 4, 1)] if interpreted else others
        others = [replace(x, fill=stored.fill, depth=stored.depth) for x in others]
        found += _tasks(key, [stored, *(x for x in others if x.choice != stored.choice)])
    return found


def parts_tasks(fastest: dict[str, Choice], tuned: list[Task]) -> list[Task]:
    """Return the tasks that split the keys in other ways, with the tile that was the fastest one.

    The first one of each kernel is what has been tried.

    Args:
        fastest: By the names of a record.
        tuned: The tasks that were run, those of the table first for each kernel.
    """
    found = []
    for name in dict.fromkeys(x.kernel for x in tuned):
        key = Key.parse(name)
        if key.pass_ != "forward":
            continue
        first = next(Tile.of(x.tile) for x in tuned if x.kernel == name)
        best = Tile.of(fastest[name]) if name in fastest else first
        others = [replace(best, fill=fill, depth=depth) for fill, depth in PARTS]
        found += _tasks(key, [best, *(x for x in others if x.choice != best.choice)])
    return found


def _tasks(key: Key, tiles: list[Tile]) -> list[Task]:
    """Return a task for each tile of a kernel, the first one that of the table."""
    return [
        Task(
            TILE, key.operator, "triton", kernel=str(key), tile=x.choice,
            label=text(x) if i else TABLE,
        )
        for i, x in enumerate(tiles)
    ]  # fmt: skip


def _stored(key: Key, device: torch.device) -> Tile:
    """Return the tile of the table."""
    return configurations.tile(key.kernel, _architecture(device), key.precision, key.width)


def _architecture(device: torch.device) -> str:
    if device.type != "cuda":
        return "interpreter"
    from cdetr_kernels.gpu import launching

    return launching.architecture(device)


def text(tile: Tile) -> str:
    """Return a tile for the reader."""
    parts = "" if (tile.fill, tile.depth) == (1, 8) else f" {tile.fill}p{tile.depth}t"
    return f"{tile.queries}x{tile.keys} {tile.warps}w{tile.stages}s{parts}"


def run(task: Task, device: torch.device, repeats: int, seconds: float) -> dict[str, Any]:
    """Check and time one tile.

    Returns:
        A row with its verdict, and the mean time over the shapes of each class by the names that a
        record has for it.
    """
    key = Key.parse(task.kernel)
    row: dict[str, Any] = {"mode": "forward", "verdict": RIGHT, "reason": ""}
    shapes = SHAPES if device.type == "cuda" else TINY
    times: dict[str, list[float]] = {}
    with with_tile(key.kernel, Tile.of(task.tile)), precision_of_dots(key):
        try:
            if not is_accurate(key, device):
                return row | {"verdict": "wrong", "reason": "not accurate"}
            for many, call in calls(key, device, shapes):
                name = str(key) + configurations.MANY * many
                taken = timing.call_times(call, device, repeats, seconds)["ms"]
                times.setdefault(name, []).append(taken)
        except Exception as error:  # out of resources: the next one may fit
            return row | {"verdict": "raises", "reason": f"{type(error).__name__}: {error}"[:200]}
    means = {name: math.exp(math.fsum(map(math.log, x)) / len(x)) for name, x in times.items()}
    return row | {"ms": means}


@contextlib.contextmanager
def with_tile(kernel: str, tile: Tile) -> Iterator[None]:
    """Make one kernel run with a tile, the others with those of the table."""
    stored = configurations.tile

    def chosen(name: str, *arguments: Any) -> Tile:
        return tile if name == kernel else stored(name, *arguments)

    with replaced("tile", chosen):
        yield


@contextlib.contextmanager
def replaced(name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Make launchers call a replacement for a function of `gpu.configurations`."""
    from cdetr_kernels.gpu import launching

    launching.forget()
    try:
        with mock.patch.object(configurations, name, function):
            yield
    finally:
        launching.forget()


def precision_of_dots(key: Key) -> contextlib.AbstractContextManager[Any]:
    """Make launchers multiply fp32 in this precision, whatever torch is set to."""
    from cdetr_kernels.gpu import launching

    if key.precision == "half":
        return contextlib.nullcontext()
    return mock.patch.object(launching, "dot_precision", return_value=key.precision)


def is_accurate(key: Key, device: torch.device) -> bool:
    """Check output and gradients (or the map) of the operator, with the tile that is set."""
    shape = CHECKED if device.type == "cuda" else _CHECKED_IN_THE_INTERPRETER
    case = checked_case(key, device, shape)
    if key.pass_ == "attention_map":
        doubles = {
            name: x.double() if name != "key_mask" and x is not None else x
            for name, x in case.inputs.items()
        }
        with torch.no_grad():
            _, got = case.public(**case.inputs, return_attention=True, backend="triton")
            _, exact = case.public(**doubles, return_attention=True, backend="torch")
        return bool((got - exact).abs().max() <= 2e-2)
    judge = accuracy.Judge(case, backward=key.pass_ != "forward")
    errors = judge.errors(judge.evaluate(case.function("triton")))
    # Products in TF32 are held to their own precision; the reference's may be IEEE.
    factor = 50.0 if key.precision == "tf32" else accuracy.KERNELS_FACTOR
    return all(x.passes(factor) for x in errors)


def checked_case(key: Key, device: torch.device, shape: dict[str, Any]) -> Case:
    """Return the call whose results are checked."""
    dtype = torch.bfloat16 if key.precision == "half" else torch.float32
    case: Case = key.cases.make(dtype, device, size=key.width, mask="padded", **shape)
    return case


def calls(
    key: Key, device: torch.device, shapes: Iterable[dict[str, Any]]
) -> Iterator[tuple[bool, Callable[[], Any]]]:
    """Yield for each shape a call of one kernel alone (forward: with the merge of its parts).

    And whether it has many rows, as `configurations.fills` tells.
    """
    from cdetr_kernels.gpu import launching
    from cdetr_kernels.ops.conditional_attention import triton as general
    from cdetr_kernels.ops.conditional_attention_separable import triton as separable

    dtype = torch.bfloat16 if key.precision == "half" else torch.float32
    module: Any = separable if key.is_separable else general
    for shape in shapes:
        if key.is_separable and not shape.get("queries", True):
            continue  # self-attention has no map
        case = key.cases.make(dtype, device, size=key.width, **shape)
        names = ["q_content", "q_spatial", "k_content", "k_spatial", "value"]
        if key.is_separable:
            names[3:4] = ["k_rows", "k_columns"]
        tensors = [case.inputs[name] for name in names]
        scale = (tensors[0].shape[-1] * (1 if tensors[1] is None else 2)) ** -0.5
        inputs = (*tensors, None, None, scale, 0.0)
        output, logsumexp = module.ATTENTION.forward(*inputs)
        batch, rows, heads, _ = tensors[-1 if key.pass_ == "backward_keys" else 0].shape
        many = configurations.fills(batch * rows * heads, launching.multiprocessors(device))
        if key.pass_ == "forward":
            yield many, functools.partial(module.ATTENTION.forward, *inputs)
        elif key.pass_ == "attention_map":
            attention = output.new_empty(batch, heads, rows, tensors[2].shape[1])
            launch = module.map_launch(*tensors[:-1], None, None, logsumexp, scale, 0.0, attention)
            yield many, launch.run
        else:
            gradients = module.ATTENTION.gradient_buffers(*tensors)
            passes = module.backward_launches(output, *inputs, output, logsumexp, *gradients)
            passes[0].run()  # the others read what the first one leaves
            launch = passes[key.pass_ == "backward_keys"]
            yield many, launch.run
