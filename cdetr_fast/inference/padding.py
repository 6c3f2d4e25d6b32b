"""TensorFlow's "same" padding, in arithmetic that stays short for open sizes."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def pad_same(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int] = (1, 1),
    value: float = 0.0,
) -> Tensor:
    """Pad images `[B, C, H, W]` as `timm.layers.padding.pad_same` does.

    There the size of the result has its argument three times, rounded in floating point. Over the
    five strides of an exported backbone that becomes an expression that torch simplifies for longer
    than 20 minutes; here it is (size + stride - 1) // stride once a convolution follows.
    """
    pads: list[int] = []
    for axis in (1, 0):
        size, step = x.shape[2 + axis], stride[axis]
        reach = (kernel_size[axis] - 1) * dilation[axis] + 1
        pad = ((size + step - 1) // step - 1) * step + reach - size
        if reach < step:
            pad = max(pad, 0)
        pads += [pad // 2, pad - pad // 2]
    return F.pad(x, pads, value=value)
