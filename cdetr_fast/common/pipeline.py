"""Threads of a pipeline, with a bounded number of items that wait between them."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar

Item = TypeVar("Item")

_POLL_SECONDS = 0.1


class Ahead(Generic[Item]):
    """Iterates over items while a thread makes the next ones.

    Args:
        items: The source; closed at the end, by the thread.
        most: Items that may wait. The thread pauses when they do.
        drops: The thread drops the oldest item that waits instead: for live sources.
        stopped: Asked ten times a second; the iteration ends where it returns True.

    Attributes:
        dropped: Number of items that were dropped.
    """

    def __init__(
        self,
        items: Generator[Item, None, None],
        most: int,
        drops: bool,
        stopped: Callable[[], bool],
    ) -> None:
        self.dropped = 0
        self._items = items
        self._most = most
        self._drops = drops
        self._stopped = stopped
        self._waiting: deque[Item] = deque()
        self._changed = threading.Condition()
        self._closed = self._ended = False
        self._error: Exception | None = None
        # A daemon: nobody can interrupt a source that sends nothing.
        self._thread = threading.Thread(target=self._run, name="cdetr_fast-ahead", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Item]:
        while True:
            with self._changed:
                while not (self._waiting or self._ended or self._closed or self._stopped()):
                    self._changed.wait(_POLL_SECONDS)
                if self._closed or self._stopped():
                    return
                if not self._waiting:
                    if self._error is not None:
                        raise self._error
                    return
                item = self._waiting.popleft()
                self._changed.notify_all()
            yield item

    def close(self) -> None:
        """End the iteration and the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(1)

    def _run(self) -> None:
        try:
            for item in self._items:
                with self._changed:
                    if self._drops and len(self._waiting) >= self._most:
                        self._waiting.popleft()
                        self.dropped += 1
                    while len(self._waiting) >= self._most and not self._closed:
                        self._changed.wait()
                    if self._closed:
                        return
                    self._waiting.append(item)
                    self._changed.notify_all()
        except Exception as error:  # raised again where the items are used
            self._error = error
        finally:
            self._items.close()
            with self._changed:
                self._ended = True
                self._changed.notify_all()


class Background(Generic[Item]):
    """Calls a function with each item, in order, in a thread of its own.

    Leaving the context waits for the items that were put; errors of the function are raised by the
    next `put`, or then.

    Args:
        consume: The function.
        most: Items that may wait; `put` pauses when they do.
    """

    def __init__(self, consume: Callable[[Item], None], most: int) -> None:
        self._consume = consume
        self._items: queue.Queue[Item | None] = queue.Queue(most)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="cdetr_fast-writer")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def put(self, item: Item) -> None:
        """Queue an item for the function."""
        if self._error is not None:
            raise self._error
        self._items.put(item)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._items.put(None)
        self._thread.join()
        if error is None and self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (item := self._items.get()) is not None:
            if self._error is None:  # after an error the rest is taken, so that nobody waits
                try:
                    self._consume(item)
                except Exception as error:
                    self._error = error
