"""Inference by CUDA graphs, on a CPU that plays the device."""

import dataclasses

import pytest
import torch
from support import graph_stand_in
from support.oracle import largest_error, padded_images, random_model
from support.threads import in_threads

from cdetr_fast import optimize
from cdetr_fast.inference.graphs import GraphCache


@pytest.fixture(autouse=True)
def cuda(monkeypatch):
    return graph_stand_in.install(monkeypatch)


def call(pixel_values, pixel_mask):
    total = pixel_values.sum((1, 2, 3))
    return {"total": total if pixel_mask is None else total * pixel_mask.sum((1, 2))}


def make_cache(call=call, limit=8, static_outputs=False, constants=lambda: None):
    return GraphCache(call, constants, limit, static_outputs)


def looks_at_height_2(pixel_values, pixel_mask):
    if pixel_values.shape[2] == 2:
        pixel_values.sum().item()
    return call(pixel_values, pixel_mask)


def image(height=4, width=4, value=1.0, batch=1):
    return torch.full((batch, 3, height, width), value)


def shapes_with_graphs(cache):
    return [text.split(",")[0] for kind, text in cache.describe() if kind == "graph"]


def test_a_shape_is_captured_once(cuda):
    cache = make_cache()
    for value in (1.0, 2.0, 3.0):
        assert cache(image(value=value), None)["total"].item() == 48 * value
    assert cuda.captured == 1
    mask = torch.ones(1, 4, 4, dtype=torch.int64)
    mask[:, 2:] = 0
    assert cache(image(), mask)["total"].item() == 48 * 8
    assert cache(image(), mask + mask)["total"].item() == 48 * 8  # nonzero is image
    assert cuda.captured == 2
    cache(image(batch=2), None)
    cache(image().double(), None)
    assert cuda.captured == 4
    assert ("graph", "2 x 4 x 4, float32, without mask") in cache.describe()


def test_results_are_copies_unless_asked():
    cache = make_cache()
    first = cache(image(), None)["total"]
    cache(image(value=2.0), None)
    assert first.item() == 48
    cache = make_cache(static_outputs=True)
    first = cache(image(), None)["total"]
    cache(image(value=2.0), None)
    assert first.item() == 96


def test_inputs_are_not_changed():
    cache, pixel_values = make_cache(), image()
    cache(pixel_values, None)
    cache(image(value=5.0), None)
    assert torch.equal(pixel_values, image())


def test_the_least_recently_used_graph_is_dropped(cuda):
    cache = make_cache(limit=2)
    for height in (1, 2, 1, 3):  # 2 was used longest ago
        cache(image(height), None)
    assert shapes_with_graphs(cache) == ["1 x 1 x 4", "1 x 3 x 4"]
    assert cache._table._memory._last_use.waits == 1  # for the graph that may still have run
    cache(image(2), None)
    assert cuda.captured == 4
    assert shapes_with_graphs(cache) == ["1 x 3 x 4", "1 x 2 x 4"]


def test_what_cannot_be_captured_runs_without(cuda):
    cache = make_cache(looks_at_height_2)
    for _ in range(2):
        assert cache(image(2), None)["total"].item() == 24
        assert cache(image(4), None)["total"].item() == 48
    assert cuda.captured == 1
    expected = (
        "1 x 2 x 4, float32, without mask: "
        "RuntimeError: operation not permitted when stream is capturing"
    )
    assert ("no graph", expected) in cache.describe()
    cache.clear()
    assert cache.describe() == []


def test_graphs_give_way_when_memory_is_short(cuda):
    def hungry(pixel_values, pixel_mask):
        if pixel_values.shape[2] == 9 and shapes_with_graphs(cache):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call(pixel_values, pixel_mask)

    cache = make_cache(hungry)
    cache(image(1), None)
    assert cache(image(9), None)["total"].item() == 108
    assert [name for name, _ in cache.describe()] == ["no graph"]
    assert cuda.emptied == 1


def test_constants_that_a_graph_reads_are_kept():
    constants = [torch.ones(1)]
    cache = make_cache(
        lambda pixel_values, _: {"total": pixel_values.sum() + constants[0]},
        constants=lambda: list(constants),
    )
    cache(image(), None)
    constants.clear()
    assert cache(image(), None)["total"].item() == 49
    (graph,) = cache._table.graphs.values()
    assert graph.constants == [torch.ones(1)]


@pytest.mark.parametrize("first", [True, False])
def test_in_and_out_of_inference_mode(first):
    cache = make_cache()
    for mode in (first, not first, first):
        with torch.inference_mode(mode):
            assert cache(image(value=2.0), None)["total"].item() == 96


def test_threads_and_streams_share_graphs(cuda):
    cache, wrong = make_cache(limit=2), []

    def work(seed):
        with cuda.stream(cuda.Stream()):
            for i in range(60):
                value, height = float(seed + 1), 1 + (seed + i) % 3
                got = cache(image(height, value=value), None)["total"].item()
                if got != 12 * height * value:
                    wrong.append((seed, i, got))

    in_threads(work, 4)
    assert not wrong


def test_a_capture_of_the_callers_own_has_no_other_in_it(cuda):
    cache, graph = make_cache(), cuda.CUDAGraph()
    for captured in (False, True):
        if captured:
            assert cache(image(), None)["total"].item() == 48
        with cuda.graph(graph, cuda.graph_pool_handle(), cuda.Stream(), "thread_local"):
            total = cache(image(value=2.0), None)["total"]
        assert total.tolist() == [96]
        assert cuda.captured == 1 + 2 * captured
        assert len(shapes_with_graphs(cache)) == captured


