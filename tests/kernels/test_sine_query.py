"""`sine_query`: its definition against the formula, and the triton kernel against fp64.

The kernel is tested on a GPU, or in triton's interpreter in a process of its own.
"""

import importlib
import math

import pytest
import torch
from support import kernels
from support.kernels import (
    DEVICE,
    DTYPES,
    assert_accurate,
    assert_close,
    needs_kernels,
)

from cdetr_kernels import registry, sine_query
from cdetr_kernels.ops.sine_query import cases
from cdetr_kernels.testing.case import RandomTensors

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def random(*shape, seed=0, dtype=torch.float32, normal=False):
    tensors = RandomTensors(DEVICE, dtype, seed)
    return tensors.normal(*shape) if normal else tensors.uniform(*shape)


# shape of the points, shape of lambda without its last size (None: no lambda), channels
QUERIES = {
    "one of each": ((1, 2), (1,), 4),
    "no lambda": ((1, 63, 2), None, 256),
    "as in the decoder": ((1, 33, 2), (2, 33), 256),
    "boxes": ((2, 5, 4), (2, 5), 256),
    "odd sizes": ((3, 7, 2), (3, 7), 20),
    "boxes of odd sizes": ((1, 9, 4), (2, 9), 24),
    "one lambda": ((2, 5, 2), (), 16),
    "one point": ((2,), (3, 5), 16),
    "four dimensions": ((2, 1, 3, 2), (4, 1), 16),
    "several blocks of features": ((3, 2), (3,), 520),
}


def draw_query(case, dtype):
    """Points, lambda and the gradient of the output."""
    points, rows, channels = QUERIES[case]
    call = make_case(case, dtype)
    shape = torch.broadcast_shapes(points[:-1], rows or ())
    grad_output = RandomTensors(DEVICE, dtype, seed=2).normal(*shape, channels)
    return *call.inputs.values(), grad_output, channels


def make_case(case, dtype):
    points, rows, channels = QUERIES[case]
    return cases.make(
        dtype, DEVICE, channels=channels, points=points, rows=rows, scaled=rows is not None
    )


def differentiate(function, points, query_scale, grad_output, dtype=None):
    """Output and gradients of `function(points, query_scale)`, in another dtype if one is given."""
    tensors = {"points": points, "lambda": query_scale}
    present = {name: x for name, x in tensors.items() if x is not None}
    return kernels.differentiate(lambda **x: function(*x.values()), present, grad_output, dtype)


def code(channels, backend, **options):
    return lambda points, query_scale=None: sine_query(
        points, channels, query_scale, backend=backend, **options
    )


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", QUERIES)
def test_query_and_gradients(case, dtype):
    assert_accurate(make_case(case, dtype))


@needs_kernels
@pytest.mark.parametrize("out", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("of_points", "of_lambda"),
    [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)],
    ids=str,
)
def test_mixed_dtypes(of_points, of_lambda, out):
    points, query_scale, grad_output, channels = draw_query("boxes of odd sizes", torch.float32)
    arguments = (points.to(of_points), query_scale.to(of_lambda), grad_output.to(out))
    got = differentiate(code(channels, "triton", dtype=out), *arguments)
    torchs = differentiate(code(channels, "torch", dtype=out), *arguments)
    exact = differentiate(code(channels, "torch"), *arguments, torch.float64)
    assert_close(got, torchs, exact)


@needs_kernels
@pytest.mark.parametrize("shared", ["points", "lambda"])
@pytest.mark.parametrize("rows", [(4, 4), (2, 4, 2)], ids=str)
def test_gradients_of_what_rows_share_are_summed_before_they_are_rounded(rows, shared):
    """Of large gradients that cancel a small sum is left, to be rounded once."""
    one = (1,) * len(rows)
    points = random(*one, 2, dtype=torch.bfloat16)
    query_scale = random(*one, 16, seed=1, dtype=torch.bfloat16, normal=True)
    if shared == "points":
        query_scale = query_scale.expand(*rows, -1)
    else:
        points = points.expand(*rows, -1)
    grad_output = random(*rows, 16, seed=2, normal=True)
    grad_output -= grad_output.mean(tuple(range(len(rows))), keepdim=True) * 0.99
    arguments = (points, query_scale, grad_output)
    got = differentiate(code(16, "triton", dtype=torch.float32), *arguments)
    exact = differentiate(code(16, "torch"), *arguments, torch.float64)
    once = torch.finfo(torch.bfloat16).eps / 2 * exact[shared].abs()
    assert ((got[shared] - exact[shared]).abs() <= once + 1e-4).all()


@needs_kernels
@pytest.mark.parametrize(
    "options", [{"temperature": 20.0}, {"temperature": 0.5}, {"scale": -300.0}], ids=str
)
def test_options_of_the_query(options):
    points, query_scale, grad_output, channels = draw_query("odd sizes", torch.float32)
    points = points - 0.5  # outside of the image too
    arguments = (points, query_scale, grad_output)
    got = differentiate(code(channels, "triton", **options), *arguments)
    torchs = differentiate(code(channels, "torch", **options), *arguments)
    exact = differentiate(code(channels, "torch", **options), *arguments, torch.float64)
    assert_close(got, torchs, exact)


