"""The operators of training: argument checks, then dispatch to an implementation."""

import torch
from torch import Tensor

from cdetr_kernels.checks import check_rank, check_shape, describe
from cdetr_kernels.dispatch import Operator, Path
from cdetr_kernels.reference import loss, matching
from cdetr_kernels.triton_support import (
    held_back,
    reason_against_device,
    reason_against_dtype,
)


# Triton is imported at the first call only: it is slow to import, and not everywhere. Each import
# is a statement, as torch.compile does not follow importlib.
def _matching_cost_triton(*args):
    from cdetr_kernels.fused.matching_cost import matching_cost

    return matching_cost(*args)


def _set_loss_triton(*args):
    from cdetr_kernels.fused.set_loss import set_loss

    return set_loss(*args)


def _no_triton(logits: Tensor, *rest) -> str | None:
    reason = reason_against_device(logits) or reason_against_dtype(logits.dtype)
    if reason is None and rest:
        boxes_cxcywh, target_boxes_cxcywh = rest[0], rest[2]
        reason = reason_against_dtype(boxes_cxcywh.dtype) or reason_against_dtype(
            target_boxes_cxcywh.dtype
        )
    return reason


MATCHING_COST = Operator(
    "matching_cost",
    {
        "triton": held_back(_matching_cost_triton, _no_triton),
        "torch": Path(matching.matching_cost),
    },
)
SET_LOSS = Operator(
    "set_loss",
    {
        "triton": held_back(_set_loss_triton, _no_triton),
        "torch": Path(loss.set_loss),
    },
)


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
    return MATCHING_COST(
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
        matches: int64 `[L, B, T]`, the query of each target, -1 where it has none (as in the
            padding). No query has two targets.
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
    shape = (*logits.shape[:2], target_labels.shape[1])
    if matches.dtype != torch.int64:
        raise TypeError(f"matches: expected int64 {list(shape)}, got {describe(matches)}")
    check_shape("matches", matches, shape)
    return SET_LOSS(
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
