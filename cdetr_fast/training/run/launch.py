"""The processes of a run: shared errors, gathered values, and the launch they belong to."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist

from cdetr_fast.common.files import read_json, write_json
from cdetr_fast.training.errors import DataError

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")

_FILE = "launch.json"
_CLOCK_SLACK = 10  # seconds: a host's clock may be set between two starts


@contextlib.contextmanager
def shared_errors(accelerator: Accelerator) -> Iterator[None]:
    """Raise a DataError of one process on all of them: none waits for one that has left.

    The message comes from the first process, which all see; in the block no process may wait for
    another one after something that can raise.
    """
    error = None
    try:
        yield
    except DataError as own:
        error = own
    if accelerator.num_processes == 1:
        if error is not None:
            raise error
        return
    messages = all_gather_object(accelerator, None if error is None else str(error))
    for rank, message in enumerate(messages):
        if message is not None:
            prefix = f"process {rank}: " if rank > 0 else ""
            raise DataError(
                prefix + message, reported_elsewhere=not accelerator.is_main_process
            ) from error


def end_process_group() -> None:
    """End the process group, if there is one; a program that trains calls it last.

    Left to the interpreter's exit, a thread of gloo may ask for an interpreter that is gone,
    and abort a process whose work is done.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        # torch's caches of sharded parameters keep the group's threads. In torch 2.11 they need
        # the interpreter's lock to drop the last collective, and get it while this one sleeps.
        time.sleep(0.1)


def all_gather_object(accelerator: Accelerator | None, value: T) -> list[T]:
    """Return the values of all processes, in their order; None stands for a single process."""
    if accelerator is None or accelerator.num_processes == 1:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])


def agents(accelerator: Accelerator) -> list[dict[str, Any]]:
    """Return the agents of torchrun that started the processes; none without torchrun.

    An agent lives as long as the launch: it restarts the processes of its host. Neither the run id
    (the same for all launches if none is given) nor the number of restarts (0 again after hosts
    have joined or left) tells that.
    """
    own = None
    if "TORCHELASTIC_RUN_ID" in os.environ:
        import psutil

        parent = psutil.Process(os.getppid())
        own = {"host": socket.gethostname(), "pid": parent.pid, "started": parent.create_time()}
    return [agent for agent in all_gather_object(accelerator, own) if agent is not None]


def remember(folder: Path, agents: list[dict[str, Any]]) -> None:
    """Record the agents that own the run in this folder."""
    write_json(folder / _FILE, {"agents": agents})


def has_run(folder: Path, agents: list[dict[str, Any]]) -> bool:
    """Return whether one of the agents owns the run in this folder: this is a restart then."""
    path = folder / _FILE
    if not path.is_file():
        return False
    return any(_same(a, b) for a in read_json(path)["agents"] for b in agents)


def _same(agent: dict[str, Any], other: dict[str, Any]) -> bool:
    return (agent["host"], agent["pid"]) == (other["host"], other["pid"]) and (
        abs(agent["started"] - other["started"]) < _CLOCK_SLACK
    )
