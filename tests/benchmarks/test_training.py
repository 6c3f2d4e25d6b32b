"""The benchmark of a training step."""

import pytest
import torch
from support import graph_stand_in
from support.oracle import make_ours, random_labels
from support.training_cases import batch

from benchmarks.suite import training
from cdetr_fast.models.counting import as_on_a_gpu


@pytest.fixture
def generator(monkeypatch):
    with as_on_a_gpu():
        yield graph_stand_in.install(monkeypatch)


def test_a_step_runs_by_graphs_or_says_why(generator):
    torch.manual_seed(0)
    model = make_ours(backbone="test_resnet", auxiliary_loss=True, num_labels=91).train()
    inputs = batch(0)
    images = inputs["pixel_values"], inputs["pixel_mask"]
    given = (*images, random_labels((3, 0), classes=91))
    plain = training.Step(model, model, given, None)
    graphed = training.GraphedStep(model, given, None)
    for _ in range(2):
        assert graphed.backward().item() == pytest.approx(plain.backward().item())
        torch.testing.assert_close(graphed.gradient(), plain.gradient(), rtol=1e-5, atol=1e-7)
    assert graphed.counts()["launches"] > 0

    model.model.register_forward_pre_hook(lambda _, images: images[0].sum().item() and None)
    with pytest.raises(RuntimeError, match="operation not permitted"):
        training.GraphedStep(model, given, None).checked()
