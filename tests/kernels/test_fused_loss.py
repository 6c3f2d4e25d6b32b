"""The triton kernels of matching cost and set loss against fp64, and their registration with torch.

On a machine with a GPU the tests run there. Everywhere they run in triton's interpreter, in a
process of its own: whether a kernel is interpreted is decided when triton is imported.
"""

import math

import pytest
import torch
from support.interpreter import INTERPRETED, run_in_the_interpreter
from torch import Tensor

from cdetr_kernels import matching_cost, set_loss

triton = pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of exp and log
needs_kernels = pytest.mark.skipif(
    not INTERPRETED and DEVICE == "cpu",
    reason="run by test_in_the_interpreter, in a process of its own",
)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """`torch.empty` is filled with NaN: what a kernel does not write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(INTERPRETED, reason="is the process that this test starts")
def test_in_the_interpreter(root):
    """Runs the tests of this file that need kernels."""
    run_in_the_interpreter(root, __file__)


def assert_close(got: Tensor, torchs: Tensor, exact: Tensor, name: str = ""):
    """At most twice the error of torch in the same dtype, against fp64, and a few roundings."""
    assert got.shape == exact.shape, name
    assert got.dtype == torchs.dtype, name
    assert got.isfinite().all(), name
    if got.numel() == 0:
        return
    eps = torch.finfo(got.dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps
    floor = eps * max(1.0, exact.abs().max())
    error = (got - exact).abs().max()
    assert error <= 2 * (torchs - exact).abs().max() + floor, name


def scattered(x: Tensor, step: int = 2) -> Tensor:
    """Equal to x, but with NaN (or -1) between and around its elements, its axes reversed."""
    shape = [size + 2 for size in reversed(x.shape)]
    shape[-1] *= step
    fill = math.nan if x.is_floating_point() else -1
    buffer = torch.full(shape, fill, dtype=x.dtype, device=x.device)
    view = buffer[tuple(slice(1, size - 1) for size in shape[:-1])]
    view = view[..., 1 : 1 + x.shape[0] * step : step]
    return view.permute(*reversed(range(x.ndim))).copy_(x)


# layers, queries, classes, number of targets of each image
SIZES = {
    "one of each": (1, 1, 1, (1,)),
    "several tiles": (2, 70, 5, (3, 17, 0)),
    "many classes": (1, 7, 140, (2, 5)),
    "more targets than queries": (1, 3, 4, (5, 1)),
    "nothing to find": (2, 5, 3, (0, 0)),
}


def draw(case: str, dtype=torch.float32, spread: float = 3.0, seed: int = 0) -> dict[str, Tensor]:
    """Predictions and padded targets; padding is NaN, and a label that exists."""
    layers, queries, classes, counts = SIZES[case]
    generator = torch.Generator().manual_seed(seed)
    batch, targets = len(counts), max(counts)

    def boxes(*shape):
        return torch.rand(*shape, 4, generator=generator) * 0.5 + 0.2

    inputs = {
        "logits": (spread * torch.randn(layers, batch, queries, classes, generator=generator)).to(
            dtype
        ),
        "boxes_cxcywh": boxes(layers, batch, queries).to(dtype),
        "target_labels": torch.randint(0, classes, (batch, targets), generator=generator),
        "target_boxes_cxcywh": boxes(batch, targets),
        "target_counts": torch.tensor(counts),
    }
    for image, count in enumerate(counts):
        inputs["target_boxes_cxcywh"][image, count:] = math.nan
    return {name: x.to(DEVICE) for name, x in inputs.items()}


def in_double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


# ------------------------------------------------------------------------------ matching cost


@needs_kernels
@pytest.mark.parametrize("classification", ["focal", "softmax"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SIZES)
def test_cost(case, dtype, classification):
    inputs = draw(case, dtype)
    before = {name: (x.clone(), x._version) for name, x in inputs.items()}
    got = matching_cost(**inputs, classification=classification, backend="triton")
    torchs = matching_cost(**inputs, classification=classification, backend="torch")
    assert_close(got, torchs, matching_cost(**in_double(inputs), classification=classification))
    assert got.stride() == torchs.stride()
    for name, (values, version) in before.items():
        torch.testing.assert_close(inputs[name], values, rtol=0, atol=0, equal_nan=True)
        assert inputs[name]._version == version


@needs_kernels
@pytest.mark.parametrize(
    "options",
    [{"gamma": 0.0}, {"gamma": 1.5}, {"alpha": 0.9}, {"class_weight": 0.0, "bbox_weight": 7.0}],
    ids=str,
)
def test_options_of_the_cost(options):
    inputs = draw("several tiles")
    got = matching_cost(**inputs, **options, backend="triton")
    torchs = matching_cost(**inputs, **options, backend="torch")
    assert_close(got, torchs, matching_cost(**in_double(inputs), **options))


@needs_kernels
@pytest.mark.parametrize("classification", ["focal", "softmax"])
def test_cost_of_extreme_logits(classification):
    inputs = draw("several tiles")
    inputs["logits"] = inputs["logits"].sign() * 60
    inputs["logits"][0, 0, :3] = torch.tensor([[200.0], [-200.0], [0.0]], device=DEVICE)
    got = matching_cost(**inputs, classification=classification, backend="triton")
    torchs = matching_cost(**inputs, classification=classification, backend="torch")
    assert_close(got, torchs, matching_cost(**in_double(inputs), classification=classification))


@needs_kernels
@pytest.mark.parametrize("classification", ["focal", "softmax"])
def test_cost_with_strides_and_nan_around_the_inputs(classification):
    inputs = draw("several tiles")
    inputs["target_labels"][2] = 4  # the last class: what lies behind it is not read
    expected = matching_cost(**inputs, classification=classification, backend="triton")
    inputs = {name: scattered(x) for name, x in inputs.items()}
    got = matching_cost(**inputs, classification=classification, backend="triton")
    assert torch.equal(got, expected)
    assert torch.equal(
        matching_cost(**inputs, classification=classification, backend="triton"), got
    )


@needs_kernels
def test_a_label_out_of_range_is_not_read():
    inputs = draw("several tiles")
    inputs["target_labels"][0, 1], inputs["target_labels"][1, 3] = 5, -1
    got = matching_cost(**inputs, backend="triton").unflatten(0, (2, 3))
    bad = torch.zeros(got.shape, dtype=torch.bool, device=DEVICE)
    bad[:, 0, :, 1] = bad[:, 1, :, 3] = True
    assert torch.equal(got.isnan(), bad)


@needs_kernels
def test_registration_of_the_cost():
    from cdetr_kernels.ops.matching_cost import triton as _registered  # noqa: F401

    inputs = draw("more targets than queries", torch.bfloat16)
    inputs["target_boxes_cxcywh"].nan_to_num_(0.5)
    arguments = (*inputs.values(), 2.0, 5.0, 2.0, False, 0.25, 2.0)
    torch.library.opcheck(torch.ops.cdetr_fast.matching_cost.default, arguments)


@needs_kernels
def test_cost_compiles_and_exports():
    class Cost(torch.nn.Module):
        def forward(self, *inputs):
            return matching_cost(*inputs, backend="triton") * 2

    inputs = tuple(draw("several tiles").values())
    expected = Cost()(*inputs)
    compiled = torch.compile(Cost(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), expected)
    assert torch.equal(torch.export.export(Cost(), inputs).module()(*inputs), expected)


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


# ----------------------------------------------------------------------------------- set loss

LOSSES = ("loss_ce", "loss_bbox", "loss_giou")


def with_matches(inputs: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Gives each target a query of its own, while there are any."""
    layers, batch, queries, _ = inputs["logits"].shape
    targets = inputs["target_labels"].shape[1]
    generator = torch.Generator().manual_seed(seed)
    matches = torch.full((layers, batch, targets), -1)
    for layer in range(layers):
        for image, count in enumerate(inputs["target_counts"].tolist()):
            pairs = min(queries, count)
            chosen = torch.randperm(count, generator=generator)[:pairs]
            matches[layer, image, chosen] = torch.randperm(queries, generator=generator)[:pairs]
    return inputs | {"matches": matches.to(DEVICE)}


