"""What the tests of both fused attention operators share: oracles, tolerances, awkward inputs."""

import contextlib
import math

import pytest
import torch
from torch import Tensor

from support.interpreter import INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_kernels = pytest.mark.skipif(
    not INTERPRETED and DEVICE == "cpu",
    reason="run by test_in_the_interpreter, in a process of its own",
)
compiled_only = pytest.mark.skipif(INTERPRETED, reason="needs kernels that can be compiled")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@contextlib.contextmanager
def poisoned_memory():
    """`torch.empty` is filled with NaN: what a kernel does not write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def differentiate(function, tensors, grad_output, dtype=None):
    """Output and gradients by name of `function(**tensors)`, in another dtype if one is given."""
    leaves = {
        name: None if x is None else x.detach().to(dtype or x.dtype).requires_grad_()
        for name, x in tensors.items()
    }
    output = function(**leaves)
    output.backward(grad_output.to(output.dtype))
    gradients = {name: x.grad for name, x in leaves.items() if x is not None}
    return {"output": output.detach(), **gradients}


def concatenated(mask):
    """The paper's form on torch's unfused attention."""

    def attend(q_content, q_spatial, k_content, k_spatial, value):
        query, key = q_content, k_content
        if q_spatial is not None:
            query = torch.cat((q_content, q_spatial), -1)
            key = torch.cat((k_content.expand(len(value), -1, -1, -1),
                             k_spatial.expand(len(value), -1, -1, -1)), -1)  # fmt: skip
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return torch.nn.functional.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (query, key, value)),
                attn_mask=None if mask is None else mask[:, None, None, :],
            ).transpose(1, 2)

    return attend


def assert_close(got: dict[str, Tensor], torchs: dict[str, Tensor], exact: dict[str, Tensor]):
    """At most twice the error of torch in the same dtype, against fp64.

    Torch may be exact by luck, as for a single key: the floor is one rounding of the result and the
    cancellation of two fp32 sums.
    """
    assert got.keys() == exact.keys()
    for name, expected in exact.items():
        assert got[name].shape == expected.shape
        assert got[name].dtype == torchs[name].dtype
        error = (got[name] - expected).abs().max()
        eps = torch.finfo(got[name].dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps
        floor = eps * max(1.0, expected.abs().max())
        assert error <= 2 * (torchs[name] - expected).abs().max() + floor, name


def scattered(x: Tensor, order: tuple[int, ...], step: int, offset: int) -> Tensor:
    """Equal to x, but with NaN between and around its elements and its axes stored in `order`."""
    shape = [x.shape[axis] for axis in order]
    buffer = torch.full([size + 2 for size in shape[:-1]] + [(shape[-1] + 2) * step + offset],
                        math.nan if x.is_floating_point() else True,
                        dtype=x.dtype, device=x.device)  # fmt: skip
    view = buffer[tuple(slice(1, size + 1) for size in shape[:-1])]
    view = view[..., offset : offset + shape[-1] * step : step]
    view = view.permute([order.index(axis) for axis in range(x.ndim)])
    return view.copy_(x)


def check_compilation(function, tensors, grad_output):
    """One graph, forward and backward, with the same bits."""
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = differentiate(function, tensors, grad_output)
    got = differentiate(compiled, tensors, grad_output)
    for name, x in expected.items():
        assert torch.equal(got[name], x)


def check_export(operator, inputs):
    """`torch.export` keeps the kernels of `operator(*inputs)`."""

    class Attention(torch.nn.Module):
        def forward(self, *inputs):
            return operator(*inputs, backend="triton")

    exported = torch.export.export(Attention(), inputs).module()
    assert torch.equal(exported(*inputs), Attention()(*inputs))


def check_no_second_derivative(function, tensors, name):
    """A gradient of the gradient is refused, not wrong."""
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    output = function(**leaves)
    (gradient,) = torch.autograd.grad(output.sum(), leaves["value"], create_graph=True)
    with pytest.raises(NotImplementedError, match="use backend='torch'"):
        torch.autograd.grad(gradient.sum(), leaves[name])


def check_refusals(function, draw):
    """What the kernels cannot do is said: fp64, and heads that are too wide."""
    tensors, _, _ = draw("odd sizes", torch.float64)
    with pytest.raises(RuntimeError, match=r"'triton' cannot run: .* not torch.float64"):
        function(**tensors)
    tensors, _, _ = draw("odd sizes")
    tensors["value"] = torch.zeros(2, 70, 1, 129, device=DEVICE)
    with pytest.raises(RuntimeError, match="heads of up to 128, not 129"):
        function(**tensors)
