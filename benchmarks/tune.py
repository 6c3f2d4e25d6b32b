"""Search for the tiles of conditional attention on the GPU at hand, for the table.

    python -m benchmarks.tune --limit 480
    python -m benchmarks.tune --dry-run --architecture sm_90

For each kernel, precision and width of a head it compiles a reviewed list of tiles ahead of time,
drops those that spill or do not fit, checks the results of the others against fp64, and times them.
The fastest ones go into `kernels/cdetr_kernels/gpu/tiles.py` (lines of this architecture only,
with the budgets that the audit holds them to), and all that was tried into `benchmarks/results`.
With `--dry-run`, which needs no GPU, it lists what would be timed and what was dropped, and why.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from benchmarks import results, timing
from cdetr_kernels import registry
from cdetr_kernels.gpu import configurations, launching
from cdetr_kernels.gpu.tiles import Tile
from cdetr_kernels.ops.conditional_attention import triton as fused
from cdetr_kernels.ops.conditional_attention_separable import triton as separable
from cdetr_kernels.testing import accuracy, machine_code

TABLE = Path(configurations.__file__).with_name("tiles.py")
# Cross-attention of the model at batch 8, of one large image, and self-attention of the encoder.
SHAPES = (
    {"batch": 8, "height": 25, "width": 42},
    {"batch": 1, "height": 50, "width": 84},
    {"batch": 4, "queries": None, "height": 25, "width": 42},
)
TINY = ({"batch": 1, "queries": 20, "height": 5, "width": 8},)


@dataclasses.dataclass(frozen=True)
class Key:
    """An entry of the table, without its architecture."""

    precision: str
    width: int
    kernel: str

    @property
    def is_separable(self) -> bool:
        """Whether the kernel is one of `conditional_attention_separable`."""
        return self.kernel.startswith("separable_")

    @property
    def cases(self) -> ModuleType:
        """The cases of the operator that the kernel belongs to."""
        return registry.cases(f"conditional_attention{'_separable' * self.is_separable}")

    @property
    def pass_(self) -> str:
        """Outputs of the kernel, for either operator."""
        return self.kernel.removeprefix("separable_")


def candidates(key: Key) -> list[Tile]:
    """Return the tiles that are tried: the reviewed list.

    Without tensor cores a program multiplies in registers, where large tiles spill; a wide head
    fills shared memory, so it has no deep pipelines.
    """
    sides = (16, 32, 64) if key.precision == "ieee" else (32, 64, 128)
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


@contextlib.contextmanager
def with_tile(kernel: str, tile: Tile) -> Iterator[None]:
    """Make one kernel run with a tile, the others with what the table says."""
    stored = configurations.tile

    def chosen(name: str, *arguments: Any) -> Tile:
        return tile if name == kernel else stored(name, *arguments)

    with mock.patch.object(configurations, "tile", chosen):
        yield


def examined(key: Key, tile: Tile, architecture: str) -> dict[str, Any]:
    """Compile a kernel ahead of time, with dropout, which needs the most registers."""
    with with_tile(key.kernel, tile), machine_code.compiling_for(architecture, key.precision):
        launch = key.cases.audited(key.precision, key.width, 0.1)[key.kernel].launch
    try:
        used: dict[str, Any] = {**machine_code.examine(launch, architecture)}
    except Exception as error:  # such as more shared memory than there is
        return {"dropped": f"does not compile: {type(error).__name__}"}
    memory = machine_code.CAPACITY[architecture][0] - (not architecture.startswith("gfx"))
    if used["spills"]:
        used["dropped"] = f"{used['spills']} spills"
    elif used["shared"] > memory * 1024:
        used["dropped"] = f"{used['shared']} bytes of shared memory"
    elif key.precision != "ieee" and not used["tensor"]:
        used["dropped"] = "no tensor cores"
    return used


def all_examined(
    tiles: list[tuple[Key, Tile]], architecture: str, processes: int
) -> list[dict[str, Any]]:
    """Compile in several processes, as it is most of the time."""
    arguments = [(key, tile, architecture) for key, tile in tiles]
    if processes == 1:
        return list(itertools.starmap(examined, arguments))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, context) as pool:
        return list(pool.map(examined, *zip(*arguments, strict=True)))


def calls(key: Key, device: torch.device, shapes: Iterable[dict]) -> Iterator[tuple[str, Callable]]:
    """Yield for each shape a call of one kernel alone (forward: with the merge of its parts)."""
    dtype = torch.bfloat16 if key.precision == "half" else torch.float32
    module = separable if key.is_separable else fused
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
        if key.pass_ == "forward":
            yield case.label, lambda inputs=inputs: module.ATTENTION.forward(*inputs)
        elif key.pass_ == "attention_map":
            batch, queries, heads, _ = tensors[0].shape
            attention = output.new_empty(batch, heads, queries, tensors[2].shape[1])
            queries_and_keys = tensors[:-1]
            launch = module.map_launch(
                *queries_and_keys, None, None, logsumexp, scale, 0.0, attention
            )
            yield case.label, lambda launch=launch: launch.run(device)
        else:
            gradients = [torch.empty_like(x) for x in tensors if x is not None]
            passes = module.backward_launches(output, *inputs, output, logsumexp, gradients)
            passes[0].run(device)  # the others read what the first one leaves
            launch = passes[key.pass_ == "backward_keys"]
            yield case.label, lambda launch=launch: launch.run(device)


def is_accurate(key: Key, device: torch.device, shape: dict) -> bool:
    """Check output and gradients (or the map) of the operator, with the tile that is set."""
    dtype = torch.bfloat16 if key.precision == "half" else torch.float32
    case = key.cases.make(dtype, device, size=key.width, mask="padded", **shape)
    if key.pass_ == "attention_map":
        with torch.no_grad():
            _, got = case.public(**case.inputs, return_attention=True, backend="triton")
            _, exact = case.public(
                **{n: x.double() if n != "key_mask" and x is not None else x
                   for n, x in case.inputs.items()},
                return_attention=True, backend="torch",
            )  # fmt: skip
        return (got - exact).abs().max().item() <= 2e-2
    judge = accuracy.Judge(case, backward=key.pass_ != "forward")
    errors = judge.errors(judge.evaluate(case.function("triton")))
    # Products in TF32 are held to their own precision; the reference's may be IEEE.
    factor = 50.0 if key.precision == "tf32" else accuracy.KERNELS_FACTOR
    return all(x.passes(factor) for x in errors)


def timed(
    key: Key, tile: Tile, device: torch.device, shapes: tuple, repeats: int
) -> dict[str, Any]:
    """Check and time one tile: milliseconds by shape, or why it is out."""
    checked = {"batch": 2, "queries": 67, "height": 13, "width": 21}
    if device.type == "cpu":
        checked = {"batch": 1, "queries": 20, "height": 3, "width": 8}
    with with_tile(key.kernel, tile):
        try:
            if not is_accurate(key, device, checked):
                return {"dropped": "not accurate"}
            return {
                "ms": {
                    shape: timing.call_times(call, device, repeats, 0.2)["ms"]
                    for shape, call in calls(key, device, shapes)
                }
            }
        except Exception as error:  # out of resources: the next one may fit
            return {"dropped": f"{type(error).__name__}: {error}"[:200]}


def precision_of_dots(precision: str) -> contextlib.AbstractContextManager:
    """Make launchers multiply fp32 as asked, whatever torch is set to."""
    if precision == "half":
        return contextlib.nullcontext()
    return mock.patch.object(launching, "dot_precision", return_value=precision)


def entry(architecture: str, key: Key, tile: Tile, used: dict[str, Any]) -> str:
    """Return a line of the table; budgets are what is used, with slack for other versions."""
    registers = min(-(-used["registers"] // 8) * 8 + 8, 512 if "gfx" in architecture else 255)
    shared = -(-used["shared"] // 1024) + 1
    name = f'"{architecture}", "{key.precision}", {key.width}, "{key.kernel}"'
    return (
        f"    ({name}): Tile({tile.queries}, {tile.keys}, {tile.warps}, {tile.stages}, "
        f"{registers}, {shared}),"
    )


def rewritten(text: str, lines: list[str]) -> str:
    """Put entries into the text of the table, replacing those with the same key."""
    rows = text.splitlines()
    for line in lines:
        start = line.split(": Tile")[0] + ": Tile"
        place = [i for i, row in enumerate(rows) if row.startswith(start)]
        if place:
            rows[place[0]] = line
        else:
            rows.insert(len(rows) - 1 - rows[::-1].index("}"), line)
    return "\n".join(rows) + "\n"


def parts_table(
    device: torch.device, sizes: Iterable[tuple[int, int]], repeats: int
) -> list[dict[str, Any]]:
    """Time the forward kernel of one image for each number of parts, beside the model's choice."""
    rows = []
    for height, width in sizes:
        case = registry.cases("conditional_attention").make(
            torch.bfloat16, device, 1, 300, height, width
        )
        tensors = [x for name, x in case.inputs.items() if name != "key_mask"]
        inputs = (*tensors, None, None, 0.125, 0.0)
        chosen: list[int] = []
        counts = configurations.parts

        def noted(*arguments: Any, chosen: Any = chosen, counts: Any = counts) -> Any:
            chosen.append(counts(*arguments))
            return chosen[-1]

        with mock.patch.object(configurations, "parts", noted):
            fused.ATTENTION.forward(*inputs)
        times = {}
        for count in (1, 2, 3, 4, 6, 8):
            with mock.patch.object(configurations, "parts", return_value=count):
                forward = functools.partial(fused.ATTENTION.forward, *inputs)
                call = timing.call_times(forward, device, repeats, 0.2)
            times[count] = call["ms"]
        rows.append(
            {
                "keys": height * width,
                "chosen": chosen[0],
                "best": min(times, key=times.__getitem__),
                **{f"{count} parts": ms for count, ms in times.items()},
            }
        )
    return rows


