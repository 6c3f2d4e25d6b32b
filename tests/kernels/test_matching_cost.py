"""The triton kernels of `matching_cost` against fp64, and their registration with torch.

On a machine with a GPU the tests run there. Everywhere they run in triton's interpreter, in a
process of its own: whether a kernel is interpreted is decided when triton is imported.
"""

import pytest
import torch
from support.criterion_sizes import SIZES
from support.kernels import (
    DEVICE,
    DTYPES,
    assert_accurate,
    assert_close,
    in_double,
    needs_kernels,
)

from cdetr_kernels import matching_cost
from cdetr_kernels.ops.matching_cost import cases

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of exp and log
]


def draw(case, dtype=torch.float32):
    """Predictions and padded targets; padding is NaN, and a label that exists."""
    return cases.make(dtype, DEVICE, *SIZES[case]).inputs


def check_cost(inputs, **options):
    got, torchs = (
        {"cost": matching_cost(**inputs, **options, backend=backend)}
        for backend in ("triton", "torch")
    )
    assert_close(got, torchs, {"cost": matching_cost(**in_double(inputs), **options)})


@needs_kernels
@pytest.mark.parametrize("classification", ["focal", "softmax"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SIZES)
def test_cost(case, dtype, classification):
    call = cases.make(dtype, DEVICE, *SIZES[case], classification)
    assert_accurate(call)
    got, torchs = (call.function(backend)(**call.inputs) for backend in ("triton", "torch"))
    assert got.stride() == torchs.stride()


@needs_kernels
@pytest.mark.parametrize(
    "options",
    [{"gamma": 0.0}, {"gamma": 1.5}, {"alpha": 0.9}, {"class_weight": 0.0, "bbox_weight": 7.0}],
    ids=str,
)
def test_options_of_the_cost(options):
    inputs = draw("several tiles")
    check_cost(inputs, **options)


@needs_kernels
@pytest.mark.parametrize("classification", ["focal", "softmax"])
def test_cost_of_extreme_logits(classification):
    inputs = draw("several tiles")
    inputs["logits"] = inputs["logits"].sign() * 60
    inputs["logits"][0, 0, :3] = torch.tensor([[200.0], [-200.0], [0.0]], device=DEVICE)
    check_cost(inputs, classification=classification)


@needs_kernels
def test_a_label_out_of_range_is_not_read():
    inputs = draw("several tiles")
    inputs["target_labels"][0, 1], inputs["target_labels"][1, 3] = 5, -1
    got = matching_cost(**inputs, backend="triton").unflatten(0, (2, 3))
    bad = torch.zeros(got.shape, dtype=torch.bool, device=DEVICE)
    bad[:, 0, :, 1] = bad[:, 1, :, 3] = True
    assert torch.equal(got.isnan(), bad)


@needs_kernels
def test_the_derivative_of_the_cost_is_refused():
    inputs = draw("several tiles")
    inputs["logits"].requires_grad_()
    cost = matching_cost(**inputs, backend="triton")
    with pytest.raises(NotImplementedError, match="use backend='torch'"):
        cost[0, 0, 0].backward()


@needs_kernels
@pytest.mark.parametrize("name", ["logits", "boxes_cxcywh", "target_boxes_cxcywh"])
def test_dtypes_that_the_kernels_do_not_take(name):
    inputs = draw("several tiles")
    inputs[name] = inputs[name].double()
    with pytest.raises(RuntimeError, match=r"'triton' cannot run: .* not torch.float64"):
        matching_cost(**inputs, backend="triton")
    assert matching_cost(**inputs).isfinite().all()