def differentiate(inputs: dict[str, Tensor], backend: str, num_boxes=13.0, **options):
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


def check_loss(inputs: dict[str, Tensor], **options):
    got = differentiate(inputs, "triton", **options)
    torchs = differentiate(inputs, "torch", **options)
    exact = differentiate(in_double(inputs), "torch", **options)
    assert got.keys() == exact.keys()
    for name, expected in exact.items():
        assert_close(got[name], torchs[name], expected, name)
    assert not got["cardinality_error"].requires_grad
    return got


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SIZES)
def test_loss_and_gradients(case, dtype):
    inputs = with_matches(draw(case, dtype))
    before = {name: (x.clone(), x._version) for name, x in inputs.items()}
    check_loss(inputs, num_boxes=torch.tensor(7.0, device=DEVICE))
    for name, (values, version) in before.items():
        torch.testing.assert_close(inputs[name], values, rtol=0, atol=0, equal_nan=True)
        assert inputs[name]._version == version


@needs_kernels
def test_loss_of_mixed_dtypes():
    """As under autocast: logits in half precision, boxes in fp32."""
    inputs = with_matches(draw("several tiles", torch.float16))
    inputs["boxes_cxcywh"] = inputs["boxes_cxcywh"].float()
    got = check_loss(inputs)
    assert got["dlogits"].dtype == torch.float16
    assert got["dboxes"].dtype == torch.float32