def _target(architecture: str) -> None:
    """Let the audit compile for an architecture that it does not know, as for its kin."""
    if architecture not in machine_code.TARGETS:
        kin = "gfx942" if architecture.startswith("gfx") else "sm_" + architecture[3:-1] + "0"
        tables: Any = (machine_code.TARGETS, machine_code.CAPACITY, machine_code.TENSOR_CORE)
        for table in tables:
            table[architecture] = table.get(kin, table["sm_80"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="compile only")
    parser.add_argument("--rehearse", action="store_true", help="a tile each, interpreted on a CPU")
    parser.add_argument("--architecture", help="of the dry run, such as sm_90")
    parser.add_argument("--precisions", nargs="+", default=["half", "ieee", "tf32"])
    parser.add_argument("--widths", nargs="+", type=int, default=[32])
    parser.add_argument("--kernels", nargs="+", default=list(configurations.KERNELS))
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds of timing")
    parser.add_argument("--no-write", action="store_true", help="leave the table as it is")
    options = parser.parse_args(arguments)
    keys = [
        Key(precision, width, kernel)
        for precision in options.precisions
        for width in options.widths
        for kernel in options.kernels
    ]
    if options.dry_run or options.rehearse:
        architecture = options.architecture or "sm_90"
    elif torch.cuda.is_available():
        architecture = launching.architecture(torch.device("cuda", torch.cuda.current_device()))
    else:
        print("there is no GPU that torch can use; --dry-run does without", file=sys.stderr)
        return 2
    _target(architecture)
    tiles = [(key, tile) for key in keys for tile in candidates(key)]
    if options.rehearse:
        tiles = [(key, Tile(16, 32, 4, 1)) for key in keys]
        found = [{"registers": 100, "shared": 1024}] * len(tiles)
    else:
        found = all_examined(tiles, architecture, options.processes)
    tried = [
        {**dataclasses.asdict(key), "tile": _text(tile), **used}
        for (key, tile), used in zip(tiles, found, strict=True)
    ]
    if options.dry_run:
        for row in tried:
            uses = "to be timed: {registers} registers, {shared} bytes shared, {programs} programs"
            name = "{precision} {width} {kernel} {tile}".format(**row)
            print(f"{name}: {row.get('dropped') or uses.format(**row)}")
        kept = sum("dropped" not in row for row in tried)
        print(f"{architecture}: {kept} of {len(tried)} tiles to be timed")
        return 0

    device = torch.device("cpu" if options.rehearse else "cuda")
    shapes = TINY if options.rehearse else SHAPES
    started, lines = time.monotonic(), []
    for key in keys:
        best = None
        for (other, tile), used, row in zip(tiles, found, tried, strict=True):
            if other != key or "dropped" in row:
                continue
            if time.monotonic() - started > options.limit:
                row["dropped"] = "out of time"
                continue
            with precision_of_dots(key.precision):
                row |= timed(key, tile, device, shapes, options.repeats)
            if "ms" in row:
                row["mean ms"] = math.exp(sum(map(math.log, row["ms"].values())) / len(row["ms"]))
                if best is None or row["mean ms"] < best[0]:
                    best = row["mean ms"], tile, used
            print(f"{key} {row['tile']}: {row.get('mean ms', row.get('dropped'))}", flush=True)
        if best:
            lines.append(entry(architecture, key, best[1], best[2]))
    print("\n".join(lines))
    maps = [(3, 8)] if options.rehearse else [(25, 42), (50, 84), (100, 84)]
    parts = parts_table(device, maps, options.repeats)
    print("\nforward of one image, milliseconds by number of parts (configurations.parts chooses):")
    results.print_table(parts)
    if not options.rehearse:
        command = results.command_line("tune", arguments)
        path = results.save(f"tuned_{architecture}", [*tried, *parts], command)
        print("written to", path)
        if not options.no_write:
            TABLE.write_text(rewritten(TABLE.read_text(encoding="utf-8"), lines), encoding="utf-8")
            print(f"{len(lines)} entries written to {TABLE}; run benchmarks.audit next")
    return 0 if len(lines) == len(keys) else 1


def _text(tile: Tile) -> str:
    return f"{tile.queries}x{tile.keys} {tile.warps}w{tile.stages}s"


if __name__ == "__main__":
    sys.exit(main())
