"""Instance, panoptic and semantic maps from model outputs.

Only the masks of kept queries are upsampled, one at a time and only within the extent of the
object, so that memory is bounded by the returned map and not by the number of queries.

`compat="paper"` reads classes as independent probabilities, as they are trained.
`compat="transformers"` reproduces transformers, whose segmentation functions take a softmax and
drop the last class.

Dimensions: B batch, Q queries, K classes, n queries kept, H x W the requested size of an image.
"""

import math
from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cdetr_fast.common.scores import kept_queries, upcast
from cdetr_fast.images.batch_feature import BatchFeature
from cdetr_fast.images.detections import TargetSizes, field_of, target_sizes_hw

# Number of mask scores summed into classes at once; on a CPU they stay in the caches.
_SCORES_AT_A_TIME = {"cpu": 2**18}
_SCORES_AT_A_TIME_ELSEWHERE = 2**26


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
    """Implement `ConditionalDetrImageProcessor.post_process_semantic_segmentation`."""
    logits, masks = upcast(field_of(outputs, "logits")), field_of(outputs, "pred_masks")
    sizes = target_sizes_hw(target_sizes, len(logits))
    class_scores = logits.sigmoid() if compat == "paper" else logits.softmax(dim=-1)
    results: list[Any] = []
    for image_scores, image_masks, size in zip(class_scores, masks, sizes, strict=True):
        scores = _class_maps(image_scores, image_masks)  # [K, h, w]
        if return_scores:
            scores = _resized(scores, size)
            entries = {"segmentation": scores.argmax(dim=0), "segmentation_scores": scores}
            results.append(BatchFeature(entries))
            continue
        best = _resized(scores[:1], size)[0].clone()
        segmentation = torch.zeros(best.shape, dtype=torch.int64, device=best.device)
        for label in range(1, len(scores)):
            values = _resized(scores[label : label + 1], size)[0]
            segmentation.masked_fill_(values > best, label)  # the lowest of equal ones
            torch.maximum(best, values, out=best)
        results.append(segmentation)
    return results


