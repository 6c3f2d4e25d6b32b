"""Images of different sizes to one normalised batch, with its mask: one launch per image.

    values[c, y, x] = (image[c, y, x] - shift[c]) / divisor[c]    inside of the image, 0 outside
                    = image[c, y, x] * factor                     without a shift
    mask[y, x]      = 1 inside of the image, 0 outside

A program owns BW neighbours in one row of the padded image, in all channels. Pixels are read once,
in their own dtype and layout, and everything is written once. The division is rounded as IEEE's:
the values are torchvision's to the last bit.

Names: B images, C channels, h x w an image, H x W the batch.
Source: the fused rescale-and-normalise of transformers' torchvision image processors.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cdetr_kernels.gpu import launching
from cdetr_kernels.gpu.launching import Launch, strides
from cdetr_kernels.gpu.registration import register
from cdetr_kernels.gpu.tiles import Tile

COLUMNS = 1024
CHANNELS = 4


@triton.jit
def _normalized(p_row, m_in, shift, divisor, SHIFTED: tl.constexpr):
    b_x = tl.load(p_row, m_in, other=0).to(tl.float32)
    b_x = tl.div_rn(b_x - shift, divisor) if SHIFTED else b_x * divisor
    return tl.where(m_in, b_x, 0.0)


# H too: triton makes a plain number of a size of 1. W tells how rows are aligned.
@triton.jit(do_not_specialize=["image_h", "image_w", "image_c", "image_y", "H"])
def pad_kernel(
    p_image,  # [C, h, w]
    p_values,  # [C, H, W], contiguous
    p_mask,  # [H, W], contiguous
    image_c, image_y, image_x,
    image_h, image_w, H, W,
    shift_0, shift_1, shift_2, shift_3,
    divisor_0, divisor_1, divisor_2, divisor_3,
    C: tl.constexpr, BW: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """Compute BW neighbours in one row; `divisor_i` multiply unless SHIFTED."""
    blocks = tl.cdiv(W, BW)
    i_y = (tl.program_id(0) // blocks).to(tl.int64)
    o_x = (tl.program_id(0) % blocks) * BW + tl.arange(0, BW)
    m_out = o_x < W
    m_in = o_x < tl.where(i_y < image_h, image_w, 0)
    tl.store(p_mask + i_y * W + o_x, m_in.to(tl.int64), m_out)
    p_image += i_y * image_y + o_x.to(tl.int64) * image_x
    p_values += i_y * W + o_x
    plane = H.to(tl.int64) * W
    b_x = _normalized(p_image, m_in, shift_0, divisor_0, SHIFTED)
    tl.store(p_values, b_x, m_out)
    if C > 1:
        b_x = _normalized(p_image + image_c, m_in, shift_1, divisor_1, SHIFTED)
        tl.store(p_values + plane, b_x, m_out)
    if C > 2:
        b_x = _normalized(p_image + 2 * image_c, m_in, shift_2, divisor_2, SHIFTED)
        tl.store(p_values + 2 * plane, b_x, m_out)
    if C > 3:
        b_x = _normalized(p_image + 3 * image_c, m_in, shift_3, divisor_3, SHIFTED)
        tl.store(p_values + 3 * plane, b_x, m_out)


def pad_launch(
    image: Tensor,
    shift: Sequence[float],
    divisor: Sequence[float],
    values: Tensor,
    mask: Tensor,
) -> Launch:
    """Compute one image into `values` `[C, H, W]` and `mask` `[H, W]`; empty `shift` multiplies."""
    channels, height, width = values.shape
    tile = Tile(1, min(COLUMNS, triton.next_power_of_2(width)), 4, 1, registers=64, shared=2)
    shifts = [*shift, *[0.0] * CHANNELS][:CHANNELS]
    divisors = [*divisor, *[1.0] * CHANNELS][:CHANNELS]
    arguments = {
        "p_image": image,
        "p_values": values,
        "p_mask": mask,
        **strides("image", "cyx", image),
        "image_h": image.shape[1],
        "image_w": image.shape[2],
        "H": height,
        "W": width,
        **{f"shift_{i}": float(x) for i, x in enumerate(shifts)},
        **{f"divisor_{i}": float(x) for i, x in enumerate(divisors)},
        "C": channels,
        "BW": tile.keys,
        "SHIFTED": len(shift) > 0,
    }
    return Launch(pad_kernel, height * triton.cdiv(width, tile.keys), arguments, tile)


def _forward(images, shift, divisor, height, width) -> tuple[Tensor, Tensor]:
    values, mask = _outputs(images, shift, divisor, height, width)
    options = tuple(shift), tuple(divisor)
    for i, image in enumerate(images):
        launching.run(pad_launch, image, *options, values[i], mask[i])
    return values, mask


def _outputs(images, shift, divisor, height, width) -> tuple[Tensor, Tensor]:
    first = images[0]
    shape = len(images), first.shape[0], height, width
    values = first.new_empty(shape, dtype=torch.float32)
    return values, first.new_empty(shape[0], height, width, dtype=torch.int64)


_normalize_and_pad = register(
    "normalize_and_pad_fused(Tensor[] images, float[] shift, float[] divisor, int height, "
    "int width) -> (Tensor values, Tensor mask)",
    _forward,
    _outputs,
)


def normalize_and_pad(
    images: Sequence[Tensor],
    shift: Sequence[float] | None,
    divisor: Sequence[float] | None,
    factor: float,
    height: int,
    width: int,
) -> tuple[Tensor, Tensor]:
    """Run the path "triton" of `cdetr_kernels.normalize_and_pad`; see the reference for shapes."""
    if shift is None:
        shift, divisor = (), (factor,) * images[0].shape[0]
    return _normalize_and_pad(list(images), list(shift), list(divisor), height, width)
