"""The matching cost in plain PyTorch.

    cost = class_weight * class_cost + bbox_weight * L1(cxcywh) + giou_weight * (-GIoU)

An image's predictions meet only that image's own targets; transformers and the authors compute the
cost of every image's predictions against the whole batch's targets and throw away all but the
diagonal blocks.

Source: the authors' models/matcher.py.
"""

import torch
from torch import Tensor


def matching_cost(
    logits: Tensor,
    boxes_cxcywh: Tensor,
    target_labels: Tensor,
    target_boxes_cxcywh: Tensor,
    target_counts: Tensor,
    class_weight: float,
    bbox_weight: float,
    giou_weight: float,
    classification: str,
    alpha: float,
    gamma: float,
) -> Tensor:
    """Define `cdetr_kernels.matching_cost`; see there for shapes."""
    layers, batch, queries, _ = logits.shape
    targets = target_labels.shape[1]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    # Queries are the last axis, so that few targets too are computed along long rows.
    classes = target_labels[None, :, :, None].expand(layers, batch, targets, queries)
    own_logits = logits.mT.gather(2, classes).to(dtype)  # [L, B, T, Q]
    if classification == "focal":
        class_cost = _focal_cost(own_logits, alpha, gamma)
    else:
        class_cost = logits.to(dtype).softmax(-1).mT.gather(2, classes).neg_()

    predicted = planes(boxes_cxcywh.to(dtype))[:, :, :, None, :]  # [4, L, B, 1, Q]
    wanted = planes(target_boxes_cxcywh.to(dtype))[:, None, :, :, None]  # [4, 1, B, T, 1]
    # In place, with the roundings of the formula: nearly equal costs go the same way everywhere.
    cost = class_cost.mul_(class_weight)
    cost.add_(l1_distance(predicted, wanted).mul_(bbox_weight))
    cost.add_(generalized_iou(predicted, wanted).mul_(-giou_weight))
    valid = torch.arange(targets, device=cost.device) < target_counts[:, None]  # [B, T]
    return cost.masked_fill_(~valid[None, :, :, None], 0.0).flatten(0, 1).mT


def _focal_cost(logits: Tensor, alpha: float, gamma: float) -> Tensor:
    """Return the focal loss of each logit as the target's class, minus that as any other one."""
    low = logits.sigmoid()
    high = 1 - low
    of_low, of_high = (high + 1e-8).log_(), (low + 1e-8).log_()
    high.pow_(gamma).mul_(alpha).mul_(of_high)
    return low.pow(gamma).mul_(1 - alpha).mul_(of_low).sub_(high)


def planes(boxes_cxcywh: Tensor) -> Tensor:
    """Turn [..., 4] into contiguous [4, ...]: the many pairs are computed along contiguous rows."""
    return boxes_cxcywh.movedim(-1, 0).contiguous()


def l1_distance(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the L1 distance of broadcast pairs of boxes (centre, size), [4, ...] -> [...]."""
    return (boxes - others).abs().sum(0)


def generalized_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the generalized IoU of broadcast pairs of boxes (centre, size), [4, ...] -> [...].

    Source: Rezatofighi et al., "Generalized Intersection over Union".
    """
    low, high = _corners(boxes)
    other_low, other_high = _corners(others)
    overlap = (torch.minimum(high, other_high) - torch.maximum(low, other_low)).clamp(min=0)
    hull = _product(torch.maximum(high, other_high) - torch.minimum(low, other_low))
    intersection = _product(overlap)
    union = _product(high - low) + _product(other_high - other_low) - intersection
    return intersection / union - (hull - union) / hull


def _corners(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Return lower and upper x and y, [2, ...] each."""
    centre, size = boxes.split(2)
    return centre.sub(size, alpha=0.5), centre.add(size, alpha=0.5)


def _product(sides: Tensor) -> Tensor:
    width, height = sides.unbind(0)
    return width * height