def _class_maps(class_scores: Tensor, mask_logits: Tensor) -> Tensor:
    """Sum mask scores `[Q, h, w]`, weighted by class scores `[Q, K]`, to `[K, h, w]`."""
    queries, height, width = mask_logits.shape
    budget = _SCORES_AT_A_TIME.get(mask_logits.device.type, _SCORES_AT_A_TIME_ELSEWHERE)
    rows = max(1, budget // max(1, queries * width))
    sums = class_scores.new_empty(class_scores.shape[1], height, width)
    for top in range(0, height, rows):
        part = upcast(mask_logits[:, top : top + rows]).sigmoid()
        sums[:, top : top + rows] = torch.einsum("qk,qhw->khw", class_scores, part)
    return sums


def segments(
    outputs: Any,
    threshold: float,
    mask_threshold: float,
    overlap_mask_area_threshold: float,
    labels_to_fuse: Collection[int],
    target_sizes: TargetSizes | None,
    compat: str,
) -> list[Segments]:
    """Implement the instance and panoptic functions of `ConditionalDetrImageProcessor`."""
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
        assign = _assign_pixels if compat == "paper" else _assign_pixels_as_transformers
        owner, mask_area = assign(
            upcast(masks[image, on_device]), scores[image, on_device], size, mask_threshold
        )
        visible_area = owner.flatten().bincount(minlength=len(queries) + 1)[:-1]
        share = (visible_area / mask_area).double()
        exists = (visible_area > 0) & (mask_area > 0) & (share > overlap_mask_area_threshold)
        ids, infos, parts = _number_segments(
            exists.tolist(),
            labels_on_host[image, queries].tolist(),
            scores_on_host[image, queries].tolist(),
            labels_to_fuse,
            compat,
        )
        # The last entry is for the pixels without an owner.
        table = torch.tensor([*ids, 0], dtype=torch.int32, device=owner.device)
        segmentation = table.index_select(0, owner.flatten()).view(owner.shape)
        numbers = queries.tolist()
        results.append(Segments(segmentation, infos, [[numbers[i] for i in p] for p in parts]))
    return results


def _assign_pixels(
    mask_logits: Tensor, scores: Tensor, size: tuple[int, int] | None, mask_threshold: float
) -> tuple[Tensor, Tensor]:
    """Assign each pixel to the best of the queries whose mask contains it.

    Returns:
        owner int64 `[H, W]` in [0, n], n meaning none; mask_area int64 `[n]`.
    """
    count, small_height, small_width = mask_logits.shape
    height, width = size or (small_height, small_width)
    rows = _Axis(small_height, height, mask_logits)
    columns = _Axis(small_width, width, mask_logits)
    # Interpolation stays within the range of its source pixels, rounding aside.
    near = mask_logits.sigmoid() >= mask_threshold - 1e-5  # [n, h, w]
    reach = torch.cat((near.any(dim=2), near.any(dim=1)), dim=1).cpu()  # [n, h + w]

    best = scores.new_zeros(height, width)
    owner = torch.full((height, width), count, dtype=torch.int64, device=scores.device)
    areas = []
    for query in range(count):
        row = rows.reached(reach[query, :small_height])
        column = columns.reached(reach[query, small_height:])
        if row.stop <= row.start or column.stop <= column.start:
            areas.append(owner.new_zeros(()))
            continue
        mask = rows.interpolated(mask_logits[query], row, dim=0)
        mask = columns.interpolated(mask, column, dim=1).sigmoid()
        inside = mask >= mask_threshold
        areas.append(inside.count_nonzero())
        weighted = (mask * scores[query]).mul_(inside)
        best_here, owner_here = best[row, column], owner[row, column]
        # A pixel without an owner takes a score of 0 too.
        better = (weighted > best_here) | (inside & (owner_here == count))
        owner_here.masked_fill_(better, query)
        torch.maximum(best_here, weighted, out=best_here)
    return owner, torch.stack(areas)


class _Axis:
    """One axis of a bilinear interpolation that equals `F.interpolate(align_corners=False)`.

    Args:
        small: Source pixels.
        large: Target pixels.
        like: Tensor whose dtype and device are used.
    """

    def __init__(self, small: int, large: int, like: Tensor) -> None:
        self.small, self.large = small, large
        position = (torch.arange(large, dtype=like.dtype, device=like.device) + 0.5) * (
            small / large
        )
        position = (position - 0.5).clamp_(min=0.0)
        self.before = position.long().clamp_(max=small - 1)
        self.after = (self.before + 1).clamp_(max=small - 1)
        self.weight = position - self.before

    def reached(self, flags: Tensor) -> slice:
        """Return the target pixels that have a flagged source pixel `[small]` as a neighbour."""
        marked = flags.nonzero()
        if len(marked) == 0:
            return slice(0, 0)
        first, last = int(marked[0]), int(marked[-1])
        scale = self.large / self.small
        start = 0 if first == 0 else math.floor((first - 0.5) * scale - 0.5)
        stop = self.large if last == self.small - 1 else math.ceil((last + 1.5) * scale - 0.5) + 1
        return slice(max(0, start), min(self.large, stop))

    def interpolated(self, values: Tensor, part: slice, dim: int) -> Tensor:
        """Interpolate a map `[h, w]` along one axis, at some of the target pixels."""
        if self.small == self.large:
            return values[part] if dim == 0 else values[:, part]
        weight = self.weight[part]
        return torch.lerp(
            values.index_select(dim, self.before[part]),
            values.index_select(dim, self.after[part]),
            weight[:, None] if dim == 0 else weight,
        )


def _assign_pixels_as_transformers(
    mask_logits: Tensor, scores: Tensor, size: tuple[int, int] | None, mask_threshold: float
) -> tuple[Tensor, Tensor]:
    """Assign each pixel to the query of the largest weighted score; as `_assign_pixels`."""
    height, width = size or mask_logits.shape[-2:]
    best = scores.new_full((height, width), -torch.inf)
    owner = torch.zeros(height, width, dtype=torch.int64, device=scores.device)
    areas = []
    for query in range(len(mask_logits)):
        weighted = _resized(mask_logits[query : query + 1].sigmoid(), size)[0] * scores[query]
        areas.append((weighted >= mask_threshold).count_nonzero())
        owner.masked_fill_(weighted > best, query)
        torch.maximum(best, weighted, out=best)
    return owner, torch.stack(areas)


def _number_segments(
    exists: list[bool],
    labels: list[int],
    scores: list[float],
    labels_to_fuse: Collection[int],
    compat: str,
) -> tuple[list[int], list[dict[str, Any]], list[list[int]]]:
    """Assign ids from 1 to the segments in query order; the parts of a fused class share one.

    Returns:
        The id of each query (0 where it has no segment); the `segments_info`; and for each of its
        entries the positions of its queries.
    """
    ids: list[int] = []
    infos: list[dict[str, Any]] = []
    parts: list[list[int]] = []
    last_id = 0
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
        # transformers lists each part, and continues from the fused id: later ids collide.
        last_id = infos[fused[label]]["id"] if label in fused else last_id + 1
        fuse = label in labels_to_fuse
        if fuse:
            fused[label] = len(infos)
        infos.append({"id": last_id, "label_id": label, "was_fused": fuse, "score": score})
        parts.append([query])
        ids.append(last_id)
    return ids, infos, parts


def run_lengths(found: Segments, form: bool | str, compat: str) -> Any:
    """Return the segments of an image as runs.

    Args:
        found: The segments.
        form: True for transformers' runs over the rows, "rle" for COCO's compressed ones.
        compat: "paper", or "transformers", which also encodes the pixels without a segment, and
            returns the map if no query is kept.
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
    """Return the pixels of each id as COCO's compressed run lengths.

    Args:
        segmentation: Integers `[H, W]`.
        ids: The ids to encode.

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


def _resized(maps: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Resize `[C, h, w]` to `[C, H, W]`."""
    if size is None:
        return maps
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]