# In a model --------------------------------------------------------------------------------------


def with_graphs(model, **options):
    """Return an optimised model that takes its CPU for a GPU."""
    fast = optimize(model, **options)
    fast.runner.options = dataclasses.replace(fast.runner.options, cuda_graphs=True)
    return fast


@torch.no_grad()
def test_static_outputs_of_parts():
    """The parts are of one shape, so they have one graph."""
    model, (pixel_values, pixel_mask) = random_model(), padded_images()
    images = pixel_values, pixel_mask[1:].expand(2, -1, -1)  # a mask of ones is seen on a CPU
    fast = with_graphs(model, max_batch=1, static_outputs=True)
    assert largest_error(fast(*images), model(*images)) <= 1e-4
    assert "graph            1 x 97 x 131" in fast.explain()


@torch.no_grad()
def test_a_model_runs_by_graphs_and_follows_its_weights():
    model, other, images = random_model(), random_model(seed=5), padded_images()
    fast = with_graphs(model)
    first = fast(*images)
    for inputs in (images, (images[0], None), images):
        assert largest_error(fast(*inputs), model(*inputs)) <= 1e-4
    assert "graph            2 x 97 x 131, float32, with a mask" in fast.explain()
    fast.load_state_dict(other.state_dict())
    assert largest_error(fast(*images), other(*images)) <= 1e-4
    assert largest_error(first, model(*images)) <= 1e-4


@torch.no_grad()
def test_constants_made_in_a_capture_are_not_kept(cuda):
    """They have values in replays of that graph alone."""
    model, pixel_values = random_model(), torch.randn(1, 3, 64, 96)
    fast = with_graphs(model)

    def other_sizes():  # until the constants of the first calls are given up
        for height in range(32, 32 + 9 * 32, 32):
            fast.runner.prepared(torch.zeros(1, 3, height, 32), None)

    fast.runner.prepare(fast)
    cuda.before_capture = other_sizes
    for _ in range(2):
        assert largest_error(fast(pixel_values), model(pixel_values)) <= 1e-4
    cuda.before_capture = lambda: None
    fast(torch.randn(1, 3, 64, 64))  # spoils the memory of the first graph
    expected = model(pixel_values)
    assert largest_error(fast.runner.prepared(pixel_values, None), expected) <= 1e-4
    assert largest_error(fast(pixel_values), expected) <= 1e-4


@torch.no_grad()
def test_each_stream_has_constants_of_its_own(cuda):
    """Those of another may not be computed yet, or be gone before they are read."""
    model, pixel_values = random_model(), torch.randn(1, 3, 64, 96)
    fast = optimize(model)
    kept = []
    for stream in (cuda.Stream(), cuda.Stream()):
        with cuda.stream(stream):
            for _ in range(2):
                assert largest_error(fast(pixel_values), model(pixel_values)) <= 1e-4
            kept.append(fast.runner.prepared.constants())
    assert [len(x) for x in kept] == [1, 2]
    assert kept[0][0] is kept[1][0] is not kept[1][1]
    assert "map sizes kept   2x3\n" in fast.explain()


@torch.no_grad()
def test_other_streams_find_prepared_weights(cuda, monkeypatch):
    waits = []
    monkeypatch.setattr(cuda.default_stream, "synchronize", lambda: waits.append(1))
    model = random_model()
    fast = optimize(model)
    assert len(waits) == 1
    fast(torch.randn(1, 3, 64, 96))
    assert len(waits) == 1
    model.class_labels_classifier.weight.mul_(2)
    fast(torch.randn(1, 3, 64, 96))
    assert len(waits) == 2


@torch.no_grad()
def test_buckets_share_graphs():
    fast = with_graphs(random_model(), bucket=64)
    for height, width in ((97, 131), (100, 150), (128, 192), (65, 180)):
        fast(torch.randn(1, 3, height, width))
    graphs = [line for line in fast.explain().splitlines() if line.startswith("graph ")]
    assert [line.split(maxsplit=1)[1] for line in graphs] == [
        "1 x 128 x 192, float32, without mask",
        "1 x 128 x 192, float32, with a mask",
    ]


@torch.no_grad()
def test_warmup_captures(cuda):
    fast = with_graphs(random_model())
    fast.warmup([(1, 64, 96), (2, 64, 96)])
    assert fast.explain().count("graph ") == 4
    fast.warmup([(3, 64, 96)], masks=False)
    assert fast.explain().count("graph ") == 5
    fast(torch.randn(3, 3, 64, 96))
    assert cuda.captured == 5
    with pytest.raises(ValueError, match=r"shapes: expected \(batch, height, width\)"):
        fast.warmup([(64, 96)])


@torch.no_grad()
def test_memory_that_does_not_do_is_named(monkeypatch):
    fast = with_graphs(random_model(), bucket=32)

    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5 TiB")

    monkeypatch.setattr(fast.runner.prepared, "forward", exhausted)
    message = r"\[1, 3, 64, 64\], padded to multiples of 32, does not fit .* set max_batch"
    with pytest.raises(torch.OutOfMemoryError, match=message):
        fast(torch.randn(1, 3, 50, 64))
