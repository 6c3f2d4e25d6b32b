"""Micro-batches: what concurrent callers ask for is computed together, in one thread."""

import asyncio
import contextlib
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Computed(NamedTuple, Generic[Result]):
    """A result of `Batcher.submit`, with its times.

    Attributes:
        result: The result of the caller's item.
        waited: Seconds from `submit` to the start of the computation.
        seconds: Seconds of the computation.
        batch: Number of items that were computed together.
    """

    result: Result
    waited: float
    seconds: float
    batch: int


@dataclass(eq=False)
class _Waiting(Generic[Item, Result]):
    item: Item
    key: Hashable
    since: float
    future: asyncio.Future[Computed[Result]] = field(default_factory=asyncio.Future)


class Batcher(Generic[Item, Result]):
    """Computes the items of concurrent callers in batches, one batch at a time.

    The batch of the item that has waited longest is computed next. It starts when it is full, when
    its first item has waited for `max_wait`, or when no caller is on its way. All methods belong
    to the event loop; only `compute` runs in a thread, the same one for all batches.

    Args:
        compute: Returns the results of a list of items, in their order. If it raises for several
            items, each is computed alone, so that callers do not fail for each other.
        key: Items whose keys are equal may share a batch.
        size: Most items in a batch.
        max_wait: Seconds.
        observe: Called after each batch with its size and its seconds.
    """

    def __init__(
        self,
        compute: Callable[[list[Item]], list[Result]],
        key: Callable[[Item], Hashable],
        size: int,
        max_wait: float,
        observe: Callable[[int, float], None] = lambda size, seconds: None,
    ) -> None:
        self._compute, self._key, self._observe = compute, key, observe
        self._size, self._max_wait = size, max_wait
        self._waiting: list[_Waiting[Item, Result]] = []
        self._on_their_way = 0
        self._changed = asyncio.Event()
        self._closing = False
        self._started_at: float | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cdetr_fast-model")
        self._worker: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Number of items that wait; those that are being computed do not count."""
        return sum(not entry.future.done() for entry in self._waiting)

    @property
    def busy_seconds(self) -> float:
        """Seconds since the batch that is being computed was started; 0 without one."""
        if self._started_at is None:
            return 0.0
        return asyncio.get_running_loop().time() - self._started_at

    @property
    def closing(self) -> bool:
        """Whether `close` was called."""
        return self._closing

    def start(self) -> None:
        """Begin to compute."""
        self._worker = asyncio.get_running_loop().create_task(self._work())

    async def close(self) -> None:
        """Accept nothing more, compute what waits, and return when that is done."""
        self._closing = True
        self._changed.set()
        if self._worker is not None:
            await self._worker
        self._thread.shutdown()

    @contextlib.contextmanager
    def expect_item(self) -> Iterator[None]:
        """Make batches wait, at most for `max_wait`, for the item that will be submitted inside."""
        self._on_their_way += 1
        try:
            yield
        finally:
            self._on_their_way -= 1
            self._changed.set()

    async def submit(self, item: Item) -> Computed[Result]:
        """Compute an item; an item whose caller is cancelled while it waits is not computed.

        Raises:
            RuntimeError: The batcher was closed.
            Exception: Whatever `compute` raises for this item alone.
        """
        if self._closing:
            raise RuntimeError("the batcher was closed")
        now = asyncio.get_running_loop().time()
        entry: _Waiting[Item, Result] = _Waiting(item, self._key(item), now)
        self._waiting.append(entry)
        self._changed.set()
        return await entry.future

    async def _work(self) -> None:
        while batch := await self._next_batch():
            await self._run(batch)

    async def _next_batch(self) -> list[_Waiting[Item, Result]]:
        """Return the next batch; an empty one when all is done after `close`."""
        loop = asyncio.get_running_loop()
        while True:
            self._changed.clear()
            self._waiting = [entry for entry in self._waiting if not entry.future.done()]
            seconds: float | None = None
            if self._waiting:
                first = self._waiting[0]
                batch = [entry for entry in self._waiting if entry.key == first.key][: self._size]
                seconds = first.since + self._max_wait - loop.time()
                is_complete = len(batch) == self._size or self._on_their_way <= len(self._waiting)
                if is_complete or seconds <= 0 or self._closing:
                    self._waiting = [entry for entry in self._waiting if entry not in batch]
                    return batch
            elif self._closing:
                return []
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), seconds)

    async def _run(self, batch: list[_Waiting[Item, Result]]) -> None:
        batch = [entry for entry in batch if not entry.future.done()]
        if not batch:
            return
        loop = asyncio.get_running_loop()
        self._started_at = started_at = loop.time()
        try:
            items = [entry.item for entry in batch]
            results = await loop.run_in_executor(self._thread, self._compute, items)
            if len(results) != len(items):
                raise RuntimeError(f"compute: expected {len(items)} results, got {len(results)}")
        except Exception as error:
            if len(batch) == 1:
                if not batch[0].future.done():
                    batch[0].future.set_exception(error)
                return
            for entry in batch:
                await self._run([entry])
            return
        finally:
            seconds = loop.time() - started_at
            self._started_at = None
        self._observe(len(batch), seconds)
        for entry, result in zip(batch, results, strict=True):
            if not entry.future.done():
                waited = started_at - entry.since
                entry.future.set_result(Computed(result, waited, seconds, len(batch)))
