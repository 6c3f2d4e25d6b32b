"""TensorFlow's "same" padding, in arithmetic that stays short for open sizes."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame
from torch import Tensor, nn

_SAME_POOLS = (AvgPool2dSame, MaxPool2dSame)


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

    The windows fit into the padded images, so that neither `ceil_mode` nor `count_include_pad`
    matters; they are left at what other programs read as torch does. ONNX Runtime up to 1.24 puts
    the padding into a pool that does not count its own, and so divides by fewer pixels.

    Args:
        pool: One that `replaces` is true of; dilated ResNets average by them beside their blocks.
    """

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        if not self.replaces(pool):
            raise TypeError(f"pool: expected {_SAME_POOLS} without dilation, got {pool}")
        self.pool = pool

    @staticmethod
    def replaces(layer: nn.Module) -> bool:
        """Return whether a layer is such a pool; timm's padding for dilated ones has changed."""
        dilation = getattr(layer, "dilation", 1)
        return type(layer) in _SAME_POOLS and dilation in (1, (1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Pool `[B, C, H, W]`."""
        pool: Any = self.pool
        windows = pool.kernel_size, pool.stride
        if isinstance(self.pool, MaxPool2dSame):
            return F.max_pool2d(pad_same(x, *windows, value=-float("inf")), *windows)
        return F.avg_pool2d(pad_same(x, *windows), *windows)
