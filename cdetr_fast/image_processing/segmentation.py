"""Model outputs to instance, panoptic and semantic maps.

Masks are upsampled a few at a time, and only those of queries that are kept, so that memory is
bounded by the map that is returned and not by the number of queries.

`compat="paper"` reads classes as independent probabilities, as they are trained.
`compat="transformers"` reproduces transformers, whose segmentation functions take a softmax and
throw the last class away.

Dimensions: B batch, Q queries, K classes, n queries kept, H x W the requested size of an image.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cdetr_fast.image_processing.batch_feature import BatchFeature
from cdetr_fast.image_processing.post_processing import (
    TargetSizes,
    field_of,
    target_sizes_hw,
    upcast,
)

# Upsampled pixels held at a time. On a CPU (4 MiB in fp32) they stay in the caches.
_PIXELS_AT_A_TIME = {"cpu": 2**20}
_PIXELS_AT_A_TIME_ELSEWHERE = 2**26


class Segments(NamedTuple):
    """The segments of one image.

    Attributes:
        segmentation: int32 `[H, W]`, ids from 1, 0 for none; all -1 if no query is kept.
        infos: `id`, `label_id`, `was_fused` and `score` of each segment.
        queries: The queries that each segment consists of; several only if it was fused.
    """

    segmentation: Tensor
    infos: list[dict[str, Any]]
    queries: list[list[int]]


def semantic_maps(
    outputs: Any, target_sizes: TargetSizes | None, return_scores: bool, compat: str
) -> list[Tensor] | list[BatchFeature]:
    """Implements `ConditionalDetrImageProcessor.post_process_semantic_segmentation`."""
    logits, masks = upcast(field_of(outputs, "logits")), field_of(outputs, "pred_masks")
    sizes = target_sizes_hw(target_sizes, len(logits))
    class_scores = logits.sigmoid() if compat == "paper" else logits.softmax(dim=-1)
    results = []
    for image_scores, image_masks, size in zip(class_scores, masks, sizes, strict=True):
        scores = torch.einsum("qk,qhw->khw", image_scores, upcast(image_masks).sigmoid())
        if return_scores:
            scores = _resized(scores, size)
            entries = {"segmentation": scores.argmax(dim=0), "segmentation_scores": scores}
            results.append(BatchFeature(entries))
        else:
            best = _Best(scores, size)
            for first, maps in _upsampled(scores, size):
                best.update(first, maps)
            results.append(best.index)
    return results


def segments(
    outputs: Any,
    threshold: float,
    mask_threshold: float,
    overlap_mask_area_threshold: float,
    labels_to_fuse: Collection[int],
    target_sizes: TargetSizes | None,
    compat: str,
) -> list[Segments]:
    """Implements the instance and panoptic functions of `ConditionalDetrImageProcessor`."""
    logits, masks = upcast(field_of(outputs, "logits")), field_of(outputs, "pred_masks")
    sizes = target_sizes_hw(target_sizes, len(logits))
    scores, labels, keep = kept_queries(logits, threshold, compat)
    # One transfer for the whole batch; fp64 holds the labels exactly too.
    rows = torch.stack((keep.double(), labels.double(), scores.double())).cpu()
    kept_on_host, labels_on_host, scores_on_host = rows[0].bool(), rows[1].long(), rows[2]

    results = []
    for image, size in enumerate(sizes):
        queries = kept_on_host[image].nonzero()[:, 0]
        if len(queries) == 0:
            height, width = size or masks.shape[-2:]
            nothing = torch.full((height, width), -1, dtype=torch.int32, device=masks.device)
            results.append(Segments(nothing, [], []))
            continue
        on_device = queries.to(masks.device)
        owner, exists = _assign_pixels(
            upcast(masks[image, on_device]),
            scores[image, on_device],
            size,
            mask_threshold,
            overlap_mask_area_threshold,
            compat,
        )
        ids, infos, parts = _number_segments(
            exists.tolist(),
            labels_on_host[image, queries].tolist(),
            scores_on_host[image, queries].tolist(),
            labels_to_fuse,
            compat,
        )
        # The last entry stands for the pixels without an owner.
        table = torch.tensor([*ids, 0], dtype=torch.int32, device=owner.device)
        segmentation = table.index_select(0, owner.flatten()).view(owner.shape)
        numbers = queries.tolist()
        results.append(Segments(segmentation, infos, [[numbers[i] for i in p] for p in parts]))
    return results


def kept_queries(logits: Tensor, threshold: float, compat: str) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the score and label of each query, and which queries are above the threshold.

    Args:
        logits: fp32 `[B, Q, K]`.
        threshold: Score above which a query is kept.
        compat: "paper" or "transformers".

    Returns:
        scores `[B, Q]`, labels int64 `[B, Q]`, keep bool `[B, Q]`.
    """
    if compat == "paper":
        best_logits, labels = logits.max(dim=-1)
        scores = best_logits.sigmoid()
        return scores, labels, scores > threshold
    scores, labels = logits.softmax(dim=-1).max(dim=-1)
    return scores, labels, (scores > threshold) & (labels != logits.shape[-1] - 1)


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
    # transformers upsamples probabilities, the authors logits.
    maps = mask_logits if compat == "paper" else mask_logits.sigmoid()
    best = _Best(maps, size, nobody=count)
    mask_area = scores.new_empty(count, dtype=torch.int64)
    for first, chunk in _upsampled(maps, size):
        last = first + len(chunk)
        weights = scores[first:last, None, None]
        if compat == "paper":
            probabilities = chunk.sigmoid()
            inside = probabilities >= mask_threshold  # [q, H, W]
            chunk = (probabilities * weights).masked_fill_(~inside, -1.0)
        else:
            chunk = chunk * weights
            inside = chunk >= mask_threshold
        mask_area[first:last] = inside.flatten(1).sum(dim=1)
        best.update(first, chunk)
    owner = best.index
    if compat == "paper":
        owner.masked_fill_(best.value < 0, count)
    visible_area = owner.flatten().bincount(minlength=count + 1)[:count]
    share = (visible_area / mask_area).double()
    exists = (visible_area > 0) & (mask_area > 0) & (share > overlap_mask_area_threshold)
    return owner, exists


