"""Dispatches, waits and copies of a step, counted on a CPU: ours against transformers'.

What is counted, and what cannot be seen: `cdetr_fast/models/counting.py`.
"""

from unittest import mock

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from support.oracle import make_ours, make_theirs, padded_images, random_labels

from cdetr_fast.loss import assignment
from cdetr_fast.models.counting import OperatorCounter, as_on_a_gpu

STEP = {"encoder_layers": 6, "decoder_layers": 6, "auxiliary_loss": True}
COUNTS = (3, 0, 5, 2)


def count(model, labels=None) -> OperatorCounter:
    """A training step with labels, a forward pass without."""
    images = [torch.cat([x, x]) for x in padded_images()]
    with as_on_a_gpu(), OperatorCounter() as counting:
        outputs = model(*images, labels=labels)
        if labels is not None:
            outputs.loss.backward()
    return counting


@pytest.fixture(scope="module")
def theirs():
    """transformers' training step, with its default attention."""
    counting = count(make_theirs(implementation="sdpa", **STEP), random_labels(COUNTS))
    # What it is known to do: the counting sees it.
    assert counting.waits["_local_scalar_dense"] > 10
    assert counting.waits["cpu"] == STEP["decoder_layers"]
    return counting


@pytest.mark.parametrize("compat", ["paper", "transformers"])
def test_a_training_step_takes_half_of_the_launches_and_waits_once(theirs, compat):
    ours = count(make_ours("detection", compat, **STEP).train(), random_labels(COUNTS))
    assert 2 * ours.launches.total() <= theirs.launches.total(), ours.launches
    assert ours.waits == {"cpu": 1}
    # The labels of the batch, and the matches of all layers on their way back.
    assert ours.copies == {"from_numpy": 2}
    assert theirs.copies.total() > 10 * ours.copies.total()


def test_with_a_solver_on_the_device_the_host_does_not_wait():
    def solve(cost):
        return torch.stack([torch.from_numpy(linear_sum_assignment(x)[1]) for x in cost.numpy()])

    model = make_ours("detection", "paper", **STEP).train()
    labels = random_labels(COUNTS)
    expected = model(*padded_images(), labels=labels[:2]).loss
    reports = mock.Mock()
    with (
        mock.patch.object(assignment, "device_solver", return_value=solve),
        mock.patch.object(assignment, "LATE_REPORTS", reports),
    ):
        counting = count(model, labels)
        assert torch.equal(model(*padded_images(), labels=labels[:2]).loss, expected)
    assert not counting.waits
    assert reports.add.call_count == 2


def test_the_mask_losses_wait_no_more():
    model = make_ours("segmentation", "paper", **STEP | {"decoder_layers": 2}).train()
    assert count(model, random_labels(COUNTS, masks=True)).waits == {"cpu": 1}


def test_a_forward_pass_does_not_wait():
    model = make_ours("detection", "paper", **STEP).eval()
    with torch.inference_mode():
        counting = count(model)
    assert not counting.waits
    assert counting.launches.total() <= 700
