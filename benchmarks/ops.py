"""Microbenchmarks of the operators: ours by backend against what else computes the same.

    python -m benchmarks.ops --only conditional_attention --dtypes bf16 fp32
    python -m benchmarks.ops --list

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

from benchmarks import accuracy, criterion_works, measure, timing, works
from benchmarks.works import Work

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MAPS = {1050: {"height": 25, "width": 42}, 4200: {"height": 50, "width": 84}}
MODES = ("forward", "forward and backward")


def _attention_shapes(batches, maps, masks=(False, True)) -> list[dict[str, Any]]:
    return [
        {"batch": batch, **MAPS[keys], "masked": masked}
        for masked in masks
        for batch in batches
        for keys in maps
    ]


# An operator is an entry here: what makes its work, and its sizes, the most telling ones first.
WORKS: dict[str, tuple[Callable[..., Work], list[dict[str, Any]]]] = {
    "conditional_attention": (
        works.conditional_attention,
        _attention_shapes((1, 8, 32), (1050, 4200)),
    ),
    "conditional_attention_separable": (
        works.conditional_attention_separable,
        _attention_shapes((1, 8), (1050,), (True,)),
    ),
    "encoder_self_attention": (
        works.conditional_attention,
        [
            {**shape, "queries": None}
            for shape in _attention_shapes((1, 8), (1050,)) + _attention_shapes((1,), (4200,))
        ],
    ),
    "cross_attention_module": (
        works.cross_attention_module,
        _attention_shapes((1, 8, 32), (1050,), (True,)),
    ),
    "sine_position_2d": (
        works.sine_position_2d,
        [{"batch": batch, **MAPS[1050]} for batch in (1, 8, 32)],
    ),
    "sine_query": (works.sine_query, [{"batch": batch} for batch in (1, 8, 32)]),
    "residual_layer_norm": (
        works.residual_layer_norm,
        [{"batch": batch, "rows": rows} for batch in (1, 8, 32) for rows in (300, 1050)],
    ),
    "matching_cost": (
        criterion_works.matching_cost,
        [{"batch": 8, "targets": 7}, {"batch": 8, "targets": 100}],
    ),
    "set_loss": (
        criterion_works.set_loss,
        [{"batch": 8, "targets": 7}, {"batch": 8, "targets": 100}],
    ),
    "detection_topk": (criterion_works.detection_topk, [{"batch": 1}, {"batch": 32}]),
}
WITHOUT_GRADIENT = ("sine_position_2d", "residual_layer_norm", "matching_cost", "detection_topk")
# Sizes at which everything takes moments, also in triton's interpreter.
TINY: dict[str, dict[str, Any]] = {
    "conditional_attention": {"batch": 1, "queries": 20, "height": 5, "width": 8, "masked": True},
    "conditional_attention_separable": {"batch": 1, "queries": 20, "height": 5, "width": 8},
    "encoder_self_attention": {"batch": 1, "queries": None, "height": 4, "width": 9},
    "cross_attention_module": {"batch": 1, "queries": 20, "height": 5, "width": 8, "masked": True},
    "sine_position_2d": {"batch": 1, "height": 3, "width": 5},
    "sine_query": {"batch": 1, "queries": 9},
    "residual_layer_norm": {"batch": 1, "rows": 9},
    "matching_cost": {"batch": 2, "queries": 20, "targets": 3},
    "set_loss": {"batch": 2, "queries": 20, "targets": 3},
    "detection_topk": {"batch": 1, "queries": 20, "k": 10},
}


def measured(
    work: Work,
    mode: str,
    repeats: int,
    seconds: float,
    providers: str = "",
) -> Iterator[dict[str, Any]]:
    """Yields a row for each provider whose name matches: its times, or why there are none."""
    # A compiled provider would give up compiling at its eighth shape.
    torch.compiler.reset()
    backward = mode != "forward"
    judge = accuracy.Judge(work, backward)
    floor = _floor_seconds(work, backward)
    for name, make in work.providers.items():
        if not re.search(providers, name):
            continue
        row = {
            "op": work.op,
            "shape": work.shape,
            "dtype": str(work.dtype).removeprefix("torch."),
            "mode": mode,
            "provider": name,
        }
        try:
            row |= _measured(work, name, make(), judge, backward, floor, repeats, seconds)
        except Exception as error:  # whatever it is, the others go on
            row["not measured"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        if work.device.type == "cuda":
            torch.cuda.empty_cache()
        yield row


def _measured(work, name, function, judge, backward, floor, repeats, seconds) -> dict[str, Any]:
    errors = judge.errors(judge.evaluate(function))
    factor = accuracy.factor(name)
    worst = max(errors, key=lambda x: x.error / (factor * x.torchs + x.floor))
    row = {"error": worst.error, "torch's error": worst.torchs, "worst": worst.name}
    if not all(x.passes(factor) for x in errors):
        return row | {"not measured": "fails the check of accuracy"}

    inputs = {
        key: x.detach().requires_grad_() if backward and key in work.gradients else x
        for key, x in work.inputs.items()
    }
    leaves = [inputs[key] for key in work.gradients]
    grads = judge.grads

    def forward():
        with torch.no_grad():
            return function(**inputs)

    def step():
        outputs = accuracy.tensors(function(**inputs))
        return torch.autograd.grad(outputs, leaves, grads)

    call = step if backward else forward
    device = work.device
    row["peak MiB"] = timing.peak_mib(call, device)
    row |= timing.call_times(call, device, repeats, seconds)
    best = row["ms"]
    if device.type == "cuda" and name not in work.uncapturable:
        try:
            replay = timing.captured(call)
            times = timing.call_times(replay, device, repeats, seconds)
            row |= {f"graph {key}": x for key, x in times.items()}
            best = min(best, times["ms"])
        except Exception as error:  # not every provider can be captured
            row["not captured"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    row["GB/s"] = work.moved[backward] / best / 1e6
    row["TFLOP/s"] = work.operations[backward] / best / 1e9
    row["of the roofline"] = floor / (best / 1e3)
    return row


def _floor_seconds(work: Work, backward: bool) -> float:
    """No version is faster: its bytes at the rate of a copy, or its products at a matmul's."""
    seconds = work.moved[backward] / timing.copied_bytes_per_second(work.device)
    if work.operations[backward]:
        rate = timing.multiplied_flops_per_second(work.device, work.dtype)
        seconds = max(seconds, work.operations[backward] / rate)
    return seconds


