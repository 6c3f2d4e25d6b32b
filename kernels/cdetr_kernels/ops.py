"""The public operators: argument checks, then dispatch to an implementation."""

import math

import torch
from torch import Tensor

from cdetr_kernels.attention_ops import CONDITIONAL_ATTENTION, CONDITIONAL_ATTENTION_SEPARABLE
from cdetr_kernels.checks import check_rank, check_shape, describe
from cdetr_kernels.dispatch import Operator, Path
from cdetr_kernels.image_ops import DETECTION_TOPK, NORMALIZE_AND_PAD
from cdetr_kernels.reference import loss, matching, position
from cdetr_kernels.triton_support import (
    held_back,
    reason_against_device,
    reason_against_dtype,
)


# Triton is imported at the first call only: it is slow to import, and not everywhere. Each import
# is a statement, as torch.compile does not follow importlib.
def _sine_position_2d_triton(*args):
    from cdetr_kernels.fused.sine_position_2d import sine_position_2d

    return sine_position_2d(*args)


def _sine_query_triton(*args):
    from cdetr_kernels.fused.sine_query import sine_query

    return sine_query(*args)


def _matching_cost_triton(*args):
    from cdetr_kernels.fused.matching_cost import matching_cost

    return matching_cost(*args)


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


def _no_triton_cost(logits: Tensor, *rest) -> str | None:
    reason = reason_against_device(logits) or reason_against_dtype(logits.dtype)
    if reason is None and rest:
        boxes_cxcywh, target_boxes_cxcywh = rest[0], rest[2]
        reason = reason_against_dtype(boxes_cxcywh.dtype) or reason_against_dtype(
            target_boxes_cxcywh.dtype
        )
    return reason


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
_MATCHING_COST = Operator(
    "matching_cost",
    {
        "triton": held_back(_matching_cost_triton, _no_triton_cost),
        "torch": Path(matching.matching_cost),
    },
)
_SET_LOSS = Operator("set_loss", {"torch": Path(loss.set_loss)})

OPERATORS = (
    CONDITIONAL_ATTENTION,
    CONDITIONAL_ATTENTION_SEPARABLE,
    _SINE_POSITION_2D,
    _SINE_QUERY,
    DETECTION_TOPK,
    NORMALIZE_AND_PAD,
    _MATCHING_COST,
    _SET_LOSS,
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


def matching_cost(
    logits: Tensor,
    boxes_cxcywh: Tensor,
    target_labels: Tensor,
    target_boxes_cxcywh: Tensor,
    target_counts: Tensor,
    class_weight: float = 2.0,
    bbox_weight: float = 5.0,
    giou_weight: float = 2.0,
    classification: str = "focal",
    alpha: float = 0.25,
    gamma: float = 2.0,
    backend: str = "auto",
) -> Tensor:
    """Cost of giving each prediction to each target of the same image, for all decoder layers.

    Args:
        logits: `[L, B, Q, K]`.
        boxes_cxcywh: Predicted boxes `[L, B, Q, 4]`, relative.
        target_labels: int64 `[B, T]`, padded with any label in [0, K).
        target_boxes_cxcywh: `[B, T, 4]`, relative, padded with anything.
        target_counts: int64 `[B]`, number of targets of each image.
        class_weight: Weight of the classification cost.
        bbox_weight: Weight of the L1 distance of boxes.
        giou_weight: Weight of the negative generalized IoU.
        classification: "focal", or "softmax" for minus the softmax probability.
        alpha: Balance of the focal cost.
        gamma: Exponent of the focal cost.
        backend: "auto", "torch", "triton" or "native".

    Returns:
        `[L*B, Q, T]`, fp32 at least, stored with neighbouring queries side by side (a transposed
        `[L*B, T, Q]`, which is what solvers read); 0 in padded columns.

    Raises:
        TypeError: `target_labels` is not int64.
        ValueError: A shape does not fit, or `classification` is unknown.
        NotImplementedError: In backward, on the path "triton": it has no derivative.

    Source: the authors' models/matcher.py.
    """
    _check_predictions(logits, boxes_cxcywh)
    batch = logits.shape[1]
    _check_targets(batch, target_labels, target_boxes_cxcywh, target_counts)
    if classification not in ("focal", "softmax"):
        raise ValueError(f'classification: expected "focal" or "softmax", got {classification!r}')
    return _MATCHING_COST(
        backend,
        logits,
        boxes_cxcywh,
        target_labels,
        target_boxes_cxcywh,
        target_counts,
        class_weight,
        bbox_weight,
        giou_weight,
        classification,
        alpha,
        gamma,
    )


def set_loss(
    logits: Tensor,
    boxes_cxcywh: Tensor,
    target_labels: Tensor,
    target_boxes_cxcywh: Tensor,
    target_counts: Tensor,
    matches: Tensor,
    num_boxes: Tensor | float,
    alpha: float = 0.25,
    gamma: float = 2.0,
    backend: str = "auto",
) -> dict[str, Tensor]:
    """Focal, L1, generalized-IoU and cardinality losses of every decoder layer, given the matching.

    Args:
        logits: `[L, B, Q, K]`.
        boxes_cxcywh: Predicted boxes `[L, B, Q, 4]`, relative.
        target_labels: int64 `[B, T]`.
        target_boxes_cxcywh: `[B, T, 4]`, relative.
        target_counts: int64 `[B]`.
        matches: int64 `[4, M]`: layer, image, query and target of each matched pair.
        num_boxes: Divisor of the sums, a number or a tensor of no dimension.
        alpha: Balance of the focal loss.
        gamma: Exponent of the focal loss.
        backend: "auto", "torch", "triton" or "native".

    Returns:
        `loss_ce`, `loss_bbox`, `loss_giou` and `cardinality_error` (no gradient), each `[L]`.

    Raises:
        TypeError: `target_labels` or `matches` is not int64.
        ValueError: A shape does not fit.

    Source: the authors' SetCriterion in models/conditional_detr.py.
    """
    _check_predictions(logits, boxes_cxcywh)
    _check_targets(logits.shape[1], target_labels, target_boxes_cxcywh, target_counts)
    if matches.dtype != torch.int64:
        raise TypeError(f"matches: expected int64 [4, M], got {describe(matches)}")
    if matches.ndim != 2 or matches.shape[0] != 4:
        raise ValueError(f"matches: expected [4, M], got {list(matches.shape)}")
    return _SET_LOSS(
        backend,
        logits,
        boxes_cxcywh,
        target_labels,
        target_boxes_cxcywh,
        target_counts,
        matches,
        num_boxes,
        alpha,
        gamma,
    )


def _check_predictions(logits: Tensor, boxes_cxcywh: Tensor) -> None:
    check_rank("logits", logits, 4)
    check_shape("boxes_cxcywh", boxes_cxcywh, (*logits.shape[:3], 4))


def _check_targets(batch: int, labels: Tensor, boxes_cxcywh: Tensor, counts: Tensor) -> None:
    check_rank("target_labels", labels, 2)
    if labels.dtype != torch.int64:
        raise TypeError(f"target_labels: expected int64 [B, T], got {describe(labels)}")
    check_shape("target_labels", labels, (batch, labels.shape[1]))
    check_shape("target_boxes_cxcywh", boxes_cxcywh, (batch, labels.shape[1], 4))
    check_shape("target_counts", counts, (batch,))


def _broadcast(a: Tensor, b: Tensor) -> bool:
    """Whether all sizes but the last fit together."""
    pairs = zip(reversed(a.shape[:-1]), reversed(b.shape[:-1]), strict=False)
    return all(x == y or x == 1 or y == 1 for x, y in pairs)
