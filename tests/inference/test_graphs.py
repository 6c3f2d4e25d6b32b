"""The logic around CUDA graphs, with a stand-in that replays on a CPU.

The stand-in reads the same input tensors and writes the same output tensors as a graph would, and
complains where a GPU would give wrong results: two uses of the pool at a time, or a graph that runs
after it was dropped. What capture itself does is tested in `tests/gpu`.
"""

import dataclasses

import pytest
import torch
from support.oracle import make_ours, padded_images, randomise
from support.threads import in_threads

from cdetr_fast import optimize
from cdetr_fast.inference import runner as runner_module
from cdetr_fast.inference.graphs import Captured, GraphCache


class StandIn:
    """Captures by keeping the call."""

    device_type = "cpu"

    def __init__(self, device=None):
        self.captured, self.replayed, self.in_use, self.waited = [], 0, False, 0
        self.refused = None

    def capture(self, call, pixel_values, pixel_mask):
        if self.refused is not None and self.refused(pixel_values):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        outputs = call(pixel_values, pixel_mask)
        self.captured.append(tuple(pixel_values.shape))

        def replay():
            assert self.in_use
            self.replayed += 1
            for name, tensor in call(pixel_values, pixel_mask).items():
                outputs[name].copy_(tensor)

        return Captured(replay, pixel_values, pixel_mask, outputs)

    def begin(self):
        assert not self.in_use
        self.in_use = True

    def end(self):
        self.in_use = False

    def wait(self):
        assert not self.in_use
        self.waited += 1


def call(pixel_values, pixel_mask):
    total = pixel_values.sum((1, 2, 3))
    return {"total": total if pixel_mask is None else total * pixel_mask.sum((1, 2))}


@pytest.fixture
def capturer():
    return StandIn()


def make_cache(capturer, limit=8, static_outputs=False, held=lambda: None):
    return GraphCache(call, held, capturer, limit, static_outputs)


def image(height=4, width=4, value=1.0, batch=1):
    return torch.full((batch, 3, height, width), value)


def test_a_shape_is_captured_once(capturer):
    cache = make_cache(capturer)
    for value in (1.0, 2.0, 3.0):
        assert cache(image(value=value), None)["total"].item() == 48 * value
    assert capturer.captured == [(1, 3, 4, 4)]
    assert capturer.replayed == 3
    mask = torch.ones(1, 4, 4, dtype=torch.int64)
    mask[:, 2:] = 0
    assert cache(image(), mask)["total"].item() == 48 * 8
    assert cache(image(), mask + mask)["total"].item() == 48 * 8  # nonzero is image
    assert len(capturer.captured) == 2
    cache(image(batch=2), None)
    cache(image().double(), None)
    assert len(capturer.captured) == 4
    assert ("graph", "2 x 4 x 4, float32, without mask") in cache.describe()


def test_results_are_copies_unless_asked(capturer):
    cache = make_cache(capturer)
    first = cache(image(), None)["total"]
    cache(image(value=2.0), None)
    assert first.item() == 48
    cache = make_cache(capturer, static_outputs=True)
    first = cache(image(), None)["total"]
    cache(image(value=2.0), None)
    assert first.item() == 96


def test_inputs_are_not_changed(capturer):
    cache, pixel_values = make_cache(capturer), image()
    cache(pixel_values, None)
    cache(image(value=5.0), None)
    assert torch.equal(pixel_values, image())


def test_the_least_used_graph_is_dropped(capturer):
    cache = make_cache(capturer, limit=2)
    for height in (1, 2, 1, 3):  # 2 was used longest ago
        cache(image(height), None)
    kept = [text.split(",")[0] for _, text in cache.describe()]
    assert kept == ["1 x 1 x 4", "1 x 3 x 4"]
    assert capturer.waited == 1  # for the graph that may still have been running
    cache(image(2), None)
    assert capturer.captured.count((1, 3, 2, 4)) == 2


def test_what_cannot_be_captured_runs_without(capturer):
    capturer.refused = lambda pixel_values: pixel_values.shape[2] == 2
    cache = make_cache(capturer)
    for _ in range(2):
        assert cache(image(2), None)["total"].item() == 24
        assert cache(image(4), None)["total"].item() == 48
    assert capturer.captured == [(1, 3, 4, 4)]
    expected = (
        "1 x 2 x 4, float32, without mask: "
        "RuntimeError: operation not permitted when stream is capturing"
    )
    assert ("no graph", expected) in cache.describe()


