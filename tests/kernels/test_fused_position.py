"""The triton kernels of both position codes against fp64, and their registration with torch.

On a machine with a GPU the tests run there. Everywhere they run in triton's interpreter, in a
process of its own: whether a kernel is interpreted is decided when triton is imported.
"""

import importlib
import math
from unittest import mock

import pytest
import torch
from support.interpreter import INTERPRETED, run_in_the_interpreter
from torch import Tensor

from cdetr_kernels import registry, sine_position_2d, sine_query
from cdetr_kernels.gpu import support

triton = pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
needs_kernels = pytest.mark.skipif(
    not INTERPRETED and DEVICE == "cpu",
    reason="run by test_in_the_interpreter, in a process of its own",
)
compiled_only = pytest.mark.skipif(INTERPRETED, reason="needs kernels that can be compiled")


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
    """At most twice the error of torch in the same dtype, against fp64.

    Torch may be exact by luck, as at an angle of 0: the floor is one rounding of the result and a
    few of an angle in fp32.
    """
    assert got.shape == exact.shape, name
    assert got.dtype == torchs.dtype, name
    assert got.isfinite().all(), name
    eps = torch.finfo(got.dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps
    floor = eps * max(1.0, exact.abs().max())
    error = (got - exact).abs().max()
    assert error <= 2 * (torchs - exact).abs().max() + floor, name


def random(*shape, seed=0, dtype=torch.float32, normal=False):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn if normal else torch.rand
    return draw(shape, generator=generator).to(DEVICE, dtype)


def scattered(x: Tensor, order: tuple[int, ...], step: int) -> Tensor:
    """Equal to x, but with NaN between and around its elements and its axes stored in `order`."""
    shape = [x.shape[axis] + 2 for axis in order]
    shape[-1] *= step
    fill = math.nan if x.is_floating_point() else True
    buffer = torch.full(shape, fill, dtype=x.dtype, device=x.device)
    view = buffer[tuple(slice(1, x.shape[axis] + 1) for axis in order[:-1])]
    view = view[..., 1 : 1 + x.shape[order[-1]] * step : step]
    return view.permute([order.index(axis) for axis in range(x.ndim)]).copy_(x)


# ------------------------------------------------------------------- code of the map positions


def draw_mask(kind: str, batch: int, height: int, width: int) -> Tensor:
    """Of several images with holes, the last is fully masked."""
    mask = torch.zeros(batch, height, width, dtype=torch.bool)
    if kind == "padded":
        for i in range(batch):
            mask[i, : height - i * height // 3, : width - i * width // 2] = True
    elif kind == "holes":
        mask = random(batch, height, width).cpu() > 0.4
        mask[1:][-1:] = False
    return mask.to(DEVICE)


# kind, batch, height, width, channels
MASKS = {
    "one position": ("padded", 1, 1, 1, 4),
    "padded": ("padded", 2, 3, 17, 256),
    "holes": ("holes", 3, 3, 33, 20),
    "fully masked": ("none", 2, 3, 4, 8),
    "tall": ("holes", 1, 33, 2, 8),
    "wide": ("holes", 1, 1, 150, 8),
    "several blocks of features": ("padded", 1, 3, 5, 520),
}


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MASKS)
def test_position(case, dtype):
    *shape, channels = MASKS[case]
    mask = draw_mask(*shape)
    before, version = mask.clone(), mask._version
    got = sine_position_2d(mask, channels, dtype=dtype, backend="triton")
    torchs = sine_position_2d(mask, channels, dtype=dtype, backend="torch")
    assert_close(got, torchs, sine_position_2d(mask, channels, dtype=torch.float64))
    assert torch.equal(mask, before)
    assert mask._version == version


@needs_kernels
@pytest.mark.parametrize(
    "options",
    [{"normalize": False}, {"temperature": 20.0}, {"temperature": 0.5}, {"scale": -1.5}],
    ids=str,
)
def test_options_of_the_position(options):
    mask = draw_mask("holes", 1, 2, 140)
    got = sine_position_2d(mask, 64, backend="triton", **options)
    torchs = sine_position_2d(mask, 64, backend="torch", **options)
    assert_close(got, torchs, sine_position_2d(mask, 64, dtype=torch.float64, **options))


@needs_kernels
@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)], ids=str)
def test_strides_of_the_mask_and_what_lies_around_it(order, step):
    mask = draw_mask("holes", 3, 2, 5)
    expected = sine_position_2d(mask, 8, backend="triton")
    assert torch.equal(
        sine_position_2d(scattered(mask, order, step), 8, backend="triton"), expected
    )
    shared = mask[:1].expand(3, -1, -1)
    assert torch.equal(sine_position_2d(shared, 8, backend="triton")[2], expected[0])


