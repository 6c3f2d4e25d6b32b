"""The public operators: argument checks, then dispatch to an implementation."""

import math

import torch
from torch import Tensor

from cdetr_kernels.attention_ops import CONDITIONAL_ATTENTION, CONDITIONAL_ATTENTION_SEPARABLE
from cdetr_kernels.checks import check_alike, check_rank, check_shape, describe
from cdetr_kernels.dispatch import Operator, Path
from cdetr_kernels.image_ops import DETECTION_TOPK, NORMALIZE_AND_PAD
from cdetr_kernels.loss_ops import MATCHING_COST, SET_LOSS
from cdetr_kernels.reference import norm, position
from cdetr_kernels.triton_support import (
    held_back,
    reason_against_device,
    reason_against_dtype,
)

_MOST_CHANNELS = 4096  # of a layer norm: a row is held in registers


# Triton is imported at the first call only: it is slow to import, and not everywhere. Each import
# is a statement, as torch.compile does not follow importlib.
def _sine_position_2d_triton(*args):
    from cdetr_kernels.fused.sine_position_2d import sine_position_2d

    return sine_position_2d(*args)


def _sine_query_triton(*args):
    from cdetr_kernels.fused.sine_query import sine_query

    return sine_query(*args)


def _residual_layer_norm_triton(*args):
    from cdetr_kernels.fused.residual_layer_norm import residual_layer_norm

    return residual_layer_norm(*args)


def _no_triton_position(mask: Tensor, *rest) -> str | None:
    return reason_against_device(mask) or (reason_against_dtype(rest[-1]) if rest else None)


def _no_triton_query(points: Tensor, *rest) -> str | None:
    reason = reason_against_device(points) or reason_against_dtype(points.dtype)
    if reason is None and rest:
        query_scale, dtype = rest[1], rest[-1]
        reason = reason_against_dtype(dtype)
        if reason is None and query_scale is not None:
            reason = reason_against_dtype(query_scale.dtype)
    return reason


def _no_triton_norm(x: Tensor, *rest) -> str | None:
    reason = reason_against_device(x) or reason_against_dtype(x.dtype)
    if reason is not None or not rest:
        return reason
    if x.shape[-1] > _MOST_CHANNELS:
        return f"the kernel takes up to {_MOST_CHANNELS} channels"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *rest[:3])):
        return "the kernel has no gradient"
    return None


_SINE_POSITION_2D = Operator(
    "sine_position_2d",
    {
        "triton": held_back(_sine_position_2d_triton, _no_triton_position),
        "torch": Path(position.sine_position_2d),
    },
)
_SINE_QUERY = Operator(
    "sine_query",
    {
        "triton": held_back(_sine_query_triton, _no_triton_query),
        "torch": Path(position.sine_query),
    },
)
_RESIDUAL_LAYER_NORM = Operator(
    "residual_layer_norm",
    {
        "triton": held_back(_residual_layer_norm_triton, _no_triton_norm),
        "torch": Path(norm.residual_layer_norm),
    },
)
OPERATORS = (
    CONDITIONAL_ATTENTION,
    CONDITIONAL_ATTENTION_SEPARABLE,
    _SINE_POSITION_2D,
    _SINE_QUERY,
    _RESIDUAL_LAYER_NORM,
    DETECTION_TOPK,
    NORMALIZE_AND_PAD,
    MATCHING_COST,
    SET_LOSS,
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
    """Sine code of the map positions, counted over the unpadded part of each image.

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
    return _SINE_POSITION_2D(backend, mask, channels, temperature, normalize, scale, dtype)


def sine_query(
    reference_points: Tensor,
    channels: int,
    query_scale: Tensor | None = None,
    temperature: float = 10000.0,
    scale: float = 2 * math.pi,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Sine code of reference points, times the scale that the decoder state predicts.

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
    if query_scale is not None and query_scale.shape[-1] != channels:
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
    return _SINE_QUERY(backend, reference_points, channels, query_scale, temperature, scale, dtype)


def residual_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """Layer norm of `x + residual`, the end of each part of a transformer layer.

    Args:
        x: `[..., C]`.
        residual: Of the shape of `x`, or with 1 in the first place: shared by the batch.
        weight: `[C]`.
        bias: `[C]`.
        eps: Added to the variance.
        backend: "auto", "torch", "triton" or "native". The triton kernel is for inference: it has
            no gradient.

    Returns:
        Of the shape of `x`; mean and variance in fp32 at least.

    Raises:
        TypeError: The inputs are of different dtypes.
        ValueError: A shape or device does not fit.
        RuntimeError: `backend` was named and cannot run.
    """
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected [..., C], got {describe(x)}")
    check_shape("residual", residual, tuple(x.shape), may_broadcast=True)
    for name, tensor in (("weight", weight), ("bias", bias)):
        check_shape(name, tensor, (x.shape[-1],))
    check_alike("x", x, residual=residual, weight=weight, bias=bias)
    return _RESIDUAL_LAYER_NORM(backend, x, residual, weight, bias, eps)


def _broadcast(a: Tensor, b: Tensor) -> bool:
    """Whether all sizes but the last fit together."""
    pairs = zip(reversed(a.shape[:-1]), reversed(b.shape[:-1]), strict=False)
    return all(x == y or x == 1 or y == 1 for x, y in pairs)
