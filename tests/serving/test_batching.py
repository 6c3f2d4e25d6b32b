"""Micro-batches with a model that only records what it is asked for."""

import asyncio
import threading
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.threads import until

from cdetr_fast.serving.batching import Batcher


class Recorder:
    """Doubles numbers; blocks while `free` is not set; raises for the items in `wrong`."""

    def __init__(self, wrong=()):
        self.batches, self.threads, self.wrong = [], set(), set(wrong)
        self.free = threading.Event()
        self.free.set()

    def __call__(self, items):
        self.batches.append(items)
        self.threads.add(threading.get_ident())
        assert self.free.wait(10)
        if bad := self.wrong.intersection(items):
            raise ValueError(f"cannot double {sorted(bad)}")
        return [2 * item for item in items]


def parity(item):
    return item % 2


@given(
    items=st.lists(st.integers(0, 9), max_size=20),
    size=st.integers(1, 5),
    max_wait=st.sampled_from([0, 0.002]),
    wrong=st.sets(st.integers(0, 9), max_size=2),
)
def test_everyone_gets_their_own_result(items, size, max_wait, wrong):
    model, observed = Recorder(wrong), []

    async def main():
        batcher = Batcher(model, parity, size, max_wait, lambda n, _: observed.append(n))
        batcher.start()
        answers = asyncio.gather(*map(batcher.submit, items), return_exceptions=True)
        await asyncio.sleep(0)
        await batcher.close()
        return await answers

    for item, answer in zip(items, asyncio.run(main()), strict=True):
        if item in wrong:
            assert str(answer) == f"cannot double [{item}]"
        else:
            assert answer.result == 2 * item
            assert 1 <= answer.batch <= size
    assert len(model.threads) <= 1
    for batch in model.batches:
        assert len(batch) <= size
        assert len(set(map(parity, batch))) == 1
    if not wrong:
        assert sum((Counter(batch) for batch in model.batches), Counter()) == Counter(items)
        assert sum(observed) == len(items)


def test_items_that_wait_for_the_model_share_the_next_batch():
    model = Recorder()
    model.free.clear()

    async def main():
        batcher = Batcher(model, parity, 3, 0)
        batcher.start()
        first = asyncio.ensure_future(batcher.submit(0))
        await until(lambda: model.batches)
        rest = [asyncio.ensure_future(batcher.submit(item)) for item in (1, 2, 3, 4, 6, 8)]
        await until(lambda: batcher.waiting == 6)
        assert batcher.busy_seconds > 0
        model.free.set()
        await asyncio.gather(first, *rest)
        assert batcher.busy_seconds == 0
        await batcher.close()

    asyncio.run(main())
    assert model.batches == [[0], [1, 3], [2, 4, 6], [8]]  # the oldest item's kind comes first


def test_nobody_waits_for_company_that_is_not_coming():
    async def main():
        batcher = Batcher(Recorder(), parity, 8, max_wait=60)
        batcher.start()
        with batcher.expect_item():
            computed = await batcher.submit(1)
        assert computed.batch == 1
        assert computed.waited < 30
        await batcher.close()

    asyncio.run(main())


@pytest.mark.parametrize("arrives", [True, False])
def test_a_batch_waits_for_an_item_on_its_way(arrives):
    model = Recorder()

    async def main():
        batcher = Batcher(model, parity, 8, max_wait=60)
        batcher.start()
        with batcher.expect_item():
            first = asyncio.ensure_future(batcher.submit(1))
            with batcher.expect_item():
                await asyncio.sleep(0.02)
                assert model.batches == []
                second = asyncio.ensure_future(batcher.submit(3)) if arrives else None
                if second:
                    assert (await second).batch == 2
            assert (await first).batch == 1 + arrives
        await batcher.close()

    asyncio.run(main())
    assert model.batches == ([[1, 3]] if arrives else [[1]])


def test_the_wait_for_company_ends():
    async def main():
        batcher = Batcher(Recorder(), parity, 8, max_wait=0.02)
        batcher.start()
        with batcher.expect_item(), batcher.expect_item():
            assert 0.015 < (await batcher.submit(1)).waited < 2
        await batcher.close()

    asyncio.run(main())


def test_a_cancelled_item_is_not_computed():
    model = Recorder()
    model.free.clear()

    async def main():
        batcher = Batcher(model, parity, 8, 0)
        batcher.start()
        tasks = [asyncio.ensure_future(batcher.submit(item)) for item in (0, 2, 4, 6)]
        await until(lambda: model.batches)  # those four are being computed
        late = [asyncio.ensure_future(batcher.submit(item)) for item in (8, 10)]
        await until(lambda: batcher.waiting == 2)
        tasks[1].cancel()
        late[0].cancel()
        await asyncio.sleep(0)
        assert batcher.waiting == 1
        model.free.set()
        results = await asyncio.gather(*tasks, *late, return_exceptions=True)
        await batcher.close()
        return results

    results = asyncio.run(main())
    assert model.batches == [[0, 2, 4, 6], [10]]
    assert [getattr(r, "result", type(r)) for r in results] == [
        0, asyncio.CancelledError, 8, 12, asyncio.CancelledError, 20
    ]  # fmt: skip


def test_closing_finishes_what_waits_and_takes_nothing_more():
    model = Recorder()
    model.free.clear()

    async def main():
        batcher = Batcher(model, parity, 1, max_wait=60)
        batcher.start()
        tasks = [asyncio.ensure_future(batcher.submit(item)) for item in range(3)]
        await until(lambda: model.batches)
        closing = asyncio.ensure_future(batcher.close())
        await until(lambda: batcher.closing)
        with pytest.raises(RuntimeError, match="closed"):
            await batcher.submit(9)
        model.free.set()
        await closing
        return [task.result().result for task in tasks]

    assert asyncio.run(main()) == [0, 2, 4]


def test_wrong_number_of_results_is_an_error_of_its_callers():
    async def main():
        batcher = Batcher(lambda items: [], parity, 1, 0)
        batcher.start()
        for _ in range(2):  # it still runs after the first
            with pytest.raises(RuntimeError, match="expected 1 results, got 0"):
                await batcher.submit(1)
        await batcher.close()

    asyncio.run(main())
