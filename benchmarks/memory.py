"""Memory meter: what a call adds to the peak, on a GPU or in a process of its own."""

import contextlib
import ctypes
import multiprocessing
from collections.abc import Callable, Generator, Iterable
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
    with contextlib.closing(peaks_mib_of_process(_without_values, [None], make, *arguments)) as one:
        return next(one)


def peaks_mib_of_process(
    make: Callable[..., Callable[[Any], Callable[[], Any]]],
    values: Iterable[Any],
    *arguments: Any,
) -> Generator[float, None, None]:
    """Yield for each value the peak of resident memory of a new process beyond that at rest, MiB.

    A value is measured when its peak is asked for; closing the generator ends the process.

    Args:
        make: A function of a module, called with `arguments` in the process. It returns a function
            from a value to the call that is measured.
        values: In the order of their memory, as a process keeps some of what it once had.
        *arguments: Arguments of `make`; the process gets them pickled.

    Raises:
        RuntimeError: The process has ended.
    """
    context = multiprocessing.get_context("spawn")
    ours, its = context.Pipe()
    process = context.Process(target=_measure, args=(its, make, arguments))
    process.start()
    its.close()
    try:
        for value in values:
            ours.send((value,))
            yield ours.recv()
    except (BrokenPipeError, ConnectionResetError, EOFError):
        process.join()
        raise RuntimeError(f"{make.__name__}: the process ended with {process.exitcode}") from None
    finally:
        ours.close()
        process.join()


def _without_values(
    make: Callable[..., Callable[[], Any]], *arguments: Any
) -> Callable[[None], Callable[[], Any]]:
    call = make(*arguments)
    return lambda _: call


def _measure(connection: Connection, make: Callable, arguments: tuple) -> None:
    prepare = make(*arguments)
    before = _reset_peak()  # the peak so far is that of the preparations
    with contextlib.suppress(EOFError):  # there are no more values
        while True:
            (value,) = connection.recv()
            call = prepare(value)
            _reset_peak()
            call()
            connection.send((_peak_kib() - before) / 1024)


def _reset_peak() -> int:
    """Make the memory in use the peak of this process; return it in KiB."""
    with contextlib.suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _peak_kib()


def _peak_kib() -> int:
    """Return the peak of this process; getrusage would start at that of its parent."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    raise RuntimeError("/proc/self/status: expected a line VmHWM; peak memory needs Linux")


def available_mib() -> float:
    """Return the memory that a new process can have."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/meminfo: expected a line MemAvailable")


def memory_of(process: int) -> dict[str, float]:
    """Return the resident memory of a process in MiB.

    Returns:
        "RSS", all of it; "PSS", where pages that n processes have count 1/n; "anonymous PSS",
        likewise, without files such as libraries; "own", what no other process has.
    """
    found: dict[str, float] = {}
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]:
        name, amount = line.split()[:2]
        found[name.rstrip(":")] = int(amount) / 1024
    return {
        "RSS": found["Rss"],
        "PSS": found["Pss"],
        "anonymous PSS": found["Pss_Anon"],
        "own": found["Private_Clean"] + found["Private_Dirty"],
    }
