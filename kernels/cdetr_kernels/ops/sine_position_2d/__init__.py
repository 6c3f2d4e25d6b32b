"""`sine_position_2d`: public function, argument checks and implementations."""

import math
from typing import Any

import torch
from torch import Tensor

from cdetr_kernels.checks import check_rank, describe
from cdetr_kernels.dispatch import Implementation, Operator, bucket
from cdetr_kernels.gpu.support import by_evidence, unsupported_device, unsupported_dtype
from cdetr_kernels.ops.sine_position_2d import reference


# Imported at the first call: triton is slow to import and not installed everywhere. The import is a
# statement, as torch.compile does not follow importlib.
def _triton(*args: Any) -> Any:
    from cdetr_kernels.ops.sine_position_2d.triton import sine_position_2d

    return sine_position_2d(*args)


def _unsupported_by_triton(mask: Tensor, *rest: Any) -> str | None:
    return unsupported_device(mask) or (unsupported_dtype(rest[-1]) if rest else None)


def _classify(mask: Tensor, channels: int, *_: Any) -> tuple[int, ...]:
    """Return the class of a call: the size of the code."""
    return (bucket(mask.numel() * channels, 2**19, 2**22),)


def _dtype_of(*args: Any) -> torch.dtype:
    dtype: torch.dtype = args[-1]
    return dtype


OPERATOR = Operator(
    "sine_position_2d",
    {
        "triton": by_evidence(_triton, _unsupported_by_triton),
        "torch": Implementation(reference.sine_position_2d),
    },
    _classify,
    _dtype_of,
)


def sine_position_2d(
    mask: Tensor,
    channels: int,
    temperature: float = 10000.0,
    normalize: bool = True,
    scale: float = 2 * math.pi,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """Compute the sine code of the map positions, counted over the unpadded part of each image.

    Args:
        mask: bool `[B, h, w]`, True = unpadded.
        channels: Width C of the code, a multiple of 4: C/2 for y, then C/2 for x.
        temperature: Base of the geometric series of wavelengths.
        normalize: Divide positions by the image's extent, so that they end at `scale`.
        scale: Length of the unpadded image in the code, radians.
        dtype: dtype of the result; angles are in fp32 at least.
        backend: "auto", "torch", "triton" or "native".

    Returns:
        `[B, h*w, C]`.

    Raises:
        TypeError: `mask` is not bool.
        ValueError: `mask` is not of rank 3, or `channels` not a positive multiple of 4.

    Source: the authors' models/position_encoding.py (PositionEmbeddingSine). transformers computes
    the angles in the dtype of the image.
    """
    check_rank("mask", mask, 3)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected bool [B, h, w], got {describe(mask)}")
    if channels <= 0 or channels % 4:
        raise ValueError(f"channels: expected a positive multiple of 4, got {channels}")
    return OPERATOR(backend, mask, channels, temperature, normalize, scale, dtype)