@needs_kernels
@pytest.mark.parametrize("gamma", [0.0, 1.0, 1.5])
def test_options_of_the_loss(gamma):
    check_loss(with_matches(draw("more targets than queries")), gamma=gamma, alpha=0.9)


@needs_kernels
def test_loss_of_extreme_logits():
    inputs = with_matches(draw("several tiles"))
    inputs["logits"] = inputs["logits"].sign() * 60
    inputs["logits"][0, 0, :4, 0] = torch.tensor([200.0, -200.0, 0.0, -0.0], device=DEVICE)
    check_loss(inputs)


@needs_kernels
def test_small_gradients_survive_half_precision():
    """Confident predictions, with the loss scaled as `GradScaler` does."""
    inputs = with_matches(draw("several tiles"))
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
def test_loss_with_strides_and_nan_around_the_inputs_and_the_same_bits_in_every_run():
    inputs = with_matches(draw("several tiles"))
    expected = differentiate(inputs, "triton")
    inputs = {name: scattered(x) for name, x in inputs.items()}
    for got in (differentiate(inputs, "triton"), differentiate(inputs, "triton")):
        assert all(torch.equal(got[name], x) for name, x in expected.items())


@needs_kernels
def test_loss_without_gradients():
    inputs = with_matches(draw("several tiles"))
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
@pytest.mark.parametrize("name", ["set_loss", "set_loss_backward"])
def test_registration_of_the_loss(name):
    from cdetr_kernels.ops.set_loss import triton as _registered  # noqa: F401

    inputs = with_matches(draw("more targets than queries", torch.bfloat16))
    inputs["target_boxes_cxcywh"].nan_to_num_(0.5)
    num_boxes = torch.tensor(3.0, device=DEVICE)
    if name == "set_loss":
        inputs["logits"].requires_grad_()
        inputs["boxes_cxcywh"].requires_grad_()
        arguments = (*inputs.values(), num_boxes, 0.25, 2.0, True)
    else:
        saved = (torch.rand(1, 2, 3, 4, device=DEVICE), torch.rand(2, 1, 2, 3, 4, device=DEVICE))
        losses = torch.rand(4, 1, device=DEVICE)
        arguments = (losses, *saved, num_boxes, torch.float16, torch.float32)
    torch.library.opcheck(getattr(torch.ops.cdetr_fast, name).default, arguments)


@needs_kernels
def test_loss_compiles_and_exports():
    class Loss(torch.nn.Module):
        def forward(self, *inputs):
            losses = set_loss(*inputs, num_boxes=13.0, backend="triton")
            return losses["loss_ce"] + losses["loss_giou"]

    inputs = with_matches(draw("more targets than queries"))
    arguments = tuple(inputs.values())
    expected = Loss()(*arguments)
    assert torch.equal(torch.export.export(Loss(), arguments).module()(*arguments), expected)
    compiled = torch.compile(Loss(), fullgraph=True, backend="aot_eager")
    leaf = inputs["logits"].requires_grad_()
    gradients = [
        torch.autograd.grad(function(*arguments).sum(), leaf)[0] for function in (Loss(), compiled)
    ]
    assert torch.equal(*gradients)


@needs_kernels
def test_a_gradient_of_the_gradient_is_refused():
    inputs = with_matches(draw("more targets than queries"))
    leaf = inputs["logits"].requires_grad_()
    loss = set_loss(**inputs, num_boxes=1, backend="triton")["loss_ce"].sum()
    (gradient,) = torch.autograd.grad(loss * leaf.sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="use backend='torch'"):
        torch.autograd.grad(gradient.sum(), leaf)
