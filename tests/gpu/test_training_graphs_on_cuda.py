"""Training by CUDA graphs on a CUDA device; the logic around them is tested on CPUs."""

import copy

import pytest
import torch
from support.oracle import make_ours
from support.training_cases import SHAPES, batch, run

from cdetr_fast.training.graphs import use_graphs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def exact_fp32():
    """Convolutions in TF32 are off by more than the tolerance."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def models(**config):
    """The same model twice, the second one by graphs from a shape's second batch on."""
    torch.manual_seed(0)
    model = make_ours(auxiliary_loss=True, **config).train().cuda()
    graphed = copy.deepcopy(model)
    return model, graphed, use_graphs(graphed, eager_first=1)


def assert_close(got, expected, most):
    """Each tensor's error by its norm, or, where it is small, by that of the largest."""
    largest = max(x.float().norm() for x in expected)
    for a, b in zip(got, expected, strict=True):
        error = (a - b).float().norm()
        assert error <= most * b.float().norm() + 0.01 * most * largest


@pytest.mark.parametrize(("autocast", "most"), [(False, 1e-3), (True, 5e-2)])
@pytest.mark.parametrize("compat", ["paper", "transformers"])
def test_losses_and_gradients_are_those_without_graphs(compat, autocast, most):
    model, graphed, graphs = models(compat=compat)
    # Sums of bf16 gradients are rounded otherwise with autocast's cache, which graphs do without.
    expected = run(model, 4, autocast=autocast, cache=False)
    assert_close(run(graphed, 4, autocast=autocast, cache=False), expected, most)
    assert [kind for kind, _ in graphs.describe()] == ["graph"] * 2
    assert graphs.replays == 6


def test_dropout_draws_the_same_numbers():
    model, graphed, graphs = models(dropout=0.3)
    results = []
    for each in (graphed, model):
        torch.manual_seed(7)
        results.append(run(each, 3))
    assert_close(*results, 1e-3)
    assert graphs.replays == 4
    inputs = batch(0, device="cuda")
    first, second = (graphed(**inputs).loss.item() for _ in range(2))
    assert first != second


def test_replays_do_not_wait_for_the_device():
    _, graphed, graphs = models()
    inputs = batch(0, device="cuda")
    for _ in range(2):
        graphed(**inputs).loss.backward()
    assert graphs.replays == 1
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        predictions = graphs(inputs["pixel_values"], inputs["pixel_mask"])
        torch.autograd.backward(predictions, [torch.ones_like(x) for x in predictions])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert graphs.replays == 2


def test_what_cannot_be_captured_runs_without(caplog):
    """After a capture that failed, random numbers, memory and other shapes still work."""
    model, graphed, graphs = models(dropout=0.3)
    for _ in range(2):
        graphed(**batch(0, SHAPES[1], device="cuda")).loss.backward()
    graphed.zero_grad()

    def look(_, images):
        if images[0].shape[3] == SHAPES[0][3]:
            images[0].sum().item()

    graphed.model.register_forward_pre_hook(look)
    results = []
    for each in (graphed, model):
        torch.manual_seed(7)
        results.append(run(each, 3))
    assert_close(*results, 1e-3)
    assert [kind for kind, _ in graphs.describe()] == ["graph", "no graph"]
    assert caplog.text.count("run without a graph") == 1
