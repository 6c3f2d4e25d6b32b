"""Threads of a pipeline: everything in order, few items that wait, ends and errors."""

import itertools
import threading
from types import SimpleNamespace

import pytest

from cdetr_fast.common.pipeline import Ahead, Background


def never() -> bool:
    return False


class Source:
    """Counts the items that are asked for; endless without a number of them."""

    def __init__(self, items: int | None, error: Exception | None = None) -> None:
        self.made = 0
        self.closed = threading.Event()
        self._items = items
        self._error = error

    def __iter__(self):
        try:
            for i in itertools.count() if self._items is None else range(self._items):
                self.made += 1
                yield i
            if self._error is not None:
                raise self._error
        finally:
            self.closed.set()


def test_all_items_come_and_few_wait():
    source = Source(50)
    ahead = Ahead(iter(source), 3, False, never)
    for i, item in enumerate(ahead):
        assert item == i
        assert source.made <= i + 1 + 3 + 1  # used, waiting, and the one in hand
    assert (i, ahead.dropped) == (49, 0)
    assert source.closed.is_set()


def test_the_oldest_items_are_dropped():
    source = Source(50)
    ahead = Ahead(iter(source), 2, True, never)
    assert source.closed.wait(10)
    assert list(ahead) == [48, 49]
    assert ahead.dropped == 48


def test_errors_come_after_the_items_before_them():
    items = iter(Ahead(iter(Source(2, ValueError("broken"))), 4, False, never))
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(ValueError, match="broken"):
        next(items)


@pytest.mark.parametrize("drops", [False, True])
def test_endless_sources_stop(drops):
    source = Source(None)
    stop = SimpleNamespace(asked=False)
    ahead = Ahead(iter(source), 2, drops, lambda: stop.asked)
    items = iter(ahead)
    next(items)
    stop.asked = True
    assert next(items, None) is None
    assert not source.closed.is_set()
    ahead.close()
    assert source.closed.is_set()


def test_background():
    taken: list[int] = []
    with Background(taken.append, 2) as background:
        for i in range(9):
            background.put(i)
    assert taken == list(range(9))

    def fail(item: int) -> None:
        raise OSError(f"full at {item}")

    def put_many() -> None:
        with Background(fail, 2) as background:
            for i in range(1, 100):
                background.put(i)

    with pytest.raises(OSError, match="full at 1"):
        put_many()

    def put_one() -> None:
        with Background(fail, 2) as background:
            background.put(1)

    with pytest.raises(OSError, match="full at 1"):
        put_one()
