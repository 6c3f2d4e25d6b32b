"""Sum of a state and its update, and layer norm of that, in one pass; for inference.

A program owns BR rows with all of their channels in registers: both inputs are read once, the sum
is neither rounded nor written, and the variance is that of centred values.

Names: R rows of x, S rows of the residual (which repeat), C channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cdetr_kernels.gpu import launching
from cdetr_kernels.gpu.arithmetic import rounded
from cdetr_kernels.gpu.launching import Launch
from cdetr_kernels.gpu.registration import register
from cdetr_kernels.gpu.tiles import Tile

_VALUES = 1024


@triton.jit(do_not_specialize=["R", "S"])
def layer_norm_kernel(
    p_x,  # [R, C], contiguous
    p_residual,  # [S, C], contiguous
    p_weight,  # [C]
    p_bias,  # [C]
    p_out,  # [R, C], contiguous
    R, S,
    eps,
    C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute BR rows."""
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_c = tl.arange(0, BC)
    m_in = (o_r < R)[:, None]
    m_c = o_c < C
    if C != BC:
        m_in = m_in & m_c[None, :]
    b_x = tl.load(p_x + o_r[:, None] * C + o_c[None, :], m_in, other=0).to(tl.float32)
    o_s = o_r % S
    b_x += tl.load(p_residual + o_s[:, None] * C + o_c[None, :], m_in, other=0).to(tl.float32)
    b_mean = tl.sum(b_x, 1) / C  # [BR]
    b_x = b_x - b_mean[:, None]
    if C != BC:
        b_x = tl.where(m_c[None, :], b_x, 0.0)
    b_variance = tl.sum(b_x * b_x, 1) / C
    b_x = b_x * tl.div_rn(1.0, tl.sqrt_rn(b_variance + eps))[:, None]
    b_weight = tl.load(p_weight + o_c, m_c, other=0).to(tl.float32)
    b_bias = tl.load(p_bias + o_c, m_c, other=0).to(tl.float32)
    b_out = rounded(b_x * b_weight[None, :] + b_bias[None, :], p_out.dtype.element_ty, PRECISION)
    tl.store(p_out + o_r[:, None] * C + o_c[None, :], b_out, m_in)


def norm_launch(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, output: Tensor
) -> Launch:
    """Compute all rows of contiguous tensors into `output`."""
    channels = x.shape[-1]
    block = triton.next_power_of_2(channels)
    rows = max(1, _VALUES // block)
    tile = Tile(rows, block, max(2, block // 1024), 1, registers=128, shared=2)
    arguments = {
        "p_x": x,
        "p_residual": residual,
        "p_weight": weight,
        "p_bias": bias,
        "p_out": output,
        "R": x.numel() // channels,
        "S": residual.numel() // channels,
        "eps": float(eps),
        "C": channels,
        "BR": tile.queries,
        "BC": tile.keys,
        "PRECISION": launching.dot_precision(output.dtype),
    }
    programs = triton.cdiv(x.numel() // channels, tile.queries)
    return Launch(layer_norm_kernel, programs, arguments, tile)


def _forward(x, residual, weight, bias, eps) -> Tensor:
    output = _output(x, residual, weight, bias, eps)
    launching.run(
        norm_launch,
        *(x.contiguous(), residual.contiguous(), weight.contiguous(), bias.contiguous()),
        *(eps, output),
    )
    return output


def _output(x, residual, weight, bias, eps) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# No autograd: it is asked for only where no input has a gradient.
_residual_layer_norm = register(
    "residual_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps) "
    "-> Tensor",
    _forward,
    _output,
)


def residual_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """Run the path "triton" of `cdetr_kernels.residual_layer_norm`; see there for shapes."""
    return _residual_layer_norm(x, residual, weight, bias, eps)
