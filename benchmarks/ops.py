"""Microbenchmarks of the operators: ours by backend against what else computes the same.

    python -m benchmarks ops --only conditional_attention --dtypes bf16 fp32
    python -m benchmarks ops --list

On a GPU if there is one (events, cold L2, also as a captured graph), else on the CPU with its
timers. No speed is reported for a provider whose results fail the check: our kernels have at most
twice torch's own error in the same dtype against fp64, others at most ten times.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers, results, timing
from cdetr_fast.common.errors import first_line
from cdetr_kernels.testing import accuracy
from cdetr_kernels.testing.case import Case, Function, Sizes, registered

DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "uint8": torch.uint8,
}
MODES = ("forward", "forward and backward")
Cell = tuple[str, dict[str, Any], str, str]
"""Name, sizes, dtype and mode."""


def works() -> dict[str, tuple[Callable[..., Case], Sizes]]:
    """Return what is measured: the cases of all operators, and the cross-attention module."""
    return registered() | {
        "cross_attention_module": (peers.cross_attention_module, peers.MODULE_SIZES)
    }


def measured(
    name: str, case: Case, mode: str, repeats: int, seconds: float, only: str = ""
) -> Iterator[dict[str, Any]]:
    """Yield a row for each provider whose name matches: its times, or why there are none."""
    # A compiled provider would give up compiling at its eighth shape.
    torch.compiler.reset()
    backward = mode != "forward"
    judge = accuracy.Judge(case, backward)
    floor = _floor_seconds(case, backward)
    for provider, make in peers.providers(case).items():
        if not re.search(only, provider):
            continue
        row = {
            "op": name,
            "shape": case.label,
            "dtype": str(case.dtype).removeprefix("torch."),
            "mode": mode,
            "provider": provider,
        }
        try:
            row |= _measured(provider, make(), judge, backward, floor, repeats, seconds)
        except Exception as error:  # whatever it is, the others are measured
            row["not measured"] = f"{type(error).__name__}: {first_line(error)}"[:200]
        if case.device.type == "cuda":
            torch.cuda.empty_cache()
        yield row


def _measured(
    provider: str,
    function: Function,
    judge: accuracy.Judge,
    backward: bool,
    floor: float,
    repeats: int,
    seconds: float,
) -> dict[str, Any]:
    case = judge.case
    errors = judge.errors(judge.evaluate(function))
    factor = accuracy.factor(provider)
    worst = max(errors, key=lambda x: x.error / (factor * x.torchs + x.floor))
    row: dict[str, Any] = {"error": worst.error, "torch's error": worst.torchs, "worst": worst.name}
    if not all(x.passes(factor) for x in errors):
        return row | {"not measured": "fails the check of accuracy"}

    inputs = {
        key: x.detach().requires_grad_() if backward and key in case.gradients else x
        for key, x in case.inputs.items()
    }
    leaves = [inputs[key] for key in case.gradients]
    grads = judge.grads

    def forward() -> Any:
        with torch.no_grad():
            return function(**inputs)

    def step() -> Any:
        outputs = accuracy.tensors(function(**inputs))
        return torch.autograd.grad(outputs, leaves, grads)

    call = step if backward else forward
    device = case.device
    row["peak MiB"] = timing.peak_mib(call, device)
    row |= timing.call_times(call, device, repeats, seconds)
    best = row["ms"]
    if device.type == "cuda" and (case.op, provider) not in peers.UNCAPTURABLE:
        try:
            replay = timing.captured(call)
            times = timing.call_times(replay, device, repeats, seconds)
            row |= {f"graph {key}": x for key, x in times.items()}
            best = min(best, times["ms"])
        except Exception as error:  # not every provider can be captured
            row["not captured"] = f"{type(error).__name__}: {first_line(error)}"[:200]
    row["GB/s"] = case.bytes_moved[backward] / best / 1e6
    row["TFLOP/s"] = case.flops[backward] / best / 1e9
    row["of the roofline"] = floor / (best / 1e3)
    return row


def _floor_seconds(case: Case, backward: bool) -> float:
    """Return what no version can beat: bytes at the rate of a copy, or products at a matmul's."""
    seconds = case.bytes_moved[backward] / timing.copied_bytes_per_second(case.device)
    if case.flops[backward]:
        rate = timing.multiplied_flops_per_second(case.device, case.dtype)
        seconds = max(seconds, case.flops[backward] / rate)
    return seconds


def cells(
    dtypes: list[str] | None,
    only: str = "",
    modes: tuple[str, ...] = MODES,
    tiny: bool = False,
) -> Iterator[Cell]:
    """Yield what is measured, first a size of each operator, then the others.

    Args:
        dtypes: Names of dtypes; None is the first one of each operator. An operator that has none
            of them is measured in its first one.
        only: Part of the names.
        modes: Of `MODES`.
        tiny: Take the small sizes.
    """
    named = {name: sizes for name, (_, sizes) in works().items() if only in name}
    lists = {name: [s.small] if tiny else s.typical for name, s in named.items()}
    for i in range(max(map(len, lists.values()), default=0)):
        for name, sizes in named.items():
            if i >= len(lists[name]):
                continue
            known = [key for dtype in sizes.dtypes for key, x in DTYPES.items() if x == dtype]
            for dtype in [x for x in known if x in (dtypes or ())] or known[:1]:
                for mode in modes:
                    if mode == "forward" or sizes.differentiable:
                        yield name, lists[name][i], dtype, mode


