"""Timers of calls: several in turns, with cold caches, and as a replayed graph."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

CPU = torch.device("cpu")
# Larger than any L2 or last-level cache that it has to empty.
FLUSHED_BYTES = 256 * 2**20

Call = Callable[[], Any]


def time_in_turns(
    calls: Mapping[str, Call],
    repeats: int,
    *,
    warmup: int = 1,
    device: torch.device = CPU,
    cold: bool = False,
    seconds: float = math.inf,
) -> dict[str, dict[str, float]]:
    """Time calls in turns, so that a busy moment of the machine hits all of them.

    Args:
        calls: Each is called once per round; results are dropped.
        repeats: Timed rounds.
        warmup: Rounds before them.
        device: Where the calls work. A call has ended when its GPU is idle.
        cold: Write a buffer larger than the caches before each call, and leave the time of the host
            out: on a GPU by events, on a CPU with one thread by processor time.
        seconds: No round begins after this long, but ten are timed in any case.

    Returns:
        The statistics of each call in milliseconds, see `summarised`.
    """
    stopwatch = _stopwatch(device, cold)
    for _ in range(warmup):
        for call in calls.values():
            call()
    samples: dict[str, list[Any]] = {name: [] for name in calls}
    started = time.perf_counter()
    for round_ in range(repeats):
        for name, call in calls.items():
            samples[name].append(stopwatch.run(call))
        # Not after every round: the host stays ahead of a GPU.
        if round_ % 10 == 9:
            stopwatch.wait()
            if time.perf_counter() - started > seconds:
                break
    stopwatch.wait()
    return {name: summarised(map(stopwatch.milliseconds, taken)) for name, taken in samples.items()}


def call_times(call: Call, device: torch.device, repeats: int, seconds: float) -> dict[str, float]:
    """Time one call with cold caches; arguments and result as of `time_in_turns`."""
    warmup = 3 if device.type == "cuda" else 1
    return time_in_turns(
        {"": call}, repeats, warmup=warmup, device=device, cold=True, seconds=seconds
    )[""]


def summarised(milliseconds: Iterable[float]) -> dict[str, float]:
    """Return the median, the fastest, the 95th percentile, the slowest and the number of times."""
    taken = sorted(milliseconds)
    return {
        "ms": statistics.median(taken),
        "min_ms": taken[0],
        "p95_ms": taken[math.ceil(0.95 * len(taken)) - 1],
        "max_ms": taken[-1],
        "calls": len(taken),
    }


def now() -> float:
    """Return seconds: with one thread processor time, which other processes lengthen least."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


class _WallClock:
    """Times from the call to the end of the work on the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def run(self, call: Call) -> float:
        start = time.perf_counter()
        call()
        self.wait()
        return 1e3 * (time.perf_counter() - start)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def milliseconds(self, taken: float) -> float:
        return taken


class _ColdCpu(_WallClock):
    """Times with caches that hold something else."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.buffer = torch.empty(FLUSHED_BYTES // 4, dtype=torch.int8)

    def run(self, call: Call) -> float:
        self.buffer.zero_()
        start = now()
        call()
        return 1e3 * (now() - start)


class _ColdGpu(_WallClock):
    """Times between two events on the current stream, after a buffer larger than L2 is written."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.buffer = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)

    def run(self, call: Call) -> Any:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.buffer.zero_()
        before.record()
        call()
        after.record()
        return before, after

    def milliseconds(self, taken: Any) -> float:
        before, after = taken
        return before.elapsed_time(after)


def _stopwatch(device: torch.device, cold: bool) -> _WallClock:
    if not cold:
        return _WallClock(device)
    return _ColdGpu(device) if device.type == "cuda" else _ColdCpu(device)


def captured(call: Call) -> Callable[[], None]:
    """Return the replay of a call, captured as a CUDA graph: its time without the host's."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
