"""`residual_layer_norm`: the definition against fp64, and the triton kernel against both.

The kernel is tested on a GPU, or in triton's interpreter in a process of its own.
"""

import pytest
import torch
from support.kernels import DEVICE, DTYPES, assert_close, needs_kernels
from torch import Tensor

from cdetr_kernels import residual_layer_norm
from cdetr_kernels.ops.residual_layer_norm import cases


def draw(shape, dtype, shared=False):
    """x with a mean far from 0, residual, weight and bias."""
    batch, rows, channels = (1, *shape)[-3:]
    x, residual, *affine = cases.make(dtype, DEVICE, batch, rows, channels, shared).inputs.values()
    return (x, residual, *affine) if len(shape) == 3 else (x[0], residual[0], *affine)


def exact(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    total = x.double() + residual.double()
    centred = total - total.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / (variance + eps).sqrt() * weight.double() + bias.double()


SHAPES = {
    "decoder": (2, 30, 256),
    "one row": (1, 1, 256),
    "odd width": (3, 7, 20),
    "rows left over": (1, 13, 128),
    "no batch": (9, 64),
    "one value": (2, 3, 1),
    "wide": (1, 3, 2500),
}


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("case", SHAPES)
def test_kernel(case, shared, dtype):
    """At most twice the error of torch in the same dtype."""
    inputs = draw(SHAPES[case], dtype, shared)
    versions = [x._version for x in inputs]
    got, torchs = (
        {"output": residual_layer_norm(*inputs, 1e-5, backend=backend)}
        for backend in ("triton", "torch")
    )
    assert_close(got, torchs, {"output": exact(*inputs, 1e-5)})
    assert [x._version for x in inputs] == versions


@needs_kernels
def test_rows_without_variance():
    x = torch.full((2, 5, 64), 1e4, device=DEVICE)
    _, _, weight, bias = draw((1, 1, 64), torch.float32)
    got = residual_layer_norm(x, torch.zeros_like(x), weight, bias, backend="triton")
    torch.testing.assert_close(got, bias.expand_as(x), rtol=0, atol=1e-6)


@needs_kernels
def test_empty_batch():
    inputs = draw((0, 5, 16), torch.float32)
    assert residual_layer_norm(*inputs, backend="triton").shape == (0, 5, 16)


@needs_kernels
def test_what_the_kernel_refuses():
    x, residual, weight, bias = draw((1, 2, 8), torch.float32)
    with pytest.raises(RuntimeError, match="'triton' cannot run: the kernel has no gradient"):
        residual_layer_norm(x, residual, weight.requires_grad_(), bias, backend="triton")
    with torch.no_grad():
        residual_layer_norm(x, residual, weight, bias, backend="triton")
    with pytest.raises(RuntimeError, match="up to 4096 channels"):
        residual_layer_norm(*draw((1, 1, 4097), torch.float32), backend="triton")


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_definition(dtype, shared):
    inputs = draw((2, 5, 24), dtype, shared)
    got = residual_layer_norm(*inputs, 1e-3)
    tolerance = 8 * torch.finfo(dtype).eps * (1 + exact(*inputs, 1e-3).abs().max())
    torch.testing.assert_close(got.double(), exact(*inputs, 1e-3), rtol=0, atol=tolerance.item())


def test_gradients_of_the_definition():
    inputs = [x.requires_grad_() for x in draw((2, 3, 5), torch.float64, shared=True)]
    assert torch.autograd.gradcheck(residual_layer_norm, inputs)


X = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, X[:, :2], X[0, 0], X[0, 0]), ValueError, r"residual: expected \[2, 3, 4\]"),
        ((X, X, X[0, 0, :3], X[0, 0]), ValueError, r"weight: expected \[4\], got \[3\]"),
        ((X, X, X[0, 0], X[0]), ValueError, r"bias: expected \[4\], got \[3, 4\]"),
        ((X, X.double(), X[0, 0], X[0, 0]), TypeError, r"residual: expected torch\.float32 as x"),
        ((X[..., :0], X, X, X), ValueError, r"x: expected \[\.\.\., C\], got float32 \[2, 3, 0\]"),
        ((X[0, 0, 0], X, X, X), ValueError, r"x: expected \[\.\.\., C\], got float32 \[\]"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        residual_layer_norm(*arguments)
