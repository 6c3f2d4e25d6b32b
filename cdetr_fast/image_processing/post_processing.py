"""Model outputs to detections and segmentation maps.

The class head is trained with the sigmoid focal loss: its outputs are independent probabilities,
and there is no "no object" class. `compat="paper"` reads them so. `compat="transformers"`
reproduces transformers, whose segmentation functions take a softmax and throw the last class away.

Dimensions: B batch, Q queries, K classes, n segments kept, H x W the requested size of an image.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cdetr_fast.image_processing.batch_feature import BatchFeature
from cdetr_kernels import detection_topk

TargetSizes = Tensor | Sequence[Sequence[int]]


def detections(
    outputs: Any, threshold: float, target_sizes: TargetSizes | None, top_k: int
) -> list[dict[str, Tensor]]:
    """Implements `ConditionalDetrImageProcessor.post_process_object_detection`."""
    logits = _field(outputs, "logits")
    _check_count(target_sizes, len(logits))
    if target_sizes is not None and not isinstance(target_sizes, Tensor):
        target_sizes = torch.tensor([[float(side) for side in size] for size in target_sizes])
    k = min(top_k, logits.shape[1] * logits.shape[2])
    scores, labels, boxes_xyxy, _ = detection_topk(
        logits, _field(outputs, "pred_boxes"), target_sizes, k=k
    )
    # Scores descend, so those above the threshold come first: one transfer for the whole batch.
    counts = (scores > threshold).sum(dim=1).tolist()
    return [
        {"scores": scores[i, :n], "labels": labels[i, :n], "boxes": boxes_xyxy[i, :n]}
        for i, n in enumerate(counts)
    ]


def _field(outputs: Any, name: str) -> Tensor:
    """Reads a field of a model output, or of the plain dict that transformers' pipelines make."""
    return outputs[name] if isinstance(outputs, Mapping) else getattr(outputs, name)


def semantic_maps(
    outputs: Any, target_sizes: TargetSizes | None, return_scores: bool, compat: str
) -> list[Tensor] | list[BatchFeature]:
    """Implements `ConditionalDetrImageProcessor.post_process_semantic_segmentation`."""
    logits, masks = _upcast(_field(outputs, "logits")), _upcast(_field(outputs, "pred_masks"))
    sizes = _sizes(target_sizes, len(logits))
    class_scores = logits.sigmoid() if compat == "paper" else logits.softmax(dim=-1)
    scores = torch.einsum("bqk,bqhw->bkhw", class_scores, masks.sigmoid())
    results = []
    for image_scores, size in zip(scores, sizes, strict=True):
        image_scores = _resized(image_scores, size)
        segmentation = image_scores.argmax(dim=0)
        if return_scores:
            entries = {"segmentation": segmentation, "segmentation_scores": image_scores}
            results.append(BatchFeature(entries))
        else:
            results.append(segmentation)
    return results


def segments(
    outputs: Any,
    threshold: float,
    mask_threshold: float,
    overlap_mask_area_threshold: float,
    labels_to_fuse: Collection[int],
    target_sizes: TargetSizes | None,
    return_run_lengths: bool,
    compat: str,
) -> list[dict[str, Any]]:
    """Implements the instance and panoptic functions of `ConditionalDetrImageProcessor`."""
    logits, masks = _upcast(_field(outputs, "logits")), _field(outputs, "pred_masks")
    sizes = _sizes(target_sizes, len(logits))
    if compat == "paper":
        best_logits, labels = logits.max(dim=-1)
        scores = best_logits.sigmoid()
        keep = scores > threshold
    else:
        scores, labels = logits.softmax(dim=-1).max(dim=-1)
        keep = (scores > threshold) & (labels != logits.shape[-1] - 1)

    results = []
    for image, queries in enumerate(keep.cpu()):  # one transfer for the whole batch
        queries = queries.nonzero()[:, 0].to(masks.device)
        if len(queries) == 0:
            height, width = sizes[image] or masks.shape[-2:]
            segmentation = torch.full((height, width), -1, dtype=torch.int32, device=masks.device)
            infos = []
        else:
            owner, exists = _assign_pixels(
                _upcast(masks[image, queries]),
                scores[image, queries],
                sizes[image],
                mask_threshold,
                overlap_mask_area_threshold,
                compat,
            )
            ids, infos = _number_segments(
                exists.tolist(),
                labels[image, queries].tolist(),
                scores[image, queries].tolist(),
                labels_to_fuse,
                compat,
            )
            # The last entry stands for the pixels without an owner.
            segmentation = torch.tensor([*ids, 0], dtype=torch.int32, device=owner.device)[owner]
        if return_run_lengths and compat == "paper":
            segmentation = _run_lengths(segmentation, [info["id"] for info in infos])
        elif return_run_lengths and len(queries) > 0:
            # transformers codes the pixels of no segment too; it keeps the map if no query is kept.
            segmentation = _run_lengths(segmentation, segmentation.unique().tolist())
        results.append({"segmentation": segmentation, "segments_info": infos})
    return results


