"""The processes of a run: errors that all of them hear of, and which launch they belong to."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from cdetr_fast.common.files import read_json, write_json
from cdetr_fast.training.errors import DataError

_FILE = "launch.json"
_CLOCK_SLACK = 10  # seconds: a host's clock may be set between two starts


@contextlib.contextmanager
def shared_errors(accelerator: Any) -> Iterator[None]:
    """Raises a DataError of one process on all of them: none waits for one that has left.

    The message comes from the first process, which all see; in the block no process may wait for
    another one after what can raise.
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
    messages = everywhere(accelerator, None if error is None else str(error))
    failed = [rank for rank, message in enumerate(messages) if message is not None]
    if failed:
        prefix = f"process {failed[0]}: " if failed[0] > 0 else ""
        raise DataError(
            prefix + messages[failed[0]], said_elsewhere=not accelerator.is_main_process
        ) from error


def end_process_group() -> None:
    """End the process group, if there is one; a program that trains calls it last.

    Left to the interpreter's exit, a thread of gloo may ask for an interpreter that is no more,
    and abort a process whose work is done.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def everywhere(accelerator: Any, value: Any) -> list[Any]:
    """Returns the values of all processes, in their order."""
    if accelerator.num_processes == 1:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])


def agents(accelerator: Any) -> list[dict[str, Any]]:
    """Returns the agents of torchrun that started the processes; none without torchrun.

    An agent lives as long as the launch: it restarts the processes of its host. Neither the run id
    (the same for all launches if none is given) nor the number of restarts (0 again after hosts
    have joined or left) tells that.
    """
    own = None
    if "TORCHELASTIC_RUN_ID" in os.environ:
        import psutil

        parent = psutil.Process(os.getppid())
        own = {"host": socket.gethostname(), "pid": parent.pid, "started": parent.create_time()}
    return [agent for agent in everywhere(accelerator, own) if agent is not None]


def remember(folder: Path, agents: list[dict[str, Any]]) -> None:
    """Writes down who has the run in this folder."""
    write_json(folder / _FILE, {"agents": agents})


def has_run(folder: Path, agents: list[dict[str, Any]]) -> bool:
    """Whether the run in this folder is that of one of the agents, so that this is a restart."""
    path = folder / _FILE
    if not path.is_file():
        return False
    return any(_same(a, b) for a in read_json(path)["agents"] for b in agents)


def _same(agent: dict[str, Any], other: dict[str, Any]) -> bool:
    return (agent["host"], agent["pid"]) == (other["host"], other["pid"]) and (
        abs(agent["started"] - other["started"]) < _CLOCK_SLACK
    )