class _Best:
    """The largest of many maps at each pixel, and its index, the lowest one of equals.

    Args:
        maps: The maps before they are upsampled, `[n, h, w]`.
        size: H and W; None keeps h and w.
        nobody: Index before the first update.
    """

    def __init__(self, maps: Tensor, size: tuple[int, int] | None, nobody: int = 0) -> None:
        shape = size or tuple(maps.shape[-2:])
        self.value = maps.new_full(shape, -torch.inf)
        self.index = torch.full(shape, nobody, dtype=torch.int64, device=maps.device)

    def update(self, first: int, maps: Tensor) -> None:
        """Takes in maps `[q, H, W]`, which come in the order of their indices from `first` on."""
        value, index = maps.max(dim=0)
        if maps.device.type != "cpu":
            # On a GPU `max` may return any one of equals.
            index = (maps == value).to(torch.uint8).argmax(dim=0)
        better = value > self.value
        self.value = torch.where(better, value, self.value)
        self.index = torch.where(better, index + first, self.index)


def _number_segments(
    exists: list[bool],
    labels: list[int],
    scores: list[float],
    labels_to_fuse: Collection[int],
    compat: str,
) -> tuple[list[int], list[dict[str, Any]], list[list[int]]]:
    """Numbers the segments from 1 in query order; the parts of a fused class share one number.

    Returns:
        The id of each query (0 where it has no segment); the `segments_info`; and for each entry of
        that the positions of its queries.
    """
    ids, infos, parts, last_id = [], [], [], 0
    fused: dict[int, int] = {}  # label to position in infos
    for query, (present, label, score) in enumerate(zip(exists, labels, scores, strict=True)):
        if not present:
            ids.append(0)
            continue
        score = round(score, 6)
        if label in fused and compat == "paper":
            info = infos[fused[label]]
            info["score"] = max(info["score"], score)
            parts[fused[label]].append(query)
            ids.append(info["id"])
            continue
        # transformers lists each part, and goes on counting from the fused id: later ids collide.
        last_id = infos[fused[label]]["id"] if label in fused else last_id + 1
        fuse = label in labels_to_fuse
        if fuse:
            fused[label] = len(infos)
        infos.append({"id": last_id, "label_id": label, "was_fused": fuse, "score": score})
        parts.append([query])
        ids.append(last_id)
    return ids, infos, parts


def run_lengths(found: Segments, form: bool | str, compat: str) -> Any:
    """Returns the segments of an image as runs.

    Args:
        found: The segments.
        form: True for transformers' runs over the rows, "rle" for COCO's compressed ones.
        compat: "paper", or "transformers": that codes the pixels of no segment too, and keeps the
            map if no query is kept.
    """
    ids = [info["id"] for info in found.infos]
    if form == "rle":
        return coco_rle(found.segmentation, ids)
    if compat == "transformers":
        if bool((found.segmentation == -1).all()):
            return found.segmentation
        ids = found.segmentation.unique().tolist()
    flat = found.segmentation.cpu().numpy().ravel()
    codes = []
    for segment_id in ids:
        member = np.concatenate(([False], flat == segment_id, [False]))
        edges = np.flatnonzero(member[1:] != member[:-1]) + 1  # start, end, start, end, ...
        edges[1::2] -= edges[::2]
        codes.append(edges.tolist())
    return codes


def coco_rle(segmentation: Tensor, ids: list[int]) -> list[dict[str, Any]]:
    """Returns the pixels of each id as COCO's compressed run lengths.

    Args:
        segmentation: Integers `[H, W]`.
        ids: The ids wanted.

    Returns:
        Per id {"size": [H, W], "counts": str}, which `json` can write and pycocotools decodes.

    Raises:
        ImportError: pycocotools is missing.
    """
    try:
        from pycocotools import mask as coco_mask
    except ImportError as error:
        raise ImportError(
            "COCO run lengths need pycocotools: pip install 'cdetr-fast[eval]'"
        ) from error
    columns = np.asfortranarray(segmentation.cpu().numpy())
    codes = [coco_mask.encode((columns == i).view(np.uint8)) for i in ids]
    return [{"size": code["size"], "counts": code["counts"].decode("ascii")} for code in codes]


def _upsampled(maps: Tensor, size: tuple[int, int] | None):
    """Yields maps `[n, h, w]` a few at a time as `[q, H, W]`, each with the index of its first."""
    height, width = size or maps.shape[-2:]
    budget = _PIXELS_AT_A_TIME.get(maps.device.type, _PIXELS_AT_A_TIME_ELSEWHERE)
    step = max(1, budget // (height * width))
    for first in range(0, len(maps), step):
        yield first, _resized(maps[first : first + step], size)


def _resized(maps: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Resizes `[C, h, w]` to `[C, H, W]`."""
    if size is None:
        return maps
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]
