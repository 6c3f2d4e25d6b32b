"""Max-pooling of 8-bit codes in C++, on CPUs: torch has none for plain tensors.

Not an operator of the registry: nothing but the int8 backbone calls it, and there is no other path.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from cdetr_kernels import native

_NAME = "cdetr_fast::max_pool_codes"
_LIBRARY = torch.library.Library("cdetr_fast", "FRAGMENT")
_LIBRARY.define(
    "max_pool_codes(Tensor codes, int[] kernel, int[] stride, int[] padding, int[] dilation) "
    "-> Tensor"
)


@functools.cache
def codes_unsupported_reason() -> str | None:
    """Return why codes cannot be pooled on this CPU, None if they can."""
    return native.UNAVAILABLE["cpu"] or native.missing_kernel(_NAME)


def max_pool_codes(
    codes: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Return the largest code in each window; padding counts as the lowest.

    Args:
        codes: uint8 `[B, C, H, W]` on a CPU, copied unless its channels are adjacent.
        kernel: Height and width of the window.
        stride: Steps down and across.
        padding: Rows and columns at each side, at most half of the window's.
        dilation: Steps between the codes of a window.

    Returns:
        uint8 `[B, C, h, w]`, channels-last.
    """
    codes = codes.contiguous(memory_format=torch.channels_last)
    pool = torch.ops.cdetr_fast.max_pool_codes.default
    pooled: Tensor = pool(codes, kernel, stride, padding, dilation)
    return pooled.permute(0, 3, 1, 2)
