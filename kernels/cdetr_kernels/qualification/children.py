"""Child processes that run tasks: what they do to themselves is an outcome, and nothing else."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cdetr_kernels.evidence import Choice
from cdetr_kernels.qualification.plan import CHECK, Level, Task

CRASHED, TIMED_OUT, OUT_OF_TIME = "crashed", "timed out", "out of time"
NOT_TRIED = "not tried"
_START_SECONDS = 120.0  # torch on a slow disk
_SLICE = 0.5  # seconds of waiting at a time
_MOST_FAILURES = 3
_LIBRARIES = str(Path(__file__).parents[2])


@dataclass(frozen=True)
class Outcome:
    """Result of a task, or what went wrong.

    Args:
        task: The task.
        rows: What the child process has found, a row for each mode.
        verdict: What went wrong if there are no rows.
        reason: Details of that.
    """

    task: Task
    rows: tuple[dict[str, Any], ...] = ()
    verdict: str = ""
    reason: str = ""


class _Ended(Exception):
    """The child process has ended."""


class Unusable(RuntimeError):
    """No child process can work on the device, which says nothing about a kernel."""


def identity(device: torch.device) -> str:
    """Return what a GPU is called whatever its number is in a process; "" off GPUs."""
    if device.type != "cuda":
        return ""
    return str(torch.cuda.get_device_properties(device).uuid)


class Child:
    """A process that has imported all it needs and waits for its tasks.

    Args:
        device: Where it works.
        level: How long it times.
    """

    def __init__(self, device: torch.device, level: Level) -> None:
        self.options = {
            "device": str(device),
            "identity": identity(device),
            "repeats": level.repeats,
            "timing_seconds": level.timing_seconds,
        }
        self.received = b""
        self.log = tempfile.TemporaryFile()  # noqa: SIM115, closed by `close`
        self.reader, writer = os.pipe()
        paths = (_LIBRARIES, os.environ.get("PYTHONPATH"))
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONFAULTHANDLER": "1",
            "CDETR_FAST_BACKEND": "auto",
        }
        # -P: the current folder is the user's, and may hold modules of any name.
        command = [sys.executable, "-P", "-m", "cdetr_kernels.qualification.worker", str(writer)]
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=self.log,
                stderr=self.log,
                pass_fds=(writer,),
                env=environment,
                start_new_session=True,
            )
        finally:
            os.close(writer)

    def submit(self, tasks: Sequence[Task], tiles: dict[str, Choice], **more: int) -> None:
        """Hand over tasks, to be run with some tiles other than those of the table."""
        job = self.options | {"tiles": tiles, "tasks": [task.to_json() for task in tasks]} | more
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died; `receive` says so
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()

    def receive(self, seconds: float) -> dict[str, Any] | None:
        """Return the next message, None if there is none for so long.

        Time in which the machine was suspended does not count.

        Raises:
            _Ended: The process has ended.
        """
        left = seconds
        while b"\n" not in self.received:
            began = time.monotonic()
            ready, _, _ = select.select([self.reader], [], [], max(0.0, min(left, _SLICE)))
            if not ready:
                left -= min(time.monotonic() - began, 2 * _SLICE)
                if left <= 0.0:
                    return None
                continue
            read = os.read(self.reader, 65536)
            if not read:
                raise _Ended
            self.received += read
        line, self.received = self.received.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        return message

    def obituary(self) -> str:
        """Return how the process has ended, and its last words."""
        code = self.process.wait()
        how = f"exit status {code}"
        if code < 0:
            how = f"killed by {signal.Signals(-code).name}"
        self.log.seek(0)
        lines = [x for x in self.log.read().decode(errors="replace").splitlines() if x.strip()]
        return how if not lines else f"{how}: {lines[-1].strip()[:200]}"

    def close(self) -> None:
        """End the process, whatever it does.

        Raises:
            TimeoutError: It cannot be ended: it hangs in the driver.
        """
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        os.close(self.reader)
        self.log.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            raise TimeoutError("a process hangs in the driver and cannot be ended") from None


class Children:
    """Child processes one after the other, each started while the one before works.

    Args:
        device: Where they work.
        level: Of the qualification.
    """

    def __init__(self, device: torch.device, level: Level) -> None:
        self.device, self.level = device, level
        self.spare: Child | None = Child(device, level)
        self.hung = ""
        self.have_worked = False

    def __enter__(self) -> "Children":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.spare is not None:
            self.spare.close()

    def run(
        self,
        tasks: Sequence[Task],
        deadline: float,
        tiles: dict[str, Choice] | None = None,
        *,
        are_last: bool = False,
    ) -> Iterator[Outcome]:
        """Yield the outcome of each task, in their order, in a process of their own.

        What ends or hangs is an outcome, and the tasks after it get another process. Where that was
        a check, the other tasks of the same path and dtype are not tried. After the last tasks no
        further process is made ready.

        Raises:
            Unusable: A process has ended before its first task, and none has begun one yet.
        """
        left = deque(tasks)
        failures = 0
        spoiled: set[tuple[str, str]] = set()
        while left:
            if (left[0].path, left[0].dtype) in spoiled:
                yield Outcome(left.popleft(), (), NOT_TRIED, "a check has ended its process")
                continue
            if self.hung or failures >= _MOST_FAILURES:
                reason = self.hung or f"{failures} tasks before it have ended their processes"
                yield from (Outcome(task, (), NOT_TRIED, reason) for task in left)
                return
            if time.monotonic() >= deadline:
                yield from (Outcome(task, (), OUT_OF_TIME) for task in left)
                return
            child = self.spare or Child(self.device, self.level)
            self.spare = None if are_last else Child(self.device, self.level)
            try:
                child.submit(list(left), tiles or {})
                for outcome in self._supervised(child, left, deadline):
                    if outcome.verdict in (CRASHED, TIMED_OUT):
                        failures += 1
                        if outcome.task.what == CHECK:
                            spoiled.add((outcome.task.path, outcome.task.dtype))
                    yield outcome
            finally:
                try:
                    child.close()
                except TimeoutError as error:
                    self.hung = str(error)

    def _supervised(self, child: Child, left: deque[Task], deadline: float) -> Iterator[Outcome]:
        """Yield outcomes until the process ends or has to be ended; take their tasks from `left`.

        The process says when it begins a task and when it is done.
        """
        limit = _START_SECONDS
        while left:
            seconds = max(0.0, min(limit, deadline - time.monotonic()))
            try:
                message = child.receive(seconds)
            except _Ended:
                if not self.have_worked:
                    raise Unusable(
                        f"a process for the checks cannot work on {self.device}: {child.obituary()}"
                    ) from None
                yield Outcome(left.popleft(), (), CRASHED, child.obituary())
                return
            if message is None:
                if seconds >= limit:
                    reason = f"nothing after {limit:.0f} s"
                    yield Outcome(left.popleft(), (), TIMED_OUT, reason)
                return  # out of time as a whole, or another process for the rest
            self.have_worked = True
            limit = self.level.task_seconds
            if "rows" in message:
                yield Outcome(left.popleft(), tuple(message["rows"]))
                if message["fatal"]:  # nothing works in a process after an illegal access
                    return