def _assign_pixels(
    mask_logits: Tensor,
    scores: Tensor,
    size: tuple[int, int] | None,
    mask_threshold: float,
    overlap_mask_area_threshold: float,
    compat: str,
) -> tuple[Tensor, Tensor]:
    """Gives each pixel to one query, and tells which queries keep enough of their mask.

    Returns:
        owner int64 `[H, W]` in [0, n], n for none; exists bool `[n]`.
    """
    count = len(mask_logits)
    if compat == "paper":
        probabilities = _resized(mask_logits, size).sigmoid()
        weighted = probabilities * scores[:, None, None]
        inside = probabilities >= mask_threshold  # [n, H, W]
        best, owner = weighted.masked_fill(~inside, -1.0).max(dim=0)
        owner = owner.masked_fill(best < 0, count)
    else:
        weighted = _resized(mask_logits.sigmoid(), size) * scores[:, None, None]
        inside = weighted >= mask_threshold
        owner = weighted.argmax(dim=0)
    mask_area = inside.flatten(1).sum(dim=1)
    visible_area = owner.new_zeros(count + 1)
    visible_area.scatter_add_(0, owner.flatten(), torch.ones_like(owner).flatten())
    visible_area = visible_area[:count]
    share = (visible_area / mask_area).double()
    exists = (visible_area > 0) & (mask_area > 0) & (share > overlap_mask_area_threshold)
    return owner, exists


def _number_segments(
    exists: list[bool],
    labels: list[int],
    scores: list[float],
    labels_to_fuse: Collection[int],
    compat: str,
) -> tuple[list[int], list[dict[str, Any]]]:
    """Numbers the segments from 1 in query order; the parts of a fused class share one number.

    Returns:
        The id of each query (0 where it has no segment), and the `segments_info`.
    """
    ids, infos, last_id = [], [], 0
    fused: dict[int, dict[str, Any]] = {}
    for present, label, score in zip(exists, labels, scores, strict=True):
        if not present:
            ids.append(0)
            continue
        score = round(score, 6)
        if label in fused and compat == "paper":
            info = fused[label]
            info["score"] = max(info["score"], score)
            ids.append(info["id"])
            continue
        # transformers lists each part, and goes on counting from the fused id: later ids collide.
        last_id = fused[label]["id"] if label in fused else last_id + 1
        fuse = label in labels_to_fuse
        info = {"id": last_id, "label_id": label, "was_fused": fuse, "score": score}
        if fuse:
            fused[label] = info
        ids.append(last_id)
        infos.append(info)
    return ids, infos


def _run_lengths(segmentation: Tensor, ids: list[int]) -> list[list[int]]:
    """Returns, for each id, [start, length, start, length, ...] over the rows, starts from 1."""
    flat = segmentation.cpu().numpy().ravel()
    codes = []
    for segment_id in ids:
        member = np.concatenate(([False], flat == segment_id, [False]))
        edges = np.flatnonzero(member[1:] != member[:-1]) + 1  # start, end, start, end, ...
        edges[1::2] -= edges[::2]
        codes.append(edges.tolist())
    return codes


def _resized(maps: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Resizes `[C, h, w]` to `[C, H, W]`."""
    if size is None:
        return maps
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]


def _upcast(values: Tensor) -> Tensor:
    """Half precision to fp32; probabilities of 16 bits tie and do not add up."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _check_count(target_sizes: TargetSizes | None, batch: int) -> None:
    if target_sizes is not None and len(target_sizes) != batch:
        raise ValueError(
            f"target_sizes: expected {batch} (one per image of the logits), got {len(target_sizes)}"
        )


def _sizes(target_sizes: TargetSizes | None, batch: int) -> list[tuple[int, int] | None]:
    """Returns the requested (height, width) of each image."""
    _check_count(target_sizes, batch)
    if target_sizes is None:
        return [None] * batch
    if isinstance(target_sizes, Tensor):
        target_sizes = target_sizes.tolist()
    return [(int(height), int(width)) for height, width in target_sizes]
