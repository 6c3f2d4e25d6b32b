"""Sine code of the map positions, from the mask in one launch.

    y[b,i,j] = unpadded rows up to i in column j       x[b,i,j] = unpadded columns up to j in row i
    c        = c / (all of them in that column or row + 1e-6) * scale                 if normalised
    code     = [sin(y/t_0), cos(y/t_0), sin(y/t_1), ..., sin(x/t_0), cos(x/t_0), ...]
    t_i      = temperature ** (2 i / (C/2))

A program owns BP neighbours in one row of the map, and one half of their code. It counts the mask
itself, down its columns or along its row, block by block: nothing on the chip grows with the map,
and the mask, a byte a position, stays in the L2. Any pattern is right, not only rectangles.

Names: B images, h and w the map (H, W in kernels), C channels; tiles of BP positions and BI pairs.
Source: the authors' models/position_encoding.py (PositionEmbeddingSine).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cdetr_kernels.gpu import launching, waves
from cdetr_kernels.gpu.arithmetic import rounded
from cdetr_kernels.gpu.launching import Launch
from cdetr_kernels.gpu.registration import register
from cdetr_kernels.gpu.waves import frequencies, frequency_step, sine_and_cosine

POSITIONS = 16


@triton.jit
def _count_down(p_mask, i_h, H, mask_h, o_w, W, mask_w, BLOCK: tl.constexpr):
    """Count the unpadded rows up to i_h, and all of them, in the columns o_w."""
    o_block = tl.arange(0, BLOCK)
    b_count = tl.zeros([BLOCK, o_w.shape[0]], tl.int32)
    b_total = b_count
    for first in range(0, H, BLOCK):
        o_h = first + o_block
        p_block = p_mask + o_h.to(tl.int64)[:, None] * mask_h + o_w.to(tl.int64)[None, :] * mask_w
        b_mask = tl.load(p_block, (o_h < H)[:, None] & (o_w < W)[None, :], other=0) != 0
        b_total += b_mask.to(tl.int32)
        b_count += (b_mask & (o_h <= i_h)[:, None]).to(tl.int32)
    return tl.sum(b_count, 0), tl.sum(b_total, 0)


@triton.jit
def _count_along(p_row, o_w, i_first, W, mask_w, BLOCK: tl.constexpr):
    """Count a row's unpadded columns up to each of o_w (from i_first on), and all of them."""
    b_before = tl.zeros([BLOCK], tl.int32)
    b_total = b_before
    for first in range(0, W, BLOCK):
        o_k = first + tl.arange(0, BLOCK)
        b_mask = tl.load(p_row + o_k.to(tl.int64) * mask_w, o_k < W, other=0) != 0
        b_total += b_mask.to(tl.int32)
        b_before += (b_mask & (o_k < i_first)).to(tl.int32)
    b_mask = tl.load(p_row + o_w.to(tl.int64) * mask_w, o_w < W, other=0) != 0
    b_count = tl.sum(b_before, 0) + tl.cumsum(b_mask.to(tl.int32), 0)
    return b_count, tl.sum(b_total, 0) + o_w * 0


@triton.jit(do_not_specialize=["H", "W"])
def position_kernel(
    p_mask,  # [B, H, W]
    p_out,  # [B, H * W, C], contiguous
    mask_b, mask_h, mask_w,
    H, W,
    scale,
    step_high, step_low,
    C: tl.constexpr, BP: tl.constexpr, BI: tl.constexpr,
    NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute one half of the code of BP positions in a row."""
    i = tl.program_id(0)
    i_half = i % 2
    tiles = tl.cdiv(W, BP)
    i_first = (i // 2) % tiles * BP
    i_row = i // 2 // tiles  # of B * H
    i_b, i_h = (i_row // H).to(tl.int64), i_row % H
    o_w = i_first + tl.arange(0, BP)
    p_mask += i_b * mask_b
    if i_half == 0:
        b_count, b_total = _count_down(p_mask, i_h, H, mask_h, o_w, W, mask_w, 32)
    else:
        p_row = p_mask + i_h.to(tl.int64) * mask_h
        b_count, b_total = _count_along(p_row, o_w, i_first, W, mask_w, 128)
    b_c = b_count.to(tl.float32)  # [BP]
    if NORMALIZE:
        b_c = tl.div_rn(b_c, b_total.to(tl.float32) + 1e-6) * scale

    PAIRS: tl.constexpr = C // 4
    p_rows = p_out + (i_row.to(tl.int64) * W + o_w)[:, None] * C + i_half * (C // 2)
    for first in range(0, PAIRS, BI):
        b_frequency = frequencies(first + tl.arange(0, BI), step_high, step_low)  # [BI]
        b_sine, b_cosine = sine_and_cosine(b_c[:, None] * b_frequency[None, :])
        b_code = tl.interleave(b_sine, b_cosine)  # [BP, 2 * BI]
        o_c = 2 * first + tl.arange(0, 2 * BI)
        m_code = (o_w < W)[:, None]
        if PAIRS % BI != 0:
            m_code = m_code & (o_c < 2 * PAIRS)[None, :]
        b_code = rounded(b_code, p_out.dtype.element_ty, PRECISION)
        tl.store(p_rows + o_c[None, :], b_code, m_code)


def position_launch(
    mask: Tensor, temperature: float, normalize: bool, scale: float, output: Tensor
) -> Launch:
    """Compute the code of `mask` into `output`."""
    batch, height, width = mask.shape
    channels = output.shape[-1]
    step_high, step_low = frequency_step(temperature, channels // 2)
    tile = waves.tile(POSITIONS, channels // 4, registers=48)
    arguments = {
        "p_mask": mask,
        "p_out": output,
        "mask_b": mask.stride(0),
        "mask_h": mask.stride(1),
        "mask_w": mask.stride(2),
        "H": height,
        "W": width,
        "scale": float(scale),
        "step_high": step_high,
        "step_low": step_low,
        "C": channels,
        "BP": tile.queries,
        "BI": tile.keys,
        "NORMALIZE": normalize,
        # Nothing is multiplied here, but outputs are rounded, and that has a variant in bf16.
        "PRECISION": launching.dot_precision(output.dtype),
    }
    programs = 2 * triton.cdiv(width, tile.queries) * height * batch
    return Launch(position_kernel, programs, arguments, tile)


def _forward(mask, channels, temperature, normalize, scale, dtype) -> Tensor:
    output = _output(mask, channels, temperature, normalize, scale, dtype)
    launching.run(position_launch, mask, temperature, normalize, scale, output)
    return output


def _output(mask, channels, temperature, normalize, scale, dtype) -> Tensor:
    batch, height, width = mask.shape
    return mask.new_empty(batch, height * width, channels, dtype=dtype)


# No autograd: a mask has no gradient.
_sine_position_2d = register(
    "sine_position_2d(Tensor mask, int channels, float temperature, bool normalize, float scale, "
    "ScalarType dtype) -> Tensor",
    _forward,
    _output,
)


def sine_position_2d(
    mask: Tensor,
    channels: int,
    temperature: float,
    normalize: bool,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """Run the path "triton" of `cdetr_kernels.sine_position_2d`; see there for shapes.

    Raises:
        ValueError: `temperature` or `channels` is out of the kernels' range.
    """
    return _sine_position_2d(mask, channels, temperature, normalize, scale, dtype)
