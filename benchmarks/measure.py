"""Shared by the benchmarks: interleaved timing, peak memory, the machine, JSON rows."""

import datetime
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(os.environ.get("CDETR_FAST_RESULTS", Path(__file__).parent / "results"))


def interleaved(
    providers: dict[str, Callable[[], Any]], repeats: int, warmup: int = 2
) -> dict[str, dict[str, float]]:
    """Time the providers in turns, so that a busy moment of the machine hits all of them.

    A call has ended when the GPU, if there is one, has nothing left to do.

    Returns:
        For each provider the median, the 95th percentile, the fastest and the slowest call, in
        milliseconds.
    """
    times = {name: [] for name in providers}
    for round_ in range(warmup + repeats):
        for name, call in providers.items():
            start = time.perf_counter()
            call()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            if round_ >= warmup:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {
        name: {
            "ms": statistics.median(values),
            "p95_ms": sorted(values)[math.ceil(0.95 * len(values)) - 1],
            "min_ms": min(values),
            "max_ms": max(values),
        }
        for name, values in times.items()
    }


def peak_memory(call: Callable[..., Any], *arguments: Any) -> dict[str, float]:
    """Run `call(*arguments)` in a process of its own.

    `call` returns a function; what that function adds to the process's peak is the result.

    Returns:
        Added peak memory in MiB, and the function's time in milliseconds.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_peak, args=(sender, call, arguments))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{call.__name__}: the process ended with {process.exitcode}") from None
    process.join()
    return result


def _measure_peak(sender, call: Callable, arguments: tuple) -> None:
    run = call(*arguments)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of the preparations
    before = _peak_kib()
    start = time.perf_counter()
    run()
    milliseconds = (time.perf_counter() - start) * 1e3
    after = _peak_kib()
    sender.send({"peak_mib": (after - before) / 1024, "ms": milliseconds})


def _peak_kib() -> int:
    """Peak resident memory of this process (not that of its parent, which getrusage starts at)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    raise RuntimeError("/proc/self/status: expected a line VmHWM; peak memory needs Linux")


def environment() -> dict[str, Any]:
    """Return what a reader needs to judge a figure: machine, versions, commit, command."""
    device = {}
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        device = {"device": torch.cuda.get_device_name(), "driver": _first_line(query)}
    return {
        "date": datetime.date.today().isoformat(),
        "command": "python -m " + " ".join(["benchmarks." + Path(sys.argv[0]).stem, *sys.argv[1:]]),
        "commit": _first_line(["git", "describe", "--always", "--dirty"]),
        "processor": _processor(),
        **device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in ("triton", "timm", "transformers")},
    }


def version(package: str) -> str | None:
    """Return the version of an installed package, None if it is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _first_line(command: list[str]) -> str | None:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.splitlines()[0].strip() if answer else None


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def save(name: str, rows: list[dict[str, Any]]) -> Path:
    """Write the rows and the environment to `benchmarks/results/<name>.json`."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")
    return path


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print rows of the same keys as aligned columns."""
    cells = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    cells.insert(0, list(rows[0]))
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
