"""`normalize_and_pad` in C++: schema and fake; the kernel is in csrc/."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cdetr_kernels import native as _extension  # noqa: F401, loads the kernel

_LIBRARY = torch.library.Library("cdetr_fast", "FRAGMENT")
_LIBRARY.define(
    "normalize_and_pad(Tensor[] images, float[] shift, float[] divisor, float factor, int height, "
    "int width) -> (Tensor values, Tensor mask)"
)


def _fake(
    images: Sequence[Tensor],
    shift: Sequence[float],
    divisor: Sequence[float],
    factor: float,
    height: int,
    width: int,
) -> tuple[Tensor, Tensor]:
    first = images[0]
    shape = len(images), first.shape[0], height, width
    values = first.new_empty(shape, dtype=torch.float32)
    return values, first.new_empty(shape[0], height, width, dtype=torch.int64)


torch.library.register_fake("cdetr_fast::normalize_and_pad", _fake, lib=_LIBRARY)


def normalize_and_pad(
    images: Sequence[Tensor],
    shift: Sequence[float] | None,
    divisor: Sequence[float] | None,
    factor: float,
    height: int,
    width: int,
) -> tuple[Tensor, Tensor]:
    """Run the path "native" of `cdetr_kernels.normalize_and_pad`; see the reference for shapes."""
    return torch.ops.cdetr_fast.normalize_and_pad(
        images, shift or [], divisor or [], factor, height, width
    )
