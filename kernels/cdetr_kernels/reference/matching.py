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
    """Defines `cdetr_kernels.matching_cost`; see there for shapes."""
    layers, batch, queries, _ = logits.shape
    targets = target_labels.shape[1]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    # Queries are the last axis, so that few targets too are computed along long rows.
    classes = target_labels[None, :, :, None].expand(layers, batch, targets, queries)
    own_logits = logits.mT.gather(2, classes).to(dtype)  # [L, B, T, Q]
    if classification == "focal":
        probability = own_logits.sigmoid()
        class_cost = alpha * (1 - probability) ** gamma * -(probability + 1e-8).log()
        class_cost = class_cost - (1 - alpha) * probability**gamma * -(1 - probability + 1e-8).log()
    else:
        class_cost = -logits.to(dtype).softmax(-1).mT.gather(2, classes)

    predicted = boxes_cxcywh.to(dtype)[:, :, None, :, :]  # [L, B, 1, Q, 4]
    wanted = target_boxes_cxcywh.to(dtype)[None, :, :, None, :]  # [1, B, T, 1, 4]
    planes = zip(_planes(predicted), _planes(wanted), strict=True)
    bbox_cost = sum((a - b).abs() for a, b in planes)
    giou_cost = -generalized_iou(corners(predicted), corners(wanted))

    cost = class_weight * class_cost + bbox_weight * bbox_cost + giou_weight * giou_cost
    valid = torch.arange(targets, device=cost.device) < target_counts[:, None]  # [B, T]
    return cost.masked_fill(~valid[None, :, :, None], 0.0).flatten(0, 1).mT


def corners(boxes_cxcywh: Tensor) -> Tensor:
    """[..., 4] centre and size -> [..., 4] corners x0, y0, x1, y1."""
    centre, size = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:]
    return torch.cat((centre - 0.5 * size, centre + 0.5 * size), dim=-1)


def generalized_iou(boxes_xyxy: Tensor, other_xyxy: Tensor) -> Tensor:
    """Generalized IoU of broadcast pairs of boxes, [..., 4] x [..., 4] -> [...].

    Source: Rezatofighi et al., "Generalized Intersection over Union".
    """
    left, top, right, bottom = _planes(boxes_xyxy)
    other_left, other_top, other_right, other_bottom = _planes(other_xyxy)
    width = torch.minimum(right, other_right) - torch.maximum(left, other_left)
    height = torch.minimum(bottom, other_bottom) - torch.maximum(top, other_top)
    intersection = width.clamp(min=0) * height.clamp(min=0)
    areas = (right - left) * (bottom - top)
    union = areas + (other_right - other_left) * (other_bottom - other_top) - intersection
    hull_width = torch.maximum(right, other_right) - torch.minimum(left, other_left)
    hull_height = torch.maximum(bottom, other_bottom) - torch.minimum(top, other_top)
    hull = hull_width * hull_height
    return intersection / union - (hull - union) / hull


def _planes(boxes: Tensor) -> tuple[Tensor, ...]:
    """[..., 4] -> four contiguous [...]: the pairs are many, and computed along contiguous rows."""
    return boxes.movedim(-1, 0).contiguous().unbind(0)
