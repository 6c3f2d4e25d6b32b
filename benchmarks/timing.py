"""Times of one call on a device, with a cold L2, and the most that the device can do."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

# Larger than any L2 or last-level cache that it has to empty.
FLUSHED_BYTES = 256 * 2**20


def call_times(
    call: Callable[[], Any], device: torch.device, repeats: int, seconds: float
) -> dict[str, float]:
    """Times `call()`: median, 10th and 90th percentile in milliseconds, and how many calls.

    Before each call a buffer larger than the caches is written. On a GPU the times are those
    between two events on the current stream.

    Args:
        call: What is timed. Its result is dropped.
        device: Where it works.
        repeats: How often it is called.
        seconds: Calls stop when they have taken this long, but not before the tenth.
    """
    times = (_gpu_times if device.type == "cuda" else _cpu_times)(call, device, repeats, seconds)
    # Of a single one twice: there are no deciles of one number.
    deciles = statistics.quantiles(
        times * 2 if len(times) == 1 else times, n=10, method="inclusive"
    )
    return {"ms": statistics.median(times), "p10": deciles[0], "p90": deciles[-1], "n": len(times)}


def now() -> float:
    """Seconds. With one thread processor time, which other processes lengthen least."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def _gpu_times(call, device, repeats, seconds) -> list[float]:
    buffer = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)
    for _ in range(3):
        call()
    # Not read back one by one: the host stays ahead of the device.
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda.synchronize(device)
    started, measured = time.perf_counter(), 0
    for before, after in events:
        buffer.zero_()
        before.record()
        call()
        after.record()
        measured += 1
        if measured % 10 == 0:
            after.synchronize()
            if time.perf_counter() - started > seconds:
                break
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) for before, after in events[:measured]]


def _cpu_times(call, device, repeats, seconds) -> list[float]:
    del device
    buffer = torch.empty(FLUSHED_BYTES // 4, dtype=torch.int8)
    call()
    times, started = [], time.perf_counter()
    while len(times) < repeats and (len(times) < 10 or time.perf_counter() - started < seconds):
        buffer.zero_()
        before = now()
        call()
        times.append((now() - before) * 1e3)
    return times


def captured(call: Callable[[], Any]) -> Callable[[], None]:
    """Returns the replay of `call()`, captured as a CUDA graph: its time without the host's."""
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


def peak_mib(call: Callable[[], Any], device: torch.device) -> float | None:
    """Returns the memory that `call()` allocates at most beyond what is there; None on CPUs."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


@functools.lru_cache
def copied_bytes_per_second(device: torch.device) -> float:
    """Measures a large copy: bytes read and written in a second."""
    size = 2**30 if device.type == "cuda" else 2**27
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    times = call_times(lambda: target.copy_(source), device, repeats=20, seconds=2.0)
    return 2 * size / (times["ms"] / 1e3)


@functools.lru_cache
def multiplied_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Measures a large product of matrices of random numbers, as torch multiplies in `dtype`."""
    if device.type == "cuda":
        size = 8192 if dtype != torch.float32 else 4096
    else:
        size = 1024 if dtype == torch.float32 else 256  # halves take a slow path on most CPUs
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = call_times(lambda: a @ b, device, repeats=20, seconds=2.0)
    return 2 * size**3 / (times["ms"] / 1e3)
