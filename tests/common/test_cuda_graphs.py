"""Capture, shared memory and failures of CUDA graphs, on a CPU that plays the device."""

import threading
import time

import pytest
import torch
from support import graph_stand_in
from support.threads import in_threads

from cdetr_fast.common.cuda_graphs import GraphKey, GraphMemory, GraphTable, is_capturing

CPU = torch.device("cpu")
KEY = GraphKey((1, 3, 4, 5), torch.float32, False)


@pytest.fixture
def cuda(monkeypatch):
    return graph_stand_in.install(monkeypatch)


def captured(memory, call, warm_up=1):
    with memory.preparing():
        for _ in range(warm_up):
            call()
        return memory.capture(call)


def test_keys_say_what_they_are_for():
    assert str(KEY) == "1 x 4 x 5, float32, without mask"
    assert (
        str(KEY._replace(dtype=torch.bfloat16, masked=True)) == "1 x 4 x 5, bfloat16, with a mask"
    )


def test_captures_share_a_stream_and_a_pool(cuda):
    memory = GraphMemory(CPU)
    streams = []
    for _ in range(2):
        captured(memory, lambda: streams.append(cuda.current_stream()) or torch.ones(1) + 1)
    assert len(set(streams)) == 1
    assert streams[0] is not cuda.current_stream()


def test_warm_up_waits_for_the_last_replay_of_another_thread(cuda):
    """Libraries keep a workspace per stream, which a graph that still runs may be using."""
    memory = GraphMemory(CPU)
    graph, _ = captured(memory, lambda: torch.ones(1) + 1)

    def replay(_):
        with cuda.stream(cuda.Stream()), memory.using():
            graph.replay()

    in_threads(replay, 1)
    captured(memory, lambda: torch.ones(1) + 2)  # the stand-in complains if it does not wait


def test_a_replay_that_does_not_wait_is_noticed(cuda):
    memory = GraphMemory(CPU)
    graph, _ = captured(memory, lambda: torch.ones(1) + 1)
    with memory.using():
        graph.replay()
    with cuda.stream(cuda.Stream()), pytest.raises(AssertionError, match="was not waited for"):
        graph.replay()


def test_one_capture_at_a_time(cuda):
    errors = []

    def work(_):
        try:
            captured(GraphMemory(CPU), lambda: time.sleep(0.02) or torch.ones(1) + 1)
        except BaseException as error:
            errors.append(error)

    in_threads(work, 4)
    assert not errors
    assert cuda.captured == 4


def test_a_failed_capture_leaves_allocator_and_random_numbers_usable(cuda):
    memory = GraphMemory(CPU)
    state = torch.get_rng_state()

    def looks():
        if is_capturing():
            torch.rand(1).item()
        return torch.rand(1)

    with pytest.raises(RuntimeError, match="not permitted"):
        captured(memory, looks)
    assert cuda.allocating == []
    assert cuda.generator.renewed == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert not is_capturing()
    graph, result = captured(memory, lambda: torch.ones(1) + 1)
    graph.replay()
    assert result.item() == 2


def test_captures_leave_random_numbers_as_they_were(cuda):
    state = torch.get_rng_state()
    captured(GraphMemory(CPU), lambda: torch.rand(2))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_table_keeps_failures_with_their_first_line(cuda):
    table = GraphTable(limit=1)

    def refused(memory):
        raise RuntimeError("no such kernel\nat line 3")

    assert table.capture(KEY, CPU, refused) is None
    assert table.describe() == [
        ("no graph", "1 x 4 x 5, float32, without mask: RuntimeError: no such kernel")
    ]
    assert not table.is_full
    table.capture(KEY, CPU, lambda memory: "graph")
    assert table.is_full
    table.drop(KEY)
    assert not table.graphs


def test_only_the_capturing_thread_captures(cuda):
    memory, seen = GraphMemory(CPU), []

    def call():
        thread = threading.Thread(target=lambda: seen.append(is_capturing()))
        thread.start()
        thread.join()
        seen.append(is_capturing())
        return torch.ones(1) + 1

    captured(memory, call, warm_up=0)
    assert seen == [False, True]
    assert not is_capturing()
