"""Timer, and the rates that a device can reach at most."""

import functools

import torch

from benchmarks.memory import peak_mib as peak_mib
from cdetr_kernels.testing.timing import CPU as CPU
from cdetr_kernels.testing.timing import call_times as call_times
from cdetr_kernels.testing.timing import captured as captured
from cdetr_kernels.testing.timing import now as now
from cdetr_kernels.testing.timing import summarised as summarised
from cdetr_kernels.testing.timing import time_in_turns as time_in_turns


@functools.lru_cache
def copied_bytes_per_second(device: torch.device) -> float:
    """Measure a large copy: bytes read and written per second."""
    size = 2**30 if device.type == "cuda" else 2**27
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    times = call_times(lambda: target.copy_(source), device, repeats=20, seconds=2.0)
    return 2 * size / (times["ms"] / 1e3)


@functools.lru_cache
def multiplied_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Measure a large product of random matrices, as torch multiplies in `dtype`."""
    if device.type == "cuda":
        size = 8192 if dtype != torch.float32 else 4096
    else:
        size = 1024 if dtype == torch.float32 else 256  # halves take a slow path on most CPUs
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = call_times(lambda: a @ b, device, repeats=20, seconds=2.0)
    return 2 * size**3 / (times["ms"] / 1e3)
