"""Training by CUDA graphs, on a CPU that plays the device."""

import copy
import json
from pathlib import Path

import pytest
import torch
from support import graph_stand_in
from support.oracle import make_ours
from support.training_cases import SHAPES, batch, run

from cdetr_fast.models.counting import OperatorCounter, as_on_a_gpu
from cdetr_fast.training import DataError, TrainingConfig, graphs, train
from cdetr_fast.training.engine import Engine
from cdetr_fast.training.run.signals import StopSignals


@pytest.fixture
def cuda(monkeypatch):
    return graph_stand_in.install(monkeypatch)


@pytest.fixture(autouse=True)
def as_a_gpu():
    """The model looks at masks on a CPU, which a capture cannot do."""
    with as_on_a_gpu():
        yield


def small_model(**config):
    torch.manual_seed(0)
    settings = {"backbone": "test_resnet", "auxiliary_loss": True} | config
    return make_ours(**settings).train()


def assert_same(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("compat", ["paper", "transformers"])
def test_losses_gradients_and_weights_are_those_without_graphs(cuda, compat, accumulate):
    model = small_model(compat=compat)
    graphed = copy.deepcopy(model)
    used = graphs.use_graphs(graphed, eager_first=1)
    assert_same(run(graphed, 4, accumulate), run(model, 4, accumulate))
    assert used.replays == 4 * accumulate - 2
    assert [kind for kind, _ in used.describe()] == ["graph"] * 2
    assert_same(list(graphed.parameters()), list(model.parameters()))


def test_gradients_that_autograd_would_keep_are_not_the_graphs_own(cuda, monkeypatch):
    """Without the copies an accumulated step is wrong: the stand-in is as strict as a graph."""

    def uncopied(ctx, *output_gradients):
        ctx.graph.backward(output_gradients)
        own = (None if x is None else x.detach() for x in ctx.graph._gradients)
        return None, None, None, None, *own

    monkeypatch.setattr(graphs._Replay, "backward", staticmethod(uncopied))
    model = small_model()
    graphed = copy.deepcopy(model)
    graphs.use_graphs(graphed, eager_first=0)
    with pytest.raises(AssertionError):
        assert_same(run(graphed, 2), run(model, 2))


def test_without_auxiliary_loss_and_mask(cuda):
    model = small_model(auxiliary_loss=False)
    graphed = copy.deepcopy(model)
    used = graphs.use_graphs(graphed, eager_first=0)
    for masked in (True, False, True, False):
        got, expected = (m(**batch(0, masked=masked)) for m in (graphed, model))
        assert_same([got.loss, got.logits], [expected.loss, expected.logits])
        got.loss.backward()
    assert used.replays == 4
    assert len(used.describe()) == 2


def test_autocast(cuda):
    """As without autocast's cache, by which gradients of a weight's uses are summed in bf16."""
    model = small_model()
    graphed = copy.deepcopy(model)
    used = graphs.use_graphs(graphed, eager_first=0)
    expected = run(model, 3, autocast=True, cache=False)
    assert_same(run(graphed, 3, autocast=True), expected)
    assert used.replays == 6
    assert used.describe()[0][1] == "2 x 64 x 96, bfloat16, with a mask"


def test_dropout_draws_the_same_numbers(cuda):
    """Warm-up and capture take none of them, and each replay draws new ones."""
    model = small_model(dropout=0.3)
    graphed = copy.deepcopy(model)
    used = graphs.use_graphs(graphed, eager_first=1)
    results = []
    for each in (graphed, model):
        torch.manual_seed(7)
        results.append(run(each, 3))
    assert_same(*results)
    assert used.replays == 4
    first, second = (graphed(**batch(0)).loss.item() for _ in range(2))
    assert first != second


def test_parameters_that_do_not_train_and_those_without_a_gradient(cuda):
    model = small_model()
    model.model.freeze_backbone()
    model.unread = torch.nn.Parameter(torch.ones(3))
    graphed = copy.deepcopy(model)
    graphs.use_graphs(graphed, eager_first=0)
    assert_same(run(graphed, 2), run(model, 2))
    graphed(**batch(0)).loss.backward()
    assert graphed.unread.grad is None
    assert all(p.grad is None for p in graphed.model.backbone.model.parameters())


def test_under_ddp(cuda, tmp_path):
    """Its hooks run, once a step; a capture leaves the parameters' own nodes of autograd alone."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = small_model()
        graphed = copy.deepcopy(model)
        used = graphs.use_graphs(graphed, eager_first=1)
        wrapped = torch.nn.parallel.DistributedDataParallel(graphed)
        reduced, passed = [], []
        graphed.class_labels_classifier.weight.register_hook(lambda _: passed.append(1))
        wrapped.register_comm_hook(None, lambda _, bucket: _counted(bucket, reduced))
        for step in range(4):
            for number, last in ((2 * step, False), (2 * step + 1, True)):
                wrapped.require_backward_grad_sync = last
                wrapped(**batch(number)).loss.backward()
                model(**batch(number)).loss.backward()
            assert_same(*([p.grad for p in m.parameters()] for m in (graphed, model)))
            wrapped.zero_grad()
            model.zero_grad()
        assert used.replays == 7
        assert len(passed) == 8
        assert sum(reduced) == 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    finally:
        torch.distributed.destroy_process_group()


def _counted(bucket, reduced):
    reduced.append(bucket.buffer().numel())
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def test_a_backward_pass_comes_once_and_in_its_turn(cuda):
    model = small_model()
    graphs.use_graphs(model, eager_first=0)
    first, second = model(**batch(0)).loss, model(**batch(1, SHAPES[1])).loss
    with pytest.raises(RuntimeError, match="before the forward pass of the next one"):
        first.backward()
    assert all(p.grad is None for p in model.parameters())
    second = model(**batch(1)).loss
    second.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="has to come once"):
        second.backward()


def test_only_training_with_labels_runs_by_graphs(cuda):
    model = small_model()
    used = graphs.use_graphs(model, eager_first=0)
    inputs = batch(0)
    images = inputs["pixel_values"], inputs["pixel_mask"]
    assert model(*images).last_hidden_state is not None
    assert model(**inputs, output_attentions=True).cross_attentions is not None
    with torch.no_grad():
        assert model(**inputs).last_hidden_state is not None
    model.eval()
    assert model(**inputs).last_hidden_state is not None
    assert used.replays == 0
    model.train()
    assert model(*images, labels=inputs["labels"]).last_hidden_state is None
    assert used.replays == 1


def test_which_shapes_get_graphs(cuda):
    model = small_model()
    used = graphs.use_graphs(model, limit=2, eager_first=1)

    def see(shape, times):
        before = used.replays
        for _ in range(times):
            model(**batch(0, shape)).loss.backward()
        return used.replays - before

    assert see(SHAPES[0], 5) == 4
    assert see(SHAPES[1], 2) == 1
    assert see(SHAPES[2], 3) == 0  # no room, and not seen twice as often
    assert see(SHAPES[2], 1) == 1  # now it replaces the second
    assert [text.split(",")[0] for _, text in used.describe()] == ["2 x 64 x 96", "1 x 96 x 64"]
    assert see(SHAPES[1], 1) == 0


def test_what_cannot_be_captured_runs_without_and_is_named_once(cuda, caplog):
    """A look at a number is refused while capturing, as on a GPU; random numbers continue."""
    model = small_model(dropout=0.3)
    graphed = copy.deepcopy(model)
    used = graphs.use_graphs(graphed, eager_first=0)
    graphed(**batch(0, SHAPES[1])).loss.backward()
    plain = type(graphed.model).forward

    def looks(pixel_values, *args, **kwargs):
        if pixel_values.shape[3] == 96:
            pixel_values.sum().item()
        return plain(graphed.model, pixel_values, *args, **kwargs)

    graphed.model.forward = looks
    graphed.zero_grad()
    results = []
    for each in (graphed, model):
        torch.manual_seed(7)
        results.append(run(each, 2))
    assert_same(*results)
    reason = "RuntimeError: operation not permitted when stream is capturing"
    assert ("no graph", f"2 x 64 x 96, float32, with a mask: {reason}") in used.describe()
    assert len(caplog.records) == cuda.generator.renewed == 1
    assert f"batches of 2 x 64 x 96, float32, with a mask run without a graph: {reason}" in (
        caplog.text
    )
    # The other shape's graph went with the generator's state, and was captured again.
    assert [kind for kind, _ in used.describe()] == ["graph", "no graph"]
    assert used.replays == 3


def test_after_some_failures_no_other_shape_is_tried(cuda, caplog, monkeypatch):
    model = small_model()
    used = graphs.use_graphs(model, eager_first=0)

    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(graphs, "_TrainingGraph", exhausted)
    for size in (32, 64, 96, 128, 160):
        model(**batch(0, (1, 3, 32, size))).loss.backward()
    assert len(used.table.failures) == len(caplog.records) == 3
    assert caplog.text.count("no other shape is tried") == 1


@pytest.mark.parametrize("compat", ["paper", "transformers"])
def test_what_is_captured_needs_no_host(compat):
    """Neither forward nor backward waits for the device or copies to it."""
    model = small_model(compat=compat)
    predictor = graphs._Predictor(model)
    inputs = batch(0)
    with OperatorCounter() as counting:
        outputs = predictor(inputs["pixel_values"], inputs["pixel_mask"])
        torch.autograd.grad(
            outputs, list(predictor.trained.values()), [torch.ones_like(x) for x in outputs]
        )
    assert counting.launches.total() > 100
    assert counting.waits.total() == counting.copies.total() == 0


def test_what_it_does_not_go_with(settings):
    for name, value, message in (
        ("compile", True, "expected compile False with it, got True"),
        ("gradient_checkpointing", True, "expected gradient_checkpointing False"),
        ("fsdp", True, "expected fsdp False"),
        ("device", "cpu", "expected device 'auto' with it, got 'cpu'"),
    ):
        options = settings() | {"device": "auto", "cuda_graphs": True, name: value}
        with pytest.raises(DataError, match=f"cuda_graphs: {message}"):
            TrainingConfig(**options)
    options = {"device": "auto", "cuda_graphs": True, "task": "segmentation", "train_masks": "x"}
    with pytest.raises(DataError, match="cuda_graphs: expected task 'detection'"):
        TrainingConfig(**settings(**options))
    if not torch.cuda.is_available():
        with pytest.raises(DataError, match="cuda_graphs: expected a GPU, the device is cpu"):
            train(TrainingConfig(**settings(device="auto", cuda_graphs=True)))


def test_which_models_it_does_not_go_with():
    with pytest.raises(DataError, match=r"cuda_graphs: expected encoder_layerdrop 0, got 0\.5"):
        graphs.use_graphs(small_model(encoder_layerdrop=0.5))
    with pytest.raises(DataError, match=r"expected decoder_layerdrop 0, got 0\.5"):
        graphs.use_graphs(small_model(decoder_layerdrop=0.5))
    model = small_model()
    model.gradient_checkpointing_enable()
    with pytest.raises(DataError, match="expected a model without gradient checkpointing"):
        graphs.use_graphs(model)
    with pytest.raises(DataError, match="ConditionalDetrForObjectDetection, got Linear"):
        graphs.use_graphs(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_is_the_same(settings, cuda, monkeypatch, tmp_path, precision):
    """Through Accelerate, with accumulation, clipping and dropout."""
    rows = []
    for graphed in (False, True):
        options = {
            "output": str(tmp_path / str(graphed)),
            "batch_size": 2,
            "accumulate": 2,
            "epochs": 3,
            "precision": precision,
            "model_options": settings()["model_options"] | {"dropout": 0.1},
        }
        config = TrainingConfig(**settings(**options))
        if graphed:  # what a config refuses, as its CPU is no GPU
            monkeypatch.setattr("cdetr_fast.training.engine.GRAPHS_RUN_ON", "cpu")
            config.cuda_graphs = True
        engine = Engine(config, StopSignals())
        engine.run()
        text = (Path(config.output) / "metrics.jsonl").read_text()
        rows.append([json.loads(line) for line in text.splitlines()])
    assert engine.graphs.replays > 5
    for without, with_graphs in zip(*rows, strict=True):
        for name in ("loss", "grad_norm"):
            most = 1e-5 if precision == "fp32" else 5e-3  # see test_autocast
            assert with_graphs[name] == pytest.approx(without[name], rel=most)
