"""Machine code of every kernel for GPUs that need not be present, held to its budgets.

    python -m benchmarks audit                      all architectures, all entries and variants
    python -m benchmarks audit --quick sm_90        heads of 32 only, one architecture
    python -m benchmarks audit --brief              each kernel once, as in the test-suite

Of the machine code it counts registers, spills, shared memory, tensor-core instructions, and loads
and stores of 16 bytes; instructions in PTX, but for the cases of --brief, as disassembling takes
half of the time. The exit status is 1 if a kernel spills, exceeds a budget of its entry in
`cdetr_kernels.gpu.tiles`, or lacks an instruction that it is supposed to use. Where an architecture
runs with the entries of another one, that one's budgets do not count, but everything has to fit.
Tiles that a quick qualification tries beside the table's are compiled too; they may not spill.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.report.pages import ROOT, markdown, write_tables
from cdetr_kernels import registry
from cdetr_kernels.gpu import configurations, launching
from cdetr_kernels.gpu.launching import Launch
from cdetr_kernels.qualification import tuning
from cdetr_kernels.testing.machine_code import (
    DOCUMENTED,
    TARGETS,
    Audit,
    Audited,
    complaints,
    examine,
    source,
)

HEADER = ("architecture", "case", "kernel", "tile", "registers", "spills", "shared",
          "programs", "tensor", "load16", "store16", "async")  # fmt: skip


class Part(NamedTuple):
    """Some kernels of a case, which a process compiles at a time."""

    architecture: str
    case: int
    kernels: frozenset[str]


@functools.cache
def audits() -> list[Audit]:
    """Return the kinds of calls of all operators, and the tiles that a qualification tries."""
    found = [audit for name in registry.NAMES for audit in registry.cases(name).audits()]
    for prefix, pass_ in itertools.product(("", "separable_"), tuning.PASSES):
        key = tuning.Key("half", 32, prefix + pass_)
        make = functools.partial(_neighbours, key)
        found.append(Audit(f"half 32 tried {pass_}", make, brief=False, documented=False))
    return found


def _neighbours(key: tuning.Key) -> dict[str, Audited]:
    """Return a kernel with each of the tiles that are tried, by kernel and tile."""
    architecture = launching.architecture(torch.device("meta"))
    stored = configurations.tile(key.kernel, architecture, key.precision, key.width)
    found = {}
    for tile in tuning.neighbours(key, stored, architecture):
        with tuning.with_tile(key.kernel, tile):
            audited = key.cases.audited(key.precision, key.width)[key.kernel]
        found[f"{key.kernel} {tuning.text(tile)}"] = audited
    return found


def compiled(part: Part) -> list[tuple[dict[str, Any], list[str]]]:
    """Return a row for each kernel, and what is wrong with it."""
    audit = audits()[part.case]
    found = []
    for kernel, audited in audit.audited(part.architecture).items():
        if kernel not in part.kernels:
            continue
        used = examine(audited.launch, part.architecture, disassemble=audit.brief)
        if not audit.documented:  # a variant is held to its chip, and to the spills of its entry
            tile = dataclasses.replace(audited.launch.tile, registers=512, shared=10**6)
            launch = dataclasses.replace(audited.launch, tile=tile)
            audited = audited._replace(launch=launch)
        wrong = complaints(used, audited, part.architecture)
        head = (part.architecture, audit.label, kernel, tuning.text(audited.launch.tile))
        found.append(({**dict(zip(HEADER, head, strict=False)), **used}, wrong))
    return found


def planned(architectures: Collection[str], wanted: Collection[int], brief: bool) -> Iterator[Part]:
    """Yield what is to be compiled; `brief` is each kernel once, and no variant comes twice."""
    for architecture in architectures:
        done: set[str] = set()
        # The last case of a kind has the most options.
        for case in sorted(wanted, reverse=brief):
            audit = audits()[case]
            if architecture.startswith("gfx") and audit.precision == "tf32":
                continue  # launchers ask for it on NVIDIA's GPUs only
            kernels = {
                name: name if brief else _identity(audited.launch)
                for name, audited in audit.audited(architecture).items()
            }
            skips = brief or not audit.documented
            left = {name for name, x in kernels.items() if not (skips and x in done)}
            done.update(kernels.values())
            if left:
                yield Part(architecture, case, frozenset(left))


def _identity(launch: Launch) -> str:
    """Return what tells compilations for an architecture apart."""
    return source(launch).hash() + str(launch.options)


def table(rows: list[dict[str, Any]]) -> str:
    """Return a table of Markdown, with a row for each kernel and case."""
    architectures = [x for x in DOCUMENTED if any(row["architecture"] == x for row in rows)]
    found = {(row["kernel"], row["case"], row["architecture"]): row for row in rows}
    lines = []
    for kernel, case in dict.fromkeys((row["kernel"], row["case"]) for row in rows):
        measured = (found.get((kernel, case, architecture)) for architecture in architectures)
        lines.append([kernel, case, *("-" if row is None else _cell(row) for row in measured)])
    return markdown(["kernel", "case", *architectures], lines)


def _cell(row: dict[str, Any]) -> str:
    spills = f", {row['spills']} spills" if row["spills"] else ""
    shared = -(-row["shared"] // 1024)
    return f"{row['tile']}: {row['registers']}, {shared}, {row['programs']}{spills}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("architectures", nargs="*", default=list(TARGETS))
    parser.add_argument("--quick", action="store_true", help="heads of 32 in half precision only")
    parser.add_argument("--brief", action="store_true", help="each kernel once")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--docs", action="store_true", help="also write docs/kernels.md's table")
    options = parser.parse_args(arguments)
    wanted = [
        i
        for i, audit in enumerate(audits())
        if options.only in audit.label and (audit.brief or not (options.quick or options.brief))
    ]
    rows, failed = [], 0
    line = "{:>12} {:>15} {:>26} {:>12} {:>9} {:>6} {:>7} {:>8} {:>6} {:>6} {:>7} {:>5}  {}"
    print(line.format(*HEADER, ""))
    parts = list(planned(options.architectures, wanted, options.brief))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.processes, context) as pool:
        for row, wrong in itertools.chain.from_iterable(pool.map(compiled, parts)):
            failed += bool(wrong)
            rows.append(row)
            print(line.format(*row.values(), "; ".join(wrong)), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.docs:
        documented = {audit.label for audit in audits() if audit.documented}
        rows = [row for row in rows if row["case"] in documented]
        write_tables(ROOT / "docs" / "kernels.md", {"audit": table(rows)})
    print(f"{len(rows)} kernels, {failed} outside their budgets")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
