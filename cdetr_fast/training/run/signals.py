"""Signals that ask a run to end: pre-emptible hosts send SIGTERM, people press Ctrl-C."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing import connection
from types import FrameType

_GRACE_OF_WORKERS = 20  # seconds; hosts give the whole job about 30


class StopSignals:
    """Remembers SIGTERM and the first SIGINT, so that the run saves its state and then ends."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._old: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # pressed twice: at once
        self.received = number


def outlive_in_worker(worker: int) -> None:
    """Lets a loading process live on after a signal to the whole group, but not after its run.

    The main process ends it after it has saved its state; if it does not, SIGTERM counts later.
    After a kill -9, torch's workers end when their parent process has changed. Started by a fork
    server (the default from Python 3.14 on) that never happens: each would keep its memory.
    """
    run = multiprocessing.parent_process()
    if run is not None:
        threading.Thread(target=_end_with, args=(run.sentinel,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_OF_WORKERS))


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
