"""Data loaders, and how their worker processes end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from cdetr_fast.training.data.dataset import Batch, Collate
from cdetr_fast.training.data.sampling import ImageRequest


def make_loader(
    dataset: Dataset[Any],
    sampler: Sampler[list[ImageRequest]] | None,
    workers: int,
    multiple: int,
    pin_memory: bool,
    persistent: bool = True,
) -> DataLoader[Any]:
    """Return a loader of `Batch`; it leaves the random numbers of the process alone.

    Args:
        dataset: Images, or batches if it is a stream.
        sampler: Batches of images; None for a stream.
        workers: Processes that load; 0 = the calling one.
        multiple: Heights and widths of batches are rounded up to it; a stream does that itself.
        pin_memory: Whether batches go to pinned memory.
        persistent: Whether the workers stay for the next epoch. Those of a loader that is read once
            must not: whenever the garbage collector finds it, its workers may be past being told to
            end, and the run waits for them until they are killed.
    """
    is_stream = isinstance(dataset, IterableDataset)
    return DataLoader(
        dataset,
        batch_size=None if is_stream else 1,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=None if is_stream else Collate(multiple),
        pin_memory=pin_memory,
        persistent_workers=persistent and workers > 0,
        worker_init_fn=initialize_worker,
        # Workers take their base seed from here; nothing random in them depends on it.
        generator=torch.Generator().manual_seed(0),
    )


def initialize_worker(worker: int) -> None:
    """Make a worker survive a signal to its process group, but not the end of its run.

    SIGTERM ends it if its run sends it, as torch does to workers that hang. From others, who send
    it to all processes of the run, it has no effect: the run saves its state first, after a step
    that may take a minute on a CPU. After a kill -9 torch's workers end when their parent process
    has changed. That never happens to workers of a fork server (the default from Python 3.14 on):
    each would keep its memory.
    """
    run = multiprocessing.parent_process()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if run is None:
        return
    waits = [_exit_after]
    if hasattr(signal, "sigwaitinfo"):  # macOS has none
        waits.append(_exit_when_told)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # of the threads below too
    for wait in waits:
        threading.Thread(target=wait, args=(run,), daemon=True).start()


def _exit_after(run: BaseProcess) -> None:
    connection.wait([run.sentinel])
    os._exit(1)


def _exit_when_told(run: BaseProcess) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != run.pid:
        pass
    os._exit(1)


def grouped(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """Yield lists of `size` consecutive batches: those of a step."""
    step: list[Batch] = []
    for batch in batches:
        step.append(batch)
        if len(step) == size:
            yield step
            step = []