@needs_kernels
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_position_on_an_empty_map(shape):
    mask = torch.ones(shape, dtype=torch.bool, device=DEVICE)
    assert sine_position_2d(mask, 8, backend="triton").shape == (shape[0], shape[1] * shape[2], 8)


@needs_kernels
def test_registration_of_the_position():
    from cdetr_kernels.ops.sine_position_2d import triton as _registered  # noqa: F401

    arguments = (draw_mask("holes", 2, 3, 4), 8, 10000.0, True, 6.28, torch.float16)
    torch.library.opcheck(torch.ops.cdetr_fast.sine_position_2d.default, arguments)


# ------------------------------------------------------------------------ code of the queries

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
    points_shape, lambda_rows, channels = QUERIES[case]
    points = random(*points_shape, dtype=dtype)
    query_scale, rows = None, points_shape[:-1]
    if lambda_rows is not None:
        query_scale = random(*lambda_rows, channels, seed=1, dtype=dtype, normal=True)
        rows = torch.broadcast_shapes(rows, lambda_rows)
    grad_output = random(*rows, channels, seed=2, dtype=dtype, normal=True)
    return points, query_scale, grad_output, channels


def differentiate(function, points, query_scale, grad_output, dtype=None):
    """Output and gradients of `function(points, query_scale)`, in another dtype if one is given."""
    leaves = [
        x.detach().to(dtype or x.dtype).requires_grad_()
        for x in (points, query_scale)
        if x is not None
    ]
    output = function(*leaves)
    output.backward(grad_output.to(output.dtype))
    names = ("output", "points", "lambda")
    return dict(zip(names, (output.detach(), *(x.grad for x in leaves)), strict=False))


def code(channels, backend, **options):
    return lambda points, query_scale=None: sine_query(
        points, channels, query_scale, backend=backend, **options
    )


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", QUERIES)
def test_query_and_gradients(case, dtype):
    points, query_scale, grad_output, channels = draw_query(case, dtype)
    inputs = [x for x in (points, query_scale) if x is not None]
    before = [(x.clone(), x._version) for x in inputs]
    arguments = (points, query_scale, grad_output)
    got = differentiate(code(channels, "triton"), *arguments)
    torchs = differentiate(code(channels, "torch"), *arguments)
    exact = differentiate(code(channels, "torch"), *arguments, torch.float64)
    assert got.keys() == exact.keys()
    for name, expected in exact.items():
        assert_close(got[name], torchs[name], expected, name)
    for x, (values, version) in zip(inputs, before, strict=True):
        assert torch.equal(x, values)
        assert x._version == version


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
    for name, expected in exact.items():
        assert_close(got[name], torchs[name], expected, name)


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
    for name, expected in exact.items():
        assert_close(got[name], torchs[name], expected, name)


@needs_kernels
@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)], ids=str)
def test_strides_and_what_lies_around_the_inputs(order, step):
    points, query_scale, grad_output, channels = draw_query("boxes of odd sizes", torch.float32)
    expected = differentiate(code(channels, "triton"), points, query_scale, grad_output)
    leaves = [scattered(x, order, step).requires_grad_() for x in (points, query_scale)]
    output = code(channels, "triton")(*leaves)
    gradients = torch.autograd.grad(output, leaves, scattered(grad_output, order, step))
    for got, x in zip((output, *gradients), expected.values(), strict=True):
        assert torch.equal(got, x)


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
def test_the_same_bits_in_every_run():
    mask = draw_mask("holes", 2, 3, 5)
    position = sine_position_2d(mask, 8, backend="triton")
    assert torch.equal(position, sine_position_2d(mask, 8, backend="triton"))
    points, *others, channels = draw_query("as in the decoder", torch.float16)
    first = differentiate(code(channels, "triton"), points, *others)
    second = differentiate(code(channels, "triton"), points, *others)
    assert all(torch.equal(x, second[name]) for name, x in first.items())


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
@pytest.mark.parametrize(("scaled", "shared"), [(False, False), (True, True)])
@pytest.mark.parametrize("name", ["sine_query", "sine_query_backward"])
def test_registration_of_the_query(name, scaled, shared):
    from cdetr_kernels.ops.sine_query import triton as _registered  # noqa: F401

    differentiable = name == "sine_query"
    points = random(1 if shared else 2, 5, 4).requires_grad_(differentiable)
    query_scale = random(2, 5, 16).requires_grad_(differentiable) if scaled else None
    rows = 2 if scaled else len(points)
    arguments = {
        "sine_query": (points, query_scale, 16, 10000.0, 6.28, torch.float32),
        "sine_query_backward": (random(rows, 5, 16), points, query_scale, 10000.0, 6.28),
    }[name]
    torch.library.opcheck(getattr(torch.ops.cdetr_fast, name).default, arguments)


