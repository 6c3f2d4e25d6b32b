"""Several threads or tasks at once: calls in threads, and waiting for what tasks bring about."""

import asyncio
import threading
from collections.abc import Callable


def in_threads(work: Callable[[int], None], count: int) -> None:
    """Call `work` with 0 to `count` - 1, each in a thread of its own, and wait for all."""
    threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


async def until(condition: Callable[[], object]) -> None:
    """Wait for what other tasks bring about.

    Raises:
        AssertionError: It has not happened within two seconds.
    """
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("has not happened within 2 s")
