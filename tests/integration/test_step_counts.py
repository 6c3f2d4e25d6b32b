"""What a step asks of torch and of the host, counted on a CPU: ours against transformers'.

A dispatch is a call of an operator below autograd whose result is not a view of its input: on a GPU
a kernel, mostly. A wait of the host for the device cannot happen on a CPU, but what would cause one
can be seen: a number that is read from a tensor (`item`, `tolist`, an `if`), `cpu()`, and an index
or operator whose result has as many elements as a mask has ones. The other way, each tensor made
of the host's data would be a copy to the device. What is counted is counted where it is called, so
that a copy from CPU to CPU, which does nothing, counts too. Not seen: `to(device)` of what is there
already, and waits inside of torch's operators, for memory say.
"""

import contextlib
from collections import Counter
from unittest import mock

import pytest
import torch
from oracle import make_ours, make_theirs, padded_images, random_labels
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cdetr_fast import assignment
from cdetr_fast.models import modeling

STEP = {"encoder_layers": 6, "decoder_layers": 6, "auxiliary_loss": True}
COUNTS = (3, 0, 5, 2)
# Their results have as many elements as there are ones: the host has to know.
COUNTING_OPS = {"nonzero", "masked_select", "_unique2", "repeat_interleave"}
MASKED_INDICES = {"index", "index_put", "index_put_"}


class Counting(TorchDispatchMode):
    """Counts dispatches, waits of the host, and copies to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.dispatches = Counter()
        self.waits = Counter()
        self.copies = Counter()
        self._patches = contextlib.ExitStack()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        results = [result.alias_info for result in function._schema.returns]
        if not (results and all(alias and not alias.is_write for alias in results)):
            self.dispatches[name] += 1
        if name == "_local_scalar_dense" or name in COUNTING_OPS:
            self.waits[name] += 1
        if name in MASKED_INDICES and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        ):
            self.waits["a mask as index"] += 1
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        self._watch(Tensor, "cpu", self.waits)
        for name in ("tensor", "as_tensor", "from_numpy"):
            self._watch(torch, name, self.copies)
        return super().__enter__()

    def __exit__(self, *exception):
        self._patches.close()
        return super().__exit__(*exception)

    def _watch(self, owner, name, counter):
        function = getattr(owner, name)

        def watched(*args, **kwargs):
            counter[name] += 1
            return function(*args, **kwargs)

        self._patches.enter_context(mock.patch.object(owner, name, watched))


def count(model, labels=None) -> Counting:
    """A training step with labels, a forward pass without."""
    images = [torch.cat([x, x]) for x in padded_images()]
    # On a CPU it looks at masks, for one of ones and for rectangles, which it does not on a GPU.
    with (
        mock.patch.object(modeling, "_is_trivial", return_value=False),
        mock.patch.object(
            modeling.ConditionalDetrSinePositionEmbedding, "is_separable", return_value=False
        ),
        Counting() as counting,
    ):
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
def test_a_training_step_takes_half_of_the_dispatches_and_waits_once(theirs, compat):
    ours = count(make_ours("detection", compat, **STEP).train(), random_labels(COUNTS))
    assert 2 * ours.dispatches.total() <= theirs.dispatches.total(), ours.dispatches
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
    assert counting.dispatches.total() <= 700
