"""Detections from model outputs, and reading outputs as detection and segmentation both do.

The class head is trained with the sigmoid focal loss: its outputs are independent probabilities,
without a "no object" class.

Dimensions: B batch, Q queries, K classes, k detections kept, n of them above the threshold.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cdetr_fast.common.validation import PositiveInt, checked
from cdetr_fast.images.batch_feature import BatchFeature
from cdetr_kernels import detection_topk

TargetSizes = Tensor | Sequence[Sequence[int]]


def detections(
    outputs: Any,
    threshold: float,
    target_sizes: TargetSizes | None,
    top_k: int,
    return_tensors: str | None,
) -> list[dict[str, Tensor]] | BatchFeature:
    """Implement `ConditionalDetrImageProcessor.post_process_object_detection`."""
    if return_tensors not in (None, "pt"):
        raise ValueError(f"return_tensors: expected None or 'pt', got {return_tensors!r}")
    top_k = checked(PositiveInt, top_k, "top_k")
    logits, boxes_cxcywh = field_of(outputs, "logits"), field_of(outputs, "pred_boxes")
    batch, queries, classes = logits.shape
    k = min(top_k, queries * classes)
    if k == 0:  # no queries, or no classes
        nothing = torch.zeros(batch, 0, dtype=torch.int64, device=logits.device)
        scores, labels, query_index = nothing.float(), nothing, nothing
        boxes_xyxy, counts = scores.new_zeros(batch, 0, 4), nothing.sum(dim=1)
    else:
        scores, labels, boxes_xyxy, query_index, counts = detection_topk(
            logits, boxes_cxcywh, target_sizes, k, threshold=threshold
        )
    if return_tensors == "pt":
        content = {"scores": scores, "labels": labels, "boxes": boxes_xyxy}
        return BatchFeature(content | {"query_index": query_index, "counts": counts})
    if batch == 1:
        n = counts.item()
        return [{"scores": scores[0, :n], "labels": labels[0, :n], "boxes": boxes_xyxy[0, :n]}]
    # Alternating views above and below the threshold; one slice for each would cost more.
    parts = [part for n in counts.tolist() for part in (n, k - n)]
    above = (
        tensor.flatten(0, 1).split(parts)[::2] if parts else ()
        for tensor in (scores, labels, boxes_xyxy)
    )
    return [{"scores": s, "labels": c, "boxes": b} for s, c, b in zip(*above, strict=True)]


def field_of(outputs: Any, name: str) -> Tensor:
    """Return a field of a model output, or of the plain dict that transformers' pipelines make."""
    return outputs[name] if isinstance(outputs, Mapping) else getattr(outputs, name)


def target_sizes_hw(
    target_sizes: TargetSizes | None, batch: int
) -> list[tuple[int, int]] | list[None]:
    """Return the requested (height, width) of each image, or None for each."""
    if target_sizes is None:
        return [None] * batch
    if len(target_sizes) != batch:
        raise ValueError(
            f"target_sizes: expected {batch} (one per image of the logits), got {len(target_sizes)}"
        )
    if isinstance(target_sizes, Tensor):
        target_sizes = target_sizes.tolist()
    sizes = []
    for i, size in enumerate(target_sizes):
        sides = tuple(int(side) for side in size)
        if len(sides) != 2 or min(sides) < 1:
            raise ValueError(f"target_sizes[{i}]: expected (height, width) above 0, got {sides}")
        sizes.append((sides[0], sides[1]))
    return sizes
