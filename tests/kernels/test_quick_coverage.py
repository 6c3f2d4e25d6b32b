"""A quick qualification covers the calls that the models of cdetr_fast make."""

import pytest
import torch

from cdetr_fast import ConditionalDetrConfig, ConditionalDetrForObjectDetection
from cdetr_kernels import registry
from cdetr_kernels.dispatch import Operator
from cdetr_kernels.qualification import plan

pytest.importorskip("timm")
GPU = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def planned() -> dict[str, set[tuple]]:
    """Return dtypes and classes of calls that are timed, by operator."""
    return {
        name: {
            (x.dtype, x.calls)
            for x in plan.tasks(name, registry.operator(name).needs_evidence("cuda"), "quick", GPU)
            if x.what == plan.TIME
        }
        for name in registry.NAMES
    }


@pytest.fixture
def called(planned, monkeypatch):
    """Return the set of operators and classes of the calls that are made."""
    found = set()

    def call(operator, _backend, *arguments):
        found.add((operator.name, operator.classify(*arguments)))
        return operator.implementations["torch"].run(*arguments)

    monkeypatch.setattr(Operator, "__call__", call)
    return found


def step(batch: int, padded: bool, training: bool, output_attentions: bool = False, **config):
    """Call a model of the usual width at 800x1066, with labels in training."""
    torch.manual_seed(0)
    settings = {"backbone": "test_resnet", "use_timm_backbone": True} | config
    model = ConditionalDetrForObjectDetection(
        ConditionalDetrConfig(
            use_pretrained_backbone=False,
            num_labels=91,
            encoder_layers=1,
            decoder_layers=2,
            **settings,
        )
    ).train(training)
    images = torch.randn(batch, 3, 800, 1066)
    mask = torch.ones(batch, 800, 1066, dtype=torch.int64)
    if padded:
        mask[-1, 600:] = 0
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.full((1, 4), 0.3)}] * batch
    with torch.no_grad():
        model(
            images,
            mask if padded else None,
            labels=labels if training else None,
            output_attentions=output_attentions,
        )


@pytest.mark.parametrize(
    "options",
    [
        {"batch": 1, "padded": False, "training": False},
        {"batch": 1, "padded": False, "training": False, "output_attentions": True},
        {"batch": 2, "padded": True, "training": False},
        {"batch": 2, "padded": True, "training": True},
        {"batch": 2, "padded": True, "training": True, "auxiliary_loss": True},
        {"batch": 2, "padded": True, "training": True, "attention_dropout": 0.1},
    ],
    ids=lambda options: "-".join(str(x) for x in options.values()),
)
def test_calls_of_the_models(planned, called, options):
    step(**options)
    names = {name for name, _ in called}
    assert names >= {"conditional_attention", "conditional_attention_separable", "sine_query"}
    for name in names:
        covered = planned[name]
        dtypes = {dtype for dtype, _ in covered}
        assert dtypes >= {"float32", "float16", "bfloat16"}, name
        missing = {
            (dtype, call)
            for operator, call in called
            if operator == name
            for dtype in dtypes
            if (dtype, call) not in covered
        }
        assert not missing, (name, missing)
