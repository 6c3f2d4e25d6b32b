"""TensorFlow's "same" padding, in arithmetic that stays short for open sizes."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame
from torch import Tensor, nn

SAME_POOLS = (AvgPool2dSame, MaxPool2dSame)
"""Pooling that pads by the size of its input, which `SamePool2d` replaces."""


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


class SamePool2d(nn.Module):
    """One of timm's "same" pools, padded by `pad_same`.

    Args:
        pool: One of `SAME_POOLS`; dilated ResNets average by them beside their blocks.
    """

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        if not isinstance(pool, SAME_POOLS):
            raise TypeError(f"pool: expected {SAME_POOLS}, got {type(pool).__name__}")
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """Pool `[B, C, H, W]`."""
        pool: Any = self.pool
        windows = pool.kernel_size, pool.stride
        is_maximum = isinstance(self.pool, MaxPool2dSame)
        if is_maximum:
            x = pad_same(x, *windows, pool.dilation, value=-float("inf"))
            return F.max_pool2d(x, *windows, 0, pool.dilation, pool.ceil_mode)
        x = pad_same(x, *windows)
        return F.avg_pool2d(x, *windows, 0, pool.ceil_mode, pool.count_include_pad)
