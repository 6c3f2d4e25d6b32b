"""`matching_cost`: public function, argument checks and implementations."""

from typing import Any

from torch import Tensor

from cdetr_kernels.checks import check_device, check_predictions, check_targets
from cdetr_kernels.dispatch import Implementation, Operator, bucket
from cdetr_kernels.gpu.support import by_evidence, unsupported_criterion
from cdetr_kernels.ops.matching_cost import reference


# Imported at the first call: triton is slow to import and not installed everywhere. The import is a
# statement, as torch.compile does not follow importlib.
def _triton(*args: Any) -> Any:
    from cdetr_kernels.ops.matching_cost.triton import matching_cost

    return matching_cost(*args)


def _classify(
    logits: Tensor, _boxes: Tensor, target_labels: Tensor, *rest: Any
) -> tuple[int | bool, ...]:
    """Return the class of a call: pairs of layers and images, and targets, and the kind of cost."""
    layers, batch, _, classes = logits.shape
    return (
        bucket(layers * batch, 8, 128),
        bucket(target_labels.shape[1], 16, 128),
        bucket(classes, 128),
        rest[-3] == "focal",
    )


OPERATOR = Operator(
    "matching_cost",
    {
        "triton": by_evidence(_triton, unsupported_criterion),
        "torch": Implementation(reference.matching_cost),
    },
    _classify,
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
    """Compute the cost of giving each prediction to each target of its image, in all layers.

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
        ValueError: A shape or device does not fit, or `classification` is unknown.
        NotImplementedError: In backward, on the path "triton": it has no derivative.

    Source: the authors' models/matcher.py.
    """
    check_predictions(logits, boxes_cxcywh)
    check_targets(logits.shape[1], target_labels, target_boxes_cxcywh, target_counts)
    check_device(
        "logits",
        logits,
        boxes_cxcywh=boxes_cxcywh,
        target_labels=target_labels,
        target_boxes_cxcywh=target_boxes_cxcywh,
        target_counts=target_counts,
    )
    if classification not in ("focal", "softmax"):
        raise ValueError(f'classification: expected "focal" or "softmax", got {classification!r}')
    return OPERATOR(
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
