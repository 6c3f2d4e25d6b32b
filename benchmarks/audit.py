"""Machine code of every kernel for GPUs that need not be present, held to its budgets.

    python -m benchmarks.audit                      all architectures, all entries of the table
    python -m benchmarks.audit --quick sm_90        heads of 32 only, one architecture
    python -m benchmarks.audit --brief              each kernel once, as in the test-suite

Of the machine code it counts registers, spills, shared memory, tensor-core instructions, and loads
and stores of 16 bytes. The exit status is 1 if a kernel spills, exceeds a budget of its entry in
`cdetr_kernels.gpu.tiles`, or lacks an instruction that it is supposed to use. Where an architecture
runs with the entries of another one, that one's budgets do not count, but everything has to fit.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from cdetr_kernels import registry
from cdetr_kernels.testing.machine_code import DOCUMENTED, TARGETS, Audit, complaints, examine


def audits() -> list[Audit]:
    """Return the kinds of calls of all operators."""
    return [audit for name in registry.NAMES for audit in registry.cases(name).audits()]


def write_table(rows: list[dict[str, Any]], page: Path) -> None:
    """Put a table, a row for each kernel and case, between the marks in `page`."""
    architectures = [x for x in DOCUMENTED if any(row["architecture"] == x for row in rows)]
    cells = {(row["kernel"], row["case"], row["architecture"]): row for row in rows}
    lines = [
        "| kernel | case | " + " | ".join(architectures) + " |",
        "|---|---|" + "---|" * len(architectures),
    ]
    for kernel, case in dict.fromkeys((row["kernel"], row["case"]) for row in rows):
        texts = []
        for architecture in architectures:
            row = cells.get((kernel, case, architecture))
            texts.append("-" if row is None else _cell(row))
        lines.append(f"| {kernel} | {case} | " + " | ".join(texts) + " |")
    before, rest = page.read_text().split("<!-- audit -->\n")
    after = rest.split("<!-- /audit -->\n")[1]
    table = "\n".join(lines)
    page.write_text(f"{before}<!-- audit -->\n{table}\n<!-- /audit -->\n{after}")


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
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--docs", action="store_true", help="also write docs/kernels.md's table")
    options = parser.parse_args(arguments)
    wanted = [audit for audit in audits() if options.only in audit.label]
    if options.quick or options.brief:
        wanted = [audit for audit in wanted if audit.brief]
    rows, failed = [], 0
    header = ("architecture", "case", "kernel", "tile", "registers", "spills", "shared",
              "programs", "tensor", "load16", "store16", "async")  # fmt: skip
    line = "{:>12} {:>15} {:>26} {:>12} {:>9} {:>6} {:>7} {:>8} {:>6} {:>6} {:>7} {:>5}  {}"
    print(line.format(*header, ""))
    for architecture in options.architectures:
        done = set()
        # The last case of a kind has the most options.
        for audit in reversed(wanted) if options.brief else wanted:
            if architecture.startswith("gfx") and audit.precision == "tf32":
                continue  # launchers ask for it on NVIDIA's GPUs only
            for kernel, audited in audit.audited(architecture).items():
                if options.brief and kernel in done:
                    continue
                done.add(kernel)
                used = examine(audited.launch, architecture)
                wrong = complaints(used, audited, architecture)
                failed += bool(wrong)
                tile = audited.launch.tile
                shape = f"{tile.queries}x{tile.keys} {tile.warps}w{tile.stages}s"
                row = dict(zip(header, (architecture, audit.label, kernel, shape), strict=False))
                rows.append({**row, **used})
                print(line.format(*rows[-1].values(), "; ".join(wrong)), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.docs:
        write_table(rows, Path(__file__).parents[1] / "docs" / "kernels.md")
    print(f"{len(rows)} kernels, {failed} outside their budgets")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
