"""The set loss of matched predictions in plain PyTorch, all decoder layers at once.

Source: Lin et al., "Focal Loss for Dense Object Detection"; the authors' SetCriterion in
models/conditional_detr.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cdetr_kernels.reference.matching import corners, generalized_iou


def set_loss(
    logits: Tensor,
    boxes_cxcywh: Tensor,
    target_labels: Tensor,
    target_boxes_cxcywh: Tensor,
    target_counts: Tensor,
    matches: Tensor,
    num_boxes: Tensor,
    alpha: float,
    gamma: float,
) -> dict[str, Tensor]:
    """Defines `cdetr_kernels.set_loss`; see there for shapes."""
    layers = logits.shape[0]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logits = logits.to(dtype)
    layer, image, query, target = matches  # [M] each

    # A matched pair is positive, every other one negative. The logit -inf takes the matched ones
    # out of the negatives; subtracting them again would leave the difference of large numbers.
    pairs = (layer, image, query, target_labels[image, target])
    others = logits.index_put(pairs, logits.new_tensor(float("-inf")))
    negatives = _focal_negative(others, alpha, gamma).sum((1, 2, 3))
    positives = _focal_positive(logits[pairs], alpha, gamma)  # [M]

    predicted = boxes_cxcywh.to(dtype)[layer, image, query]  # [M, 4]
    wanted = target_boxes_cxcywh.to(dtype)[image, target]
    l1 = (predicted - wanted).abs().sum(-1)
    giou = 1 - generalized_iou(corners(predicted), corners(wanted))
    per_layer = torch.zeros(layers, dtype=dtype, device=logits.device)

    predicted_counts = (logits.detach().amax(-1) > 0).sum(-1)  # sigmoid > 0.5, [L, B]
    cardinality = (predicted_counts.to(dtype) - target_counts.to(dtype)).abs().mean(-1)
    return {
        "loss_ce": negatives.index_add(0, layer, positives) / num_boxes,
        "loss_bbox": per_layer.index_add(0, layer, l1) / num_boxes,
        "loss_giou": per_layer.index_add(0, layer, giou) / num_boxes,
        "cardinality_error": cardinality,
    }


def _focal_positive(logits: Tensor, alpha: float, gamma: float) -> Tensor:
    """Focal loss of pairs that belong together, of the shape of `logits`."""
    return alpha * (-logits).sigmoid() ** gamma * F.softplus(-logits)


def _focal_negative(logits: Tensor, alpha: float, gamma: float) -> Tensor:
    """Focal loss of pairs that do not belong together, of the shape of `logits`."""
    return (1 - alpha) * logits.sigmoid() ** gamma * F.softplus(logits)