def key_of(cell: Cell) -> str:
    """Return a name for a cell, to recognise it in a file of results."""
    name, sizes, dtype, mode = cell
    return " ".join([name, *(f"{k}={v}" for k, v in sizes.items()), dtype, mode])


def run_cell(
    cell: Cell, device: torch.device, repeats: int, seconds: float, only: str = ""
) -> list[dict[str, Any]]:
    """Measure the providers of one cell; what fails as a whole is a row that says so."""
    name, sizes, dtype, mode = cell
    try:
        case = works()[name][0](DTYPES[dtype], device, **sizes)
        return list(measured(name, case, mode, repeats, seconds, only))
    except Exception as error:  # such as too little memory for the reference
        reason = f"{type(error).__name__}: {first_line(error)}"[:200]
        row = {"op": name, "shape": str(sizes), "dtype": dtype, "mode": mode}
        return [{**row, "provider": "cdetr_fast: all", "not measured": reason}]


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a line for each cell: our best path, the best of the others, and their ratio."""
    lines = []
    grouped: dict[tuple, list[dict]] = {}
    for row in rows:
        key = (row["op"], row["shape"], row["dtype"], row["mode"])
        grouped.setdefault(key, []).append(row)
    for key, group in grouped.items():
        timed = [row for row in group if "ms" in row]
        ours = [row for row in timed if row["provider"].startswith("cdetr_fast")]
        others = [row for row in timed if row not in ours]
        our = min(ours, key=best_ms, default=None)
        their = min(others, key=best_ms, default=None)
        lines.append(
            {
                **dict(zip(("op", "shape", "dtype", "mode"), key, strict=True)),
                "ours": our and our["provider"].removeprefix("cdetr_fast "),
                "ms": our and best_ms(our),
                "best other": their and their["provider"],
                "its ms": their and best_ms(their),
                "times as fast": our and their and best_ms(their) / best_ms(our),
                "of the roofline": our and our["of the roofline"],
            }
        )
    return lines


def best_ms(row: dict[str, Any]) -> float:
    """Return the time of a row on the device: captured if that was possible and is faster."""
    return min(row["ms"], row.get("graph ms", row["ms"]))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="operators whose name contains this")
    parser.add_argument("--providers", default="", help="regular expression of providers' names")
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, help="default: all (CPU: the first of each operator)"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--tiny", action="store_true", help="sizes that take moments")
    parser.add_argument("--device", help="default: cuda if there is a GPU, else cpu")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=2.0, help="for one time, at most")
    parser.add_argument("--limit", type=float, help="seconds after which none is begun; exit 3")
    parser.add_argument("--list", action="store_true", help="say what would be measured")
    parser.add_argument("--into", type=Path, help="file of lines: sizes in it are not repeated")
    parser.add_argument("--output", help="name of the file in benchmarks/results to write")
    options = parser.parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cpu":
        torch.set_num_threads(options.threads)
    dtypes = options.dtypes or (None if device.type == "cpu" else list(DTYPES))
    stored = _stored(options.into)
    rows, started = [row for cell in stored.values() for row in cell], time.monotonic()
    unmeasured = 0
    for cell in cells(dtypes, options.only, tuple(options.modes), options.tiny):
        key = f"{key_of(cell)} {options.providers}"
        if options.list:
            print(key)
        if options.list or key in stored:
            continue
        if options.limit and time.monotonic() - started > options.limit:
            print("not measured, out of time:", key, flush=True)
            unmeasured += 1
            continue
        new = run_cell(cell, device, options.repeats, options.seconds, options.providers)
        if options.into:
            with options.into.open("a") as file:
                file.write(json.dumps({"cell": key, "rows": new}) + "\n")
        print(f"\n{key}")
        results.print_table([_short(row) for row in new])
        rows += new
    if options.list:
        return 0
    if not rows:
        print(f"--only {options.only}: no such operator", file=sys.stderr)
        return 2
    print()
    results.print_table(summary(rows))
    if options.output:
        command = results.command_line("ops", arguments)
        print("written to", results.save(options.output, rows, command))
    if unmeasured:
        return 3
    own = [row for row in rows if row["provider"].startswith("cdetr_fast")]
    return 1 if any("not measured" in row for row in own) else 0


def _stored(path: Path | None) -> dict[str, list[dict[str, Any]]]:
    if path is None or not path.is_file():
        return {}
    # A line without an end was cut off: that size is measured again.
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    lines = [line for line in lines if line.endswith("\n")]
    path.write_text("".join(lines), encoding="utf-8")
    found = [json.loads(line) for line in lines]
    return {cell["cell"]: cell["rows"] for cell in found}


def _short(row: dict[str, Any]) -> dict[str, Any]:
    names = ("provider", "ms", "p10", "p90", "graph ms", "peak MiB", "GB/s", "TFLOP/s",
             "of the roofline", "error", "torch's error", "not measured")  # fmt: skip
    return {name: row.get(name, "-") for name in names}


if __name__ == "__main__":
    sys.exit(main())