def cells(
    dtypes: list[str], only: str = "", modes: tuple[str, ...] = MODES, tiny: bool = False
) -> Iterator[tuple[str, dict[str, Any], str, str]]:
    """Yields operator, sizes, dtype and mode, first a size of each operator, then the rest."""
    named = {
        name: [TINY[name]] if tiny else sizes for name, (_, sizes) in WORKS.items() if only in name
    }
    for i in range(max((len(sizes) for sizes in named.values()), default=0)):
        for dtype in dtypes:
            for name, sizes in named.items():
                if i >= len(sizes) or (name == "detection_topk" and dtype != "fp32"):
                    continue  # halves tie, and then any order of labels is right
                for mode in modes:
                    if mode == "forward" or name not in WITHOUT_GRADIENT:
                        yield name, sizes[i], dtype, mode


def key_of(cell: tuple[str, dict[str, Any], str, str]) -> str:
    """A name for a cell, to know it again in a file of results."""
    name, sizes, dtype, mode = cell
    return " ".join([name, *(f"{k}={v}" for k, v in sizes.items()), dtype, mode])


def run_cell(
    cell: tuple[str, dict[str, Any], str, str],
    device: torch.device,
    repeats: int,
    seconds: float,
    providers: str = "",
) -> list[dict[str, Any]]:
    """Measures the providers of one cell; what fails as a whole is a row that says so."""
    name, sizes, dtype, mode = cell
    try:
        work = WORKS[name][0](DTYPES[dtype], device, **sizes)
        return list(measured(work, mode, repeats, seconds, providers))
    except Exception as error:  # such as too little memory for the reference
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        row = {"op": name, "shape": str(sizes), "dtype": dtype, "mode": mode}
        return [{**row, "provider": "cdetr_fast: all", "not measured": reason}]


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each cell: our best path, the best of the others, and their ratio."""
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
    """The time of a row on the device: captured if that was possible and is faster."""
    return min(row["ms"], row.get("graph ms", row["ms"]))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="operators whose name contains this")
    parser.add_argument("--providers", default="", help="regular expression of providers' names")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: all (CPU: fp32)")
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
    dtypes = options.dtypes or (["fp32"] if device.type == "cpu" else list(DTYPES))
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
        measure.print_table([_short(row) for row in new])
        rows += new
    if options.list:
        return 0
    if not rows:
        print(f"--only {options.only}: no such operator", file=sys.stderr)
        return 2
    print()
    measure.print_table(summary(rows))
    if options.output:
        print("written to", measure.save(options.output, rows))
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
