"""The triton kernels of `set_loss` against fp64, and their registration with torch.

On a machine with a GPU the tests run there. Everywhere they run in triton's interpreter, in a
process of its own: whether a kernel is interpreted is decided when triton is imported.
"""

import pytest
import torch
from support.criterion_sizes import SIZES
from support.kernels import (
    DEVICE,
    DTYPES,
    assert_close,
    in_double,
    needs_kernels,
)

from cdetr_kernels import set_loss
from cdetr_kernels.ops.set_loss import cases

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of exp and log
]


def draw(case, dtype=torch.float32):
    """Predictions and padded targets and matches; padding is NaN, and a label that exists."""
    return cases.make(dtype, DEVICE, *SIZES[case]).inputs


LOSSES = ("loss_ce", "loss_bbox", "loss_giou")


def differentiate(inputs, backend, num_boxes=13.0, **options):
    """Losses and gradients; each layer and loss has a gradient of its own."""
    leaves = [inputs[name].detach().requires_grad_() for name in ("logits", "boxes_cxcywh")]
    arguments = inputs | {"logits": leaves[0], "boxes_cxcywh": leaves[1]}
    losses = set_loss(**arguments, num_boxes=num_boxes, backend=backend, **options)
    layers = len(leaves[0])
    total = sum(
        (losses[name] * torch.linspace(0.5, i + 1, layers, device=DEVICE)).sum()
        for i, name in enumerate(LOSSES)
    )
    gradients = torch.autograd.grad(total, leaves)
    return losses | dict(zip(("dlogits", "dboxes"), gradients, strict=True))


def check_loss(inputs, **options):
    got = differentiate(inputs, "triton", **options)
    torchs = differentiate(inputs, "torch", **options)
    assert_close(got, torchs, differentiate(in_double(inputs), "torch", **options))
    assert not got["cardinality_error"].requires_grad
    return got


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SIZES)
def test_loss_and_gradients(case, dtype):
    inputs = draw(case, dtype)
    before = {name: (x.clone(), x._version) for name, x in inputs.items()}
    check_loss(inputs, num_boxes=torch.tensor(7.0, device=DEVICE))
    for name, (values, version) in before.items():
        torch.testing.assert_close(inputs[name], values, rtol=0, atol=0, equal_nan=True)
        assert inputs[name]._version == version


@needs_kernels
def test_loss_of_mixed_dtypes():
    """As under autocast: logits in half precision, boxes in fp32."""
    inputs = draw("several tiles", torch.float16)
    inputs["boxes_cxcywh"] = inputs["boxes_cxcywh"].float()
    got = check_loss(inputs)
    assert got["dlogits"].dtype == torch.float16
    assert got["dboxes"].dtype == torch.float32


@needs_kernels
@pytest.mark.parametrize("gamma", [0.0, 1.0, 1.5])
def test_options_of_the_loss(gamma):
    check_loss(draw("more targets than queries"), gamma=gamma, alpha=0.9)


@needs_kernels
def test_loss_of_extreme_logits():
    inputs = draw("several tiles")
    inputs["logits"] = inputs["logits"].sign() * 60
    inputs["logits"][0, 0, :4, 0] = torch.tensor([200.0, -200.0, 0.0, -0.0], device=DEVICE)
    check_loss(inputs)


@needs_kernels
def test_small_gradients_survive_half_precision():
    """Confident predictions, with the loss scaled as `GradScaler` does."""
    inputs = draw("several tiles")
    inputs["logits"] = (inputs["logits"] * 0 - 7).half()
    leaf = inputs["logits"].requires_grad_()
    loss = set_loss(**inputs, num_boxes=20, backend="triton")["loss_ce"].sum()
    (gradient,) = torch.autograd.grad(65536 * loss, leaf)
    exact = leaf.detach().double().requires_grad_()
    loss = set_loss(**in_double(inputs) | {"logits": exact}, num_boxes=20)["loss_ce"].sum()
    (expected,) = torch.autograd.grad(65536 * loss, exact)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=1e-6)


@needs_kernels
def test_gradients_of_boxes_that_touch():
    """Equal boxes, equal sides, one inside the other, side by side, apart: torch's conventions."""
    wanted = torch.tensor([0.5, 0.5, 0.25, 0.5])
    predicted = torch.tensor(
        [
            [0.5, 0.5, 0.25, 0.5],
            [0.5, 0.5, 0.125, 0.5],
            [0.5, 0.5, 0.125, 0.25],
            [0.75, 0.5, 0.25, 0.5],
            [0.125, 0.125, 0.125, 0.125],
        ]
    )
    count = len(predicted)
    inputs = {
        "logits": torch.zeros(1, 1, count, 2),
        "boxes_cxcywh": predicted[None, None],
        "target_labels": torch.zeros(1, count, dtype=torch.int64),
        "target_boxes_cxcywh": wanted.expand(1, count, 4),
        "target_counts": torch.tensor([count]),
        "matches": torch.arange(count)[None, None],
    }
    check_loss({name: x.to(DEVICE) for name, x in inputs.items()})


@needs_kernels
def test_loss_without_gradients():
    inputs = draw("several tiles")
    expected = differentiate(inputs, "triton")
    got = set_loss(**inputs, num_boxes=13.0, backend="triton")
    with torch.no_grad():
        leaf = inputs["logits"].clone().requires_grad_()
        again = set_loss(**inputs | {"logits": leaf}, num_boxes=13.0, backend="triton")
    for name, loss in got.items():
        assert not loss.requires_grad
        assert torch.equal(loss, expected[name])
        assert torch.equal(again[name], loss)


@needs_kernels
def test_loss_without_images_or_queries():
    for batch, queries in ((0, 5), (2, 0)):
        inputs = {
            "logits": torch.empty(2, batch, queries, 3, device=DEVICE),
            "boxes_cxcywh": torch.empty(2, batch, queries, 4, device=DEVICE),
            "target_labels": torch.zeros(batch, 1, dtype=torch.int64, device=DEVICE),
            "target_boxes_cxcywh": torch.empty(batch, 1, 4, device=DEVICE),
            "target_counts": torch.ones(batch, dtype=torch.int64, device=DEVICE),
            "matches": torch.full((2, batch, 1), -1, device=DEVICE),
        }
        got = differentiate(inputs, "triton")
        assert all((got[name] == 0).all() for name in LOSSES)
        assert got["dlogits"].shape == inputs["logits"].shape


@needs_kernels
def test_registration_of_gradients_of_mixed_dtypes():
    from cdetr_kernels.ops.set_loss import triton as _registered  # noqa: F401

    saved = (torch.rand(1, 2, 3, 4, device=DEVICE), torch.rand(2, 1, 2, 3, 4, device=DEVICE))
    losses, num_boxes = torch.rand(4, 1, device=DEVICE), torch.tensor(3.0, device=DEVICE)
    arguments = (losses, *saved, num_boxes, torch.float16, torch.float32)
    torch.library.opcheck(torch.ops.cdetr_fast.set_loss_backward.default, arguments)
