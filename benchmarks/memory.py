"""Memory meter: what a call adds to the peak, on a GPU or in a process of its own."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch


def peak_mib(call: Callable[[], Any], device: torch.device) -> float | None:
    """Return the memory that a call allocates on a GPU beyond what is in use; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def peak_mib_of_process(make: Callable[..., Callable[[], Any]], *arguments: Any) -> float:
    """Return what a call adds to the peak of resident memory of a new process, in MiB.

    Args:
        make: A function of a module, called with `arguments` in the process; what it returns is
            measured.
        *arguments: Arguments of `make`; the process gets them pickled.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, make, arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{make.__name__}: the process ended with {process.exitcode}") from None
    finally:
        process.join()


def _measure(sender: Connection, make: Callable, arguments: tuple) -> None:
    call = make(*arguments)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of the preparations
    before = _peak_kib()
    call()
    sender.send((_peak_kib() - before) / 1024)


def _peak_kib() -> int:
    """Return the peak of this process; getrusage would start at that of its parent."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    raise RuntimeError("/proc/self/status: expected a line VmHWM; peak memory needs Linux")