def test_graphs_give_way_when_memory_is_short(capturer):
    def hungry(pixel_values, pixel_mask):
        if pixel_values.shape[2] == 9 and cache._graphs:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call(pixel_values, pixel_mask)

    cache = GraphCache(hungry, lambda: None, capturer, 8, False)
    cache(image(1), None)
    assert cache(image(9), None)["total"].item() == 108
    assert [name for name, _ in cache.describe()] == ["no graph"]


def test_what_a_graph_reads_is_held(capturer):
    constants = [object()]
    cache = make_cache(capturer, held=lambda: list(constants))
    cache(image(), None)
    (captured,) = cache._graphs.values()
    assert captured.held[1] == constants


@pytest.mark.parametrize("first", [True, False])
def test_in_and_out_of_inference_mode(capturer, first):
    cache = make_cache(capturer)
    for mode in (first, not first, first):
        with torch.inference_mode(mode):
            assert cache(image(value=2.0), None)["total"].item() == 96


def test_threads_share_graphs(capturer):
    cache, wrong = make_cache(capturer, limit=2), []

    def work(seed):
        for i in range(60):
            value, height = float(seed + 1), 1 + (seed + i) % 3
            got = cache(image(height, value=value), None)["total"].item()
            if got != 12 * height * value:
                wrong.append((seed, i, got))

    in_threads(work, 4)
    assert not wrong


# In a model --------------------------------------------------------------------------------------


@pytest.fixture
def with_graphs(monkeypatch):
    """An optimised model that takes its CPU for a GPU."""
    monkeypatch.setattr(runner_module, "CudaCapturer", StandIn)

    def make(model, **options):
        fast = optimize(model, **options)
        fast.runner.options = dataclasses.replace(fast.runner.options, cuda_graphs=True)
        return fast

    return make


def random_model(seed=0):
    model = make_ours(backbone="test_resnet")
    randomise(model, seed)
    return model.eval()


def error(got, expected):
    return max((got[k] - expected[k]).abs().max().item() for k in ("logits", "pred_boxes"))


@torch.no_grad()
def test_a_model_runs_by_graphs_and_follows_its_weights(with_graphs):
    model, other, images = random_model(), random_model(5), padded_images()
    fast = with_graphs(model)
    first = fast(*images)
    for inputs in (images, (images[0], None), images):
        assert error(fast(*inputs), model(*inputs)) <= 1e-4
    assert "graph            2 x 97 x 131, float32, with a mask" in fast.explain()
    fast.load_state_dict(other.state_dict())
    assert error(fast(*images), other(*images)) <= 1e-4
    assert error(first, model(*images)) <= 1e-4


@torch.no_grad()
def test_buckets_share_graphs(with_graphs):
    fast = with_graphs(random_model(), bucket=64)
    for height, width in ((97, 131), (100, 150), (128, 192), (65, 180)):
        fast(torch.randn(1, 3, height, width))
    graphs = [line for line in fast.explain().splitlines() if line.startswith("graph ")]
    assert [line.split(maxsplit=1)[1] for line in graphs] == [
        "1 x 128 x 192, float32, without mask",
        "1 x 128 x 192, float32, with a mask",
    ]


@torch.no_grad()
def test_warmup_captures(with_graphs):
    fast = with_graphs(random_model())
    fast.warmup([(1, 64, 96), (2, 64, 96)])
    assert fast.explain().count("graph ") == 4
    fast.warmup([(3, 64, 96)], masks=False)
    assert fast.explain().count("graph ") == 5
    capturer = fast.runner._graphs._capturer
    fast(torch.randn(3, 3, 64, 96))
    assert len(capturer.captured) == 5
    with pytest.raises(ValueError, match=r"shapes: expected \(batch, height, width\)"):
        fast.warmup([(64, 96)])


@torch.no_grad()
def test_memory_that_does_not_do_is_named(with_graphs, monkeypatch):
    fast = with_graphs(random_model(), bucket=32)

    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5 TiB")

    monkeypatch.setattr(fast.runner.engine, "forward", exhausted)
    message = r"\[1, 3, 64, 64\], padded to multiples of 32, does not fit .* set max_batch"
    with pytest.raises(torch.OutOfMemoryError, match=message):
        fast(torch.randn(1, 3, 50, 64))
