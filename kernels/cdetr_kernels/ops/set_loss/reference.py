"""The set loss of matched predictions in plain PyTorch, all decoder layers at once.

Source: Lin et al., "Focal Loss for Dense Object Detection"; the authors' SetCriterion in
models/conditional_detr.py.
"""

import torch
from torch import Tensor

from cdetr_kernels.ops.matching_cost.reference import generalized_iou, l1_distance, planes
from cdetr_kernels.ops.set_loss.focal import focal_in_one_pass, focal_loss


def set_loss(
    logits: Tensor,
    boxes_cxcywh: Tensor,
    target_labels: Tensor,
    target_boxes_cxcywh: Tensor,
    target_counts: Tensor,
    matches: Tensor,
    num_boxes: Tensor | float,
    alpha: float,
    gamma: float,
) -> dict[str, Tensor]:
    """Define `cdetr_kernels.set_loss`; see there for shapes."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    is_pair = matches >= 0  # [L, B, T]
    query = matches.clamp(min=0)
    pairs = _pairs(query, is_pair, target_labels, logits.shape)
    # On a CPU the derivative is made along with the loss; a compiler does so by itself.
    one_pass = logits.device.type == "cpu" and dtype == torch.float32
    if one_pass and not torch.compiler.is_compiling():
        focal = focal_in_one_pass(logits, pairs, alpha, gamma)
    else:
        focal = focal_loss(logits.to(dtype), pairs, alpha, gamma)

    predicted = boxes_cxcywh.to(dtype).gather(2, query[..., None].expand(*query.shape, 4))
    # Where there is no pair, equal boxes meet: no loss, and no NaN.
    predicted = torch.where(is_pair, planes(predicted), 1.0)  # [4, L, B, T]
    wanted = torch.where(is_pair, planes(target_boxes_cxcywh.to(dtype))[:, None], 1.0)
    l1 = l1_distance(predicted, wanted).sum((1, 2))
    giou = (1 - generalized_iou(predicted, wanted)).sum((1, 2))

    predicted_counts = (logits.detach().amax(-1) > 0).sum(-1)  # sigmoid > 0.5, [L, B]
    cardinality = (predicted_counts - target_counts).to(dtype).abs().mean(-1)
    return {
        "loss_ce": focal / num_boxes,
        "loss_bbox": l1 / num_boxes,
        "loss_giou": giou / num_boxes,
        "cardinality_error": cardinality,
    }


def _pairs(query: Tensor, is_pair: Tensor, labels: Tensor, shape: torch.Size) -> Tensor:
    """Return where in a layer's flattened `[B, Q, K]` logits the matched ones are; behind if none.

    Returns:
        int64 `[L, B*T]`.
    """
    _, batch, queries, classes = shape
    first = torch.arange(0, batch * queries, queries, device=query.device)[:, None]
    place = (first + query) * classes + labels
    return torch.where(is_pair, place, batch * queries * classes).flatten(1)
