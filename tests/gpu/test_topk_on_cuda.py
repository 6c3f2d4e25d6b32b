"""The CUDA part of `detection_topk`, as only a GPU shows it; results: tests/kernels/test_topk.

Needs the extension: `python -m cdetr_kernels.build`.
"""

import pytest
import torch

from cdetr_kernels import detection_topk, native

NO_EXTENSION = native.UNAVAILABLE["cuda"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(NO_EXTENSION is not None, reason=str(NO_EXTENSION)),
]

# One block an image, several, and more than the one-launch form keeps.
CASES = [(2, 30, 20, 50), (2, 300, 91, 100), (1, 900, 365, 300), (2, 300, 91, 3000)]
SIZES = [(480, 640), (97, 131)]


def inputs(batch: int, queries: int, classes: int, seed: int = 0, device: str = "cuda"):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, queries, classes, generator=generator)
    return logits.to(device), torch.rand(batch, queries, 4, generator=generator).to(device)


def call(logits, boxes, sizes, k):
    return detection_topk(logits, boxes, sizes, k, "native", threshold=0.5)


def equal(got, expected) -> bool:
    return all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(got, expected, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("where", ["list", "cpu", "cuda"])
def test_does_not_wait_for_the_device(case, where):
    *shape, k = case
    logits, boxes = inputs(*shape)
    sizes = SIZES[: shape[0]] if where == "list" else torch.tensor(SIZES[: shape[0]]).to(where)
    expected = call(logits, boxes, sizes, k)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = call(logits, boxes, sizes, k)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert equal(got, expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_capture_and_replay_with_other_inputs(case):
    *shape, k = case
    logits, boxes = inputs(*shape)
    sizes = torch.tensor(SIZES[: shape[0]], device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(logits, boxes, sizes, k)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call(logits, boxes, sizes, k)
    for seed in (1, 2):
        others = inputs(*shape, seed=seed)
        logits.copy_(others[0])
        boxes.copy_(others[1])
        graph.replay()
        assert equal(got, call(*others, sizes, k))


def test_launches():
    """One kernel; several blocks an image also need their tickets set to zero."""
    for batch, queries, classes, k in CASES[:3]:
        logits, boxes = inputs(batch, queries, classes)
        sizes = torch.tensor(SIZES[:batch], device="cuda")
        call(logits, boxes, sizes, k)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call(logits, boxes, sizes, k)
            torch.cuda.synchronize()
        names = [event.name for event in profile.events()]
        assert sum("topk_kernel" in name for name in names) == 1, names
        assert sum("Memcpy" in name for name in names) == 0, names


@pytest.mark.parametrize("case", CASES, ids=str)
def test_streams_side_by_side(case):
    *shape, k = case
    pairs = [inputs(*shape, seed=seed) for seed in range(8)]
    sizes = torch.tensor(SIZES[: shape[0]], device="cuda")
    expected = [call(*pair, sizes, k) for pair in pairs]
    streams = [torch.cuda.Stream() for _ in pairs]
    torch.cuda.synchronize()
    got = []
    for stream, pair in zip(streams * 4, pairs * 4, strict=True):
        with torch.cuda.stream(stream):
            got.append(call(*pair, sizes, k))
    torch.cuda.synchronize()
    assert all(equal(x, y) for x, y in zip(got, expected * 4, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_run_gives_the_same_bits(case):
    *shape, k = case
    logits, boxes = inputs(*shape)
    ties = logits.round(decimals=1).bfloat16()
    expected = call(ties, boxes, None, k)
    assert all(equal(call(ties, boxes, None, k), expected) for _ in range(50))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one():
    logits, boxes = inputs(2, 300, 91)
    expected = call(logits, boxes, SIZES, 100)
    other = call(logits.to("cuda:1"), boxes.to("cuda:1"), SIZES, 100)
    assert all(x.device == torch.device("cuda:1") for x in other)
    assert torch.cuda.current_device() == 0
    assert equal(other, expected)