@needs_kernels
def test_both_codes_compile_into_one_graph():
    mask = draw_mask("holes", 2, 3, 4)
    points, query_scale, grad_output, channels = draw_query("as in the decoder", torch.float32)

    def function(points, query_scale):
        key_code = sine_position_2d(mask, channels, backend="triton").sum((0, 1))
        return sine_query(points, channels, query_scale, backend="triton") * key_code

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = differentiate(function, points, query_scale, grad_output)
    got = differentiate(compiled, points, query_scale, grad_output)
    assert all(torch.equal(got[name], x) for name, x in expected.items())


@needs_kernels
def test_both_codes_export():
    class Codes(torch.nn.Module):
        def forward(self, mask, points, query_scale):
            key_code = sine_position_2d(mask, 16, backend="triton")
            return key_code, sine_query(points, 16, query_scale, backend="triton")

    inputs = (draw_mask("holes", 2, 3, 4), random(1, 5, 2), random(2, 5, 16))
    exported = torch.export.export(Codes(), inputs).module()
    for got, expected in zip(exported(*inputs), Codes()(*inputs), strict=True):
        assert torch.equal(got, expected)


@needs_kernels
def test_a_gradient_of_the_gradient_is_refused():
    points, query_scale = random(5, 2).requires_grad_(), random(5, 16).requires_grad_()
    output = sine_query(points, 16, query_scale, backend="triton")
    (gradient,) = torch.autograd.grad(output.sum(), points, create_graph=True)
    with pytest.raises(NotImplementedError, match="use backend='torch'"):
        torch.autograd.grad(gradient.sum(), query_scale)


@needs_kernels
def test_what_the_kernels_cannot_do_is_said():
    mask, points, ones = draw_mask("none", 1, 2, 2), random(3, 2), torch.ones(8, device=DEVICE)
    for dtype in (torch.float64, torch.int32):
        with pytest.raises(RuntimeError, match=f"'triton' cannot run: .* not {dtype}"):
            sine_position_2d(mask, 8, dtype=dtype, backend="triton")
        with pytest.raises(RuntimeError, match=f"'triton' cannot run: .* not {dtype}"):
            sine_query(points, 8, dtype=dtype, backend="triton")
        with pytest.raises(RuntimeError, match=f"'triton' cannot run: .* not {dtype}"):
            sine_query(points.to(dtype), 8, dtype=torch.float32, backend="triton")
        with pytest.raises(RuntimeError, match=f"'triton' cannot run: .* not {dtype}"):
            sine_query(points, 8, ones.to(dtype), dtype=torch.float32, backend="triton")
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"temperature: expected a positive .* got "):
            sine_position_2d(mask, 8, temperature, backend="triton")
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


@compiled_only
def test_tensors_on_a_cpu_are_refused():
    with pytest.raises(RuntimeError, match=r"sine_position_2d: .* the tensors are on cpu"):
        sine_position_2d(torch.ones(1, 2, 2, dtype=torch.bool), 8, backend="triton")
    with pytest.raises(RuntimeError, match=r"sine_query: .* the tensors are on cpu"):
        sine_query(torch.rand(3, 2), 8, backend="triton")


def test_a_machine_without_triton_says_so():
    with (
        mock.patch.object(support, "HAS_TRITON", False),
        pytest.raises(RuntimeError, match="'triton' cannot run: triton is not installed"),
    ):
        sine_query(torch.rand(3, 2), 8, backend="triton")


@pytest.mark.parametrize("name", ["sine_position_2d", "sine_query"])
def test_auto_takes_the_reference_and_says_why(name):
    operator = registry.operator(name)
    choice = operator.choice()
    assert choice.path == "torch"
    assert "not run on a GPU yet" in choice.reason or "the tensors are on cpu" in choice.reason
    reference = importlib.import_module(f"cdetr_kernels.ops.{name}.reference")
    assert operator.implementations["torch"].run is getattr(reference, name)


def test_frequencies_in_two_parts():
    from cdetr_kernels.gpu.waves import frequency_step

    for temperature, features in ((10000.0, 128), (20.0, 10), (0.5, 2), (1.0, 64), (2.0**100, 4)):
        high, low = frequency_step(temperature, features)
        assert high + low == -2 * math.log2(temperature) / features
        assert abs(low) <= abs(high) * 2**-11
        top = torch.tensor(4095 * high, dtype=torch.float64)
        assert top.float().double() == top


@compiled_only
@pytest.mark.parametrize("kernel", ["sine_position_2d", "sine_query", "sine_query_backward"])
def test_audit_of_machine_code(kernel):
    """One case here, all of them by `python -m benchmarks.audit`."""
    from benchmarks import audit

    case = audit.SineCase("half")
    launch = audit.launches(case, "sm_90")[kernel]
    used = audit.examine(launch, "sm_90")
    assert audit.complaints(used, launch, case, "sm_90") == []
