"""Labels on their way to the device, solvers of the assignment, and reports that arrive late."""

import inspect
import logging
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.oracle import random_labels

from cdetr_fast import ConditionalDetrConfig
from cdetr_fast.loss import assignment, targets

CPU = torch.device("cpu")


@pytest.fixture(params=["on the host", "on the device"])
def place(request, monkeypatch):
    """Labels on the host, and labels that seem to be on a device, which is not there."""
    monkeypatch.setattr(targets, "_on_host", lambda labels: request.param == "on the host")
    return request.param


def predictions(batch, layers=2, queries=6, classes=7):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(layers, batch, queries, classes, generator=generator)
    boxes = torch.rand(layers, batch, queries, 4, generator=generator) * 0.5 + 0.2
    return logits, boxes


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("counts", [(3, 0, 2), (0, 0)])
def test_labels_are_padded(counts, dtype, place):
    labels = random_labels(counts)
    for label in labels:
        label["boxes"] = label["boxes"].to(dtype)
        label["class_labels"] = label["class_labels"].int()
    padded = targets.pad_targets(labels, CPU, len(counts), 7)
    most = max(counts)
    assert padded.sizes == padded.counts.tolist() == list(counts)
    assert padded.labels.shape == (len(counts), most)
    assert padded.boxes_cxcywh.shape == (len(counts), most, 4)
    assert padded.labels.dtype == padded.counts.dtype == torch.int64
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert padded.boxes_cxcywh.dtype == wide
    assert (padded.unchecked is not None) == (place == "on the device")
    for i, (label, count) in enumerate(zip(labels, counts, strict=True)):
        assert torch.equal(padded.labels[i, :count], label["class_labels"].long())
        assert torch.equal(padded.boxes_cxcywh[i, :count], label["boxes"].to(wide))
        assert (padded.labels[i, count:] == 0).all()
        assert (padded.boxes_cxcywh[i, count:] == 0).all()


@pytest.mark.parametrize(
    ("name", "value", "expected", "got"),
    [
        ("class_labels", 7, r"values in \[0, 7\)", "7"),
        ("class_labels", -1, r"values in \[0, 7\)", "-1"),
        ("boxes", [0.5, 0.5, -0.5, 0.5], "centre, width, height", ".*-0.5"),
        ("boxes", [0.5, 1.5, 0.5, 0.5], "centre, width, height", ".*1.5"),
        ("boxes", [0.5, np.nan, 0.5, 0.5], "centre, width, height", ".*nan"),
    ],
)
def test_labels_out_of_range_are_refused(name, value, expected, got, place):
    """Where they are on the host at once, else with the transfer of the costs."""
    labels = random_labels((3, 0, 2))
    labels[2][name][1] = torch.tensor(value)
    config = ConditionalDetrConfig(num_labels=7)
    message = rf"labels\[2\]\['{name}'\]\[1\]: expected {expected}.*, got {got}"
    with pytest.raises(ValueError, match=message):
        assignment.match(*predictions(3), targets.pad_targets(labels, CPU, 3, 7), config)


def test_boxes_of_any_place_under_transformers():
    labels = random_labels((1,))
    labels[0]["boxes"][0, 0] = 1.5
    targets.pad_targets(labels, CPU, 1, 7, "transformers")
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        targets.pad_targets(labels, CPU, 1, 7, "paper")
    labels[0]["boxes"][0, 0] = float("inf")
    with pytest.raises(ValueError, match="inf"):
        targets.pad_targets(labels, CPU, 1, 7, "transformers")


def library_on_the_host(cost):
    library = pytest.importorskip("torch_linear_assignment")
    return library.batch_linear_assignment(cost)


@given(
    queries=st.integers(1, 20),
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=3),
    invalid=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_solvers_agree(queries, counts, invalid, seed):
    """Padding to equal sizes does not change the optimum, nor what is matched last."""
    counts = [min(count, queries) for count in counts]
    generator = np.random.default_rng(seed)
    costs = generator.normal(size=(2, len(counts), max(counts), queries)).astype(np.float32)
    if invalid:
        costs[generator.random(costs.shape) < 0.3] = np.nan
    for image, count in enumerate(counts):
        costs[:, image, count:] = 0
    expected = assignment.solve_on_host(costs, counts)
    got = assignment.solve_on_device(
        library_on_the_host, torch.from_numpy(costs), torch.tensor(counts)
    )
    assert np.array_equal(got.numpy(), expected)


def test_the_library_can_be_told_not_to_wait():
    """A function of the library that it calls private: versions without it are not used."""
    kernels = pytest.importorskip("torch_linear_assignment._triton")
    assert "off" in kernels._VALIDATION_MODES
    assert "validation" in inspect.signature(kernels.batch_linear_assignment).parameters


def test_why_the_host_solves():
    assert assignment.device_solver(CPU) is None
    assert "scipy on the host, in one transfer: " in assignment.solver_choice("cpu")
    assert "needs an NVIDIA GPU" in assignment.solver_choice("cpu")


@pytest.mark.parametrize(
    ("capability", "missing", "reason"),
    [((7, 5), None, "compute capability 8.0"), ((9, 0), "import", "cannot be imported"),
     ((9, 0), "option", "cannot skip its checks"), ((9, 0), None, "on the device")],
)  # fmt: skip
def test_which_gpus_solve(capability, missing, reason):
    kernels = pytest.importorskip("torch_linear_assignment._triton")
    assignment._device_solver.cache_clear()
    patches = {
        "import": mock.patch.dict("sys.modules", {"torch_linear_assignment._triton": None}),
        "option": mock.patch.object(kernels, "batch_linear_assignment", lambda cost: cost),
        None: mock.MagicMock(),
    }
    with (
        mock.patch.object(torch.cuda, "get_device_capability", return_value=capability),
        patches[missing],
    ):
        assert reason in assignment.solver_choice("cuda:0")
    assignment._device_solver.cache_clear()


class Event:
    """An event of the device that has happened when the test says so."""

    happened = False

    def record(self, stream=None):
        pass

    def query(self):
        return self.happened

    synchronize = record


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(Event, "happened", False)
    monkeypatch.setattr(targets, "_on_host", lambda labels: False)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(assignment, "LATE_REPORTS", assignment.LateReports())
    monkeypatch.setattr(assignment, "device_solver", lambda device: library_on_the_host)
    return Event


def test_late_reports_wait_for_the_device_and_are_not_lost(device, monkeypatch, caplog):
    config = ConditionalDetrConfig(num_labels=7)
    good, bad = random_labels((2, 3)), random_labels((2, 3))
    bad[1]["class_labels"][2] = 9
    logits, boxes = predictions(2)
    logits[1, 0, 0, 0] = float("nan")

    def step(labels):
        assignment.match(logits, boxes, targets.pad_targets(labels, CPU, 2, 7), config)

    with caplog.at_level(logging.WARNING, "cdetr_fast"):
        step(bad)
        step(good)
        assert not caplog.records
        monkeypatch.setattr(device, "happened", True)
        with pytest.raises(ValueError, match=r"\[1\]\['class_labels'\]\[2\]: .*an earlier step"):
            step(good)
        assert len(caplog.records) == 1
        step(good)
        assert len(caplog.records) == 4  # its own, and those of the two steps before
    assert "logits of decoder layer 1 of 2, images [0]" in caplog.records[0].getMessage()

    monkeypatch.setattr(device, "happened", False)
    step(bad)
    with caplog.at_level(logging.ERROR, "cdetr_fast"):
        assignment.LATE_REPORTS._deliver_at_exit()
    assert "expected values in [0, 7), got 9" in caplog.records[-1].getMessage()