@needs_kernels
def test_a_gradient_of_one_element_for_all():
    """The gradient of a sum has strides of 0."""
    points, query_scale, grad_output, channels = draw_query("odd sizes", torch.float32)
    expected = differentiate(
        code(channels, "triton"), points, query_scale, torch.ones_like(grad_output)
    )
    one = torch.ones((), device=DEVICE).expand(grad_output.shape)
    got = differentiate(code(channels, "triton"), points, query_scale, one)
    assert all(torch.equal(x, expected[name]) for name, x in got.items())


@needs_kernels
def test_no_queries():
    points = torch.empty(1, 0, 2, device=DEVICE, requires_grad=True)
    query_scale = torch.empty(2, 0, 8, device=DEVICE, requires_grad=True)
    output = sine_query(points, 8, query_scale, backend="triton")
    output.sum().backward()
    assert output.shape == (2, 0, 8)
    assert points.grad.shape == points.shape
    shared = torch.rand(1, 2, device=DEVICE, requires_grad=True)
    sine_query(shared, 8, query_scale.detach(), backend="triton").sum().backward()
    assert (shared.grad == 0).all()


@needs_kernels
def test_large_angles():
    angles = torch.linspace(-12000, 12000, 120, device=DEVICE).view(60, 2)
    got = sine_query(angles, 4, scale=1.0, backend="triton")
    exact = torch.stack((angles.double().sin(), angles.double().cos()), -1).flip(1).flatten(1)
    assert (got - exact).abs().max() <= torch.finfo(torch.float32).eps


@needs_kernels
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")
def test_nan_stays_in_its_row():
    points = random(3, 2)
    expected = sine_query(points, 16, backend="triton")
    points[1, 0] = math.nan  # x: the second half
    got = sine_query(points, 16, backend="triton")
    assert got[1, 8:].isnan().all()
    assert torch.equal(got[[0, 2]], expected[[0, 2]])
    assert torch.equal(got[1, :8], expected[1, :8])


@needs_kernels
def test_what_the_kernels_cannot_do_is_said():
    points, ones = random(3, 2), torch.ones(8, device=DEVICE)
    for dtype in (torch.float64, torch.int32):
        with pytest.raises(RuntimeError, match=f"'triton' cannot run: .* not {dtype}"):
            sine_query(points, 8, dtype=dtype, backend="triton")
        with pytest.raises(RuntimeError, match=f"'triton' cannot run: .* not {dtype}"):
            sine_query(points.to(dtype), 8, dtype=torch.float32, backend="triton")
        with pytest.raises(RuntimeError, match=f"'triton' cannot run: .* not {dtype}"):
            sine_query(points, 8, ones.to(dtype), dtype=torch.float32, backend="triton")
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"temperature: expected a positive .* got "):
            sine_query(points, 8, None, temperature, backend="triton")
    with pytest.raises(ValueError, match=r"channels: expected at most 8192 for each .* 16384"):
        sine_query(points, 32768, backend="triton")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_lambda_that_does_not_fit(backend):
    points = random(3, 2)
    with pytest.raises(ValueError, match=r"query_scale: .* broadcasts against \[3\], got \[4, 8\]"):
        sine_query(points, 8, random(4, 8), backend=backend)
    with pytest.raises(ValueError, match=r"query_scale: expected .* as reference_points, got meta"):
        sine_query(points, 8, torch.empty(3, 8, device="meta"), backend=backend)


@pytest.mark.parametrize("name", ["sine_position_2d", "sine_query"])
def test_auto_takes_the_reference_and_says_why(name):
    operator = registry.operator(name)
    choice = operator.choice()
    assert choice.path == "torch"
    assert "no record of this device" in choice.reason or "the tensors are on cpu" in choice.reason
    reference = importlib.import_module(f"cdetr_kernels.ops.{name}.reference")
    assert operator.implementations["torch"].run is getattr(reference, name)


@pytest.mark.parametrize("coordinates", [2, 4])
def test_query_gradients(coordinates):
    points = torch.rand(3, coordinates, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p, s: sine_query(p, 16, s), (points, scale))


def test_query_scale_multiplies_and_sets_the_dtype():
    points, scale = torch.rand(1, 3, 2), torch.randn(4, 3, 16)
    torch.testing.assert_close(sine_query(points, 16, scale), sine_query(points, 16) * scale)
    half = sine_query(points, 16, scale.bfloat16())
    assert half.dtype == torch.bfloat16
    assert half.shape == (4, 3, 16)


def test_errors():
    with pytest.raises(ValueError, match=r"reference_points: expected .* got \[3, 3\]"):
        sine_query(torch.rand(3, 3), 16)
    with pytest.raises(ValueError, match="channels: expected a positive multiple of 8, got 12"):
        sine_query(torch.rand(3, 4), 12)
    with pytest.raises(ValueError, match=r"query_scale: expected \[..., 16\], got \[\]"):
        sine_query(torch.rand(3, 2), 16, torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"query_scale: expected \[..., 16\], got \[3, 8\]"):
        sine_query(torch.rand(3, 2), 16, torch.rand(3, 8))
    with pytest.raises(TypeError, match=r"dtype: .* floating point .* got torch\.int64"):
        sine_query(torch.ones(3, 2, dtype=torch.int64), 16)
