"""Search for the tiles of conditional attention on the GPU at hand, for the table.

    python -m benchmarks tune
    python -m benchmarks tune --dry-run --architecture sm_90

It is the full qualification of the attention operators (`cdetr_kernels.qualify`), whose fastest
tiles go into `kernels/cdetr_kernels/gpu/tiles.py` (lines of this architecture only, with the
budgets that the audit holds them to), and what was found into `benchmarks/results`. With
`--dry-run`, which needs no GPU, it compiles the reviewed list of tiles ahead of time and lists what
fits and what does not, and why.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import multiprocessing
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import cdetr_kernels
from benchmarks import results, timing
from cdetr_kernels import registry
from cdetr_kernels.gpu import configurations, launching
from cdetr_kernels.gpu.tiles import Tile
from cdetr_kernels.ops.conditional_attention import triton as fused
from cdetr_kernels.qualification.tuning import Key, candidates, replaced, text, with_tile
from cdetr_kernels.testing import machine_code

TABLE = Path(configurations.__file__).with_name("tiles.py")
OPERATORS = ("conditional_attention", "conditional_attention_separable")


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


def entry(architecture: str, key: Key, tile: Tile, used: dict[str, Any]) -> str:
    """Return a line of the table; budgets are what is used, with slack for other versions."""
    registers = min(-(-used["registers"] // 8) * 8 + 8, 512 if "gfx" in architecture else 255)
    shared = -(-used["shared"] // 1024) + 1
    name = f'"{architecture}", "{key.precision}", {key.width}, "{key.kernel}"'
    parts = f", fill={tile.fill}, depth={tile.depth}" if tile.fill != 1 or tile.depth != 8 else ""
    return (
        f"    ({name}): Tile({tile.queries}, {tile.keys}, {tile.warps}, {tile.stages}, "
        f"{registers}, {shared}{parts}),"
    )


def rewritten(text: str, lines: list[str]) -> str:
    """Return the text of the table with entries added, which replace those of the same key."""
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

        with replaced("parts", noted):
            fused.ATTENTION.forward(*inputs)
        times = {}
        for count in (1, 2, 3, 4, 6, 8):
            with replaced("parts", lambda *_, count=count: count):
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


def dry_run(architecture: str, keys: list[Key], processes: int) -> None:
    """Print which tiles of the reviewed list fit a chip, and what is wrong with the others."""
    tiles = [(key, tile) for key in keys for tile in candidates(key)]
    found = all_examined(tiles, architecture, processes)
    uses = "fits: {registers} registers, {shared} bytes shared, {programs} programs"
    for (key, tile), used in zip(tiles, found, strict=True):
        print(f"{key} {text(tile)}: {used.get('dropped') or uses.format(**used)}")
    kept = sum("dropped" not in used for used in found)
    print(f"{architecture}: {kept} of {len(found)} tiles fit")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="compile only")
    parser.add_argument("--architecture", help="of the dry run, such as sm_90")
    parser.add_argument("--precisions", nargs="+", default=["half", "ieee", "tf32"])
    parser.add_argument("--widths", nargs="+", type=int, default=[32])
    parser.add_argument("--kernels", nargs="+", default=list(configurations.KERNELS))
    parser.add_argument("--repeats", type=int, default=50, help="for the number of parts")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-write", action="store_true", help="leave the table as it is")
    options = parser.parse_args(arguments)
    if options.dry_run:
        architecture = options.architecture or "sm_90"
        _target(architecture)
        keys = [
            Key(*names)
            for names in itertools.product(options.precisions, options.widths, options.kernels)
        ]
        dry_run(architecture, keys, options.processes)
        return 0
    if not torch.cuda.is_available():
        print("there is no GPU that torch can use; --dry-run does without", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    architecture = launching.architecture(device)
    _target(architecture)
    report = cdetr_kernels.qualify(device, OPERATORS, "full", say=print)
    print(report.summary())
    lines = []
    for name, choice in report.record.tiles.items():
        if name.endswith(configurations.MANY):
            continue  # the table has one tile for all calls; the record has both
        key, tile = Key.parse(name), Tile.of(choice)
        lines.append(entry(architecture, key, tile, examined(key, tile, architecture)))
    print("\n".join(lines))
    parts = parts_table(device, [(25, 42), (50, 84), (100, 84)], options.repeats)
    print("\nforward of one image, milliseconds by number of parts (configurations.parts chooses):")
    results.print_table(parts)
    rows = [dataclasses.asdict(finding) for finding in report.record.findings]
    command = results.command_line("tune", arguments)
    print("written to", results.save(f"tuned_{architecture}", [*rows, *parts], command))
    if not options.no_write:
        TABLE.write_text(rewritten(TABLE.read_text(encoding="utf-8"), lines), encoding="utf-8")
        print(f"{len(lines)} entries written to {TABLE}; run benchmarks.audit next")
    return 1 if report.rejected else 0


if __name__ == "__main__":
    sys.exit(main())
