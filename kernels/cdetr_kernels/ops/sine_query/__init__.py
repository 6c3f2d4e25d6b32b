"""`sine_query`: public function, argument checks and implementations."""

import math
from typing import Any

import torch
from torch import Tensor

from cdetr_kernels.dispatch import Implementation, Operator, bucket
from cdetr_kernels.gpu.support import by_evidence, unsupported_device, unsupported_dtype
from cdetr_kernels.ops.sine_query import reference


# Imported at the first call: triton is slow to import and not installed everywhere. The import is a
# statement, as torch.compile does not follow importlib.
def _triton(*args: Any) -> Any:
    from cdetr_kernels.ops.sine_query.triton import sine_query

    return sine_query(*args)


def _unsupported_by_triton(points: Tensor, *rest: Any) -> str | None:
    reason = unsupported_device(points) or unsupported_dtype(points.dtype)
    if reason is None and rest:
        query_scale, dtype = rest[1], rest[-1]
        reason = unsupported_dtype(dtype)
        if reason is None and query_scale is not None:
            reason = unsupported_dtype(query_scale.dtype)
    return reason


def _classify(
    points: Tensor, _channels: int, query_scale: Tensor | None, *_: Any
) -> tuple[int | bool, ...]:
    """Return the class of a call: the size of what it reads, and whether there is a scale."""
    largest = points if query_scale is None else query_scale
    return bucket(largest.numel(), 2**18, 2**21), query_scale is not None


def _dtype_of(*args: Any) -> torch.dtype:
    dtype: torch.dtype = args[-1]
    return dtype


OPERATOR = Operator(
    "sine_query",
    {
        "triton": by_evidence(_triton, _unsupported_by_triton),
        "torch": Implementation(reference.sine_query),
    },
    _classify,
    _dtype_of,
)


def sine_query(
    reference_points: Tensor,
    channels: int,
    query_scale: Tensor | None = None,
    temperature: float = 10000.0,
    scale: float = 2 * math.pi,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute the sine code of reference points, times the scale that the decoder state predicts.

    Args:
        reference_points: `[..., 2]` x, y or `[..., 4]` x, y, width, height, in [0, 1].
        channels: Width C of the code; y first, then x (then width, height), C/2 or C/4 each.
        query_scale: lambda of the paper, `[..., C]`, broadcast against the code.
        temperature: Base of the geometric series of wavelengths.
        scale: Radians per unit of the reference points.
        dtype: dtype of the result; None takes that of `query_scale`, or of `reference_points`.
        backend: "auto", "torch", "triton" or "native".

    Returns:
        `[..., C]`.

    Raises:
        ValueError: The last size of `reference_points` is not 2 or 4, or `channels` does not divide
            into interleaved pairs for each coordinate.
        TypeError: No `dtype` is given, and that of the inputs is not of floating point.

    Source: Meng et al., equations 1 and 4; the authors' gen_sineembed_for_position.
    """
    coordinates = reference_points.shape[-1] if reference_points.ndim else 0
    if coordinates not in (2, 4):
        shape = list(reference_points.shape)
        raise ValueError(f"reference_points: expected [..., 2] or [..., 4], got {shape}")
    if channels <= 0 or channels % (2 * coordinates):
        raise ValueError(
            f"channels: expected a positive multiple of {2 * coordinates}, got {channels}"
        )
    if query_scale is not None and tuple(query_scale.shape[-1:]) != (channels,):
        raise ValueError(f"query_scale: expected [..., {channels}], got {list(query_scale.shape)}")
    if query_scale is not None and query_scale.device != reference_points.device:
        raise ValueError(
            f"query_scale: expected {reference_points.device} as reference_points, "
            f"got {query_scale.device}"
        )
    if query_scale is not None and not _broadcast(reference_points, query_scale):
        rows = list(reference_points.shape[:-1])
        raise ValueError(
            f"query_scale: expected a shape that broadcasts against {rows}, "
            f"got {list(query_scale.shape)}"
        )
    if dtype is None:
        dtype = (reference_points if query_scale is None else query_scale).dtype
        if not dtype.is_floating_point:
            raise TypeError(f"dtype: expected one of floating point for the result, got {dtype}")
    return OPERATOR(backend, reference_points, channels, query_scale, temperature, scale, dtype)


def _broadcast(a: Tensor, b: Tensor) -> bool:
    """Return whether all sizes but the last fit together."""
    if a.shape[:-1] == b.shape[:-1]:
        return True
    pairs = zip(reversed(a.shape[:-1]), reversed(b.shape[:-1]), strict=False)
    return all(x == y or x == 1 or y == 1 for x, y in pairs)
