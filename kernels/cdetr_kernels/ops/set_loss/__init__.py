"""`set_loss`: public function, argument checks and implementations."""

from typing import Any

import torch
from torch import Tensor

from cdetr_kernels.checks import (
    check_device,
    check_predictions,
    check_shape,
    check_targets,
    describe,
)
from cdetr_kernels.dispatch import Implementation, Operator, bucket
from cdetr_kernels.gpu.support import by_evidence, unsupported_criterion
from cdetr_kernels.ops.set_loss import reference


# Imported at the first call: triton is slow to import and not installed everywhere. The import is a
# statement, as torch.compile does not follow importlib.
def _triton(*args: Any) -> Any:
    from cdetr_kernels.ops.set_loss.triton import set_loss

    return set_loss(*args)


def _classify(
    logits: Tensor, _boxes: Tensor, target_labels: Tensor, *_rest: Any
) -> tuple[int | bool, ...]:
    """Return the class of a call: pairs of layers and images, and targets."""
    layers, batch, _, classes = logits.shape
    return (
        bucket(layers * batch, 8, 128),
        bucket(target_labels.shape[1], 16, 128),
        bucket(classes, 128),
    )


OPERATOR = Operator(
    "set_loss",
    {
        "triton": by_evidence(_triton, unsupported_criterion),
        "torch": Implementation(reference.set_loss),
    },
    _classify,
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
    """Compute focal, L1, generalized-IoU and cardinality losses of every layer, given the matching.

    Args:
        logits: `[L, B, Q, K]`.
        boxes_cxcywh: Predicted boxes `[L, B, Q, 4]`, relative.
        target_labels: int64 `[B, T]`.
        target_boxes_cxcywh: `[B, T, 4]`, relative.
        target_counts: int64 `[B]`.
        matches: int64 `[L, B, T]`, the query of each target, -1 where it has none (as in the
            padding). No query has two targets.
        num_boxes: Divisor of the sums, a number or a tensor of no dimension, on any device.
        alpha: Balance of the focal loss.
        gamma: Exponent of the focal loss.
        backend: "auto", "torch", "triton" or "native".

    Returns:
        `loss_ce`, `loss_bbox`, `loss_giou` and `cardinality_error` (no gradient), each `[L]`.

    Raises:
        TypeError: `target_labels` or `matches` is not int64.
        ValueError: A shape or device does not fit.

    Source: the authors' SetCriterion in models/conditional_detr.py.
    """
    check_predictions(logits, boxes_cxcywh)
    check_targets(logits.shape[1], target_labels, target_boxes_cxcywh, target_counts)
    shape = (*logits.shape[:2], target_labels.shape[1])
    if matches.dtype != torch.int64:
        raise TypeError(f"matches: expected int64 {list(shape)}, got {describe(matches)}")
    check_shape("matches", matches, shape)
    check_device(
        "logits",
        logits,
        boxes_cxcywh=boxes_cxcywh,
        target_labels=target_labels,
        target_boxes_cxcywh=target_boxes_cxcywh,
        target_counts=target_counts,
        matches=matches,
    )
    return OPERATOR(
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
