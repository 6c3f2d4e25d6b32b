"""Panoptic quality: how well segments of things and stuff are found, image by image.

A found and a true segment of one class match if their IoU is above 0.5; no segment can match twice
then. PQ = sum of matched IoUs / (matches + half of the rest on both sides) = SQ * RQ, of each class
and averaged over the classes that occur. Source: Kirillov et al., "Panoptic Segmentation" (2019);
panopticapi/evaluation.py has COCO's rules for void and crowds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from cdetr_fast.common.scores import kept_queries
from cdetr_fast.images import segments as segmentation
from cdetr_fast.training.data.dataset import Batch
from cdetr_fast.training.data.index import CocoIndex
from cdetr_fast.training.run.launch import all_gather_object

if TYPE_CHECKING:
    from accelerate import Accelerator

_FIGURES = ("PQ", "SQ", "RQ")
_MASK_THRESHOLD = 0.5  # as in the image processor
_VISIBLE_SHARE = 0.8


class PanopticQuality:
    """Counts of matched segments, whose size does not depend on the number of images.

    Args:
        classes: Number of classes K.

    Attributes:
        counts: fp64 `[4, K]`, of each class the sum of IoUs, matches, false positives, and false
            negatives; those of several processes add up.
    """

    def __init__(self, classes: int) -> None:
        self.counts = np.zeros((4, classes))

    def add(
        self,
        true_map: np.ndarray,
        true_ids: ArrayLike,
        true_labels: ArrayLike,
        crowd: ArrayLike,
        found_map: np.ndarray,
        found_ids: ArrayLike,
        found_labels: ArrayLike,
    ) -> None:
        """Add an image.

        Args:
            true_map: Integers `[H, W]`, the segment of each pixel; what is not among `true_ids` is
                void: it counts neither for nor against what is found there.
            true_ids: Ids of T segments.
            true_labels: Their classes.
            crowd: Which of them are crowds; segments mostly on crowds of their class do not count.
            found_map: Integers `[H, W]`; what is not among `found_ids` is nothing.
            found_ids: Ids of the segments that were found.
            found_labels: Their classes.
        """
        ious, matches, made_up, missed = self.counts
        true_classes, found_classes = (np.asarray(v, np.int64) for v in (true_labels, found_labels))
        crowds = np.asarray(crowd, bool)
        true, found = _positions(true_map, true_ids), _positions(found_map, found_ids)
        width = len(found_classes) + 1
        cells = (len(true_classes) + 1) * width
        shared = np.bincount((true * width + found).ravel(), minlength=cells)
        shared = shared.reshape(-1, width)  # [T + 1, F + 1], the last ones void and nothing
        true_areas, found_areas = shared.sum(1)[:-1], shared.sum(0)[:-1]
        shared, void = shared[:-1, :-1], shared[-1, :-1]

        same_class = true_classes[:, None] == found_classes
        union = true_areas[:, None] + found_areas - shared - void
        iou = shared / np.maximum(union, 1)
        pairs = np.argwhere(same_class & ~crowds[:, None] & (iou > 0.5))
        np.add.at(ious, true_classes[pairs[:, 0]], iou[tuple(pairs.T)])
        np.add.at(matches, true_classes[pairs[:, 0]], 1)
        left = ~crowds & ~np.isin(np.arange(len(crowds)), pairs[:, 0])
        np.add.at(missed, true_classes[left], 1)
        on_crowd = (shared * (same_class & crowds[:, None])).sum(0)
        ignored = (void + on_crowd > 0.5 * found_areas) | (found_areas == 0)
        left = ~ignored & ~np.isin(np.arange(len(found_classes)), pairs[:, 1])
        np.add.at(made_up, found_classes[left], 1)

    def per_class(self) -> dict[str, np.ndarray]:
        """Return PQ, SQ and RQ, each `[K]`; NaN for classes that are neither present nor found."""
        ious, matches, made_up, missed = self.counts
        whole = matches + 0.5 * (made_up + missed)
        with np.errstate(invalid="ignore", divide="ignore"):
            quality = np.where(matches > 0, ious / matches, np.where(whole > 0, 0.0, np.nan))
            recognition = matches / whole
        return {"PQ": quality * recognition, "SQ": quality, "RQ": recognition}

    def stats(self, is_stuff: np.ndarray) -> dict[str, float]:
        """Return PQ, SQ and RQ over all classes, over things and over stuff.

        Args:
            is_stuff: bool `[K]`.
        """
        figures, result = self.per_class(), {}
        for suffix, chosen in (("", is_stuff | True), ("_things", ~is_stuff), ("_stuff", is_stuff)):
            for name in _FIGURES:
                values = figures[name][chosen & ~np.isnan(figures[name])]
                result[name + suffix] = float(values.mean()) if len(values) else float("nan")
        return result


def _positions(segments: np.ndarray, ids: ArrayLike) -> np.ndarray:
    """Turn ids into positions in `ids`, `len(ids)` for all others; int64 of the map's shape."""
    known = np.asarray(ids, np.int64)
    order = np.argsort(known, kind="stable")
    places = np.searchsorted(known[order], segments)
    places = np.append(order, len(known))[places]
    return np.where(np.append(known, -1)[places] == segments, places, len(known))


class FoundSegment(NamedTuple):
    """A segment that was found on an image.

    Attributes:
        label: Class index.
        score: In [0, 1].
        box_xyxy: Pixels: left, top, right, bottom.
        run_lengths: COCO's, compressed: `{"size": [H, W], "counts": str}`.
    """

    label: int
    score: float
    box_xyxy: list[float]
    run_lengths: dict[str, Any]


class PanopticScorer:
    """Panoptic quality of a model's segments, batch by batch.

    Args:
        index: The truth.
        threshold: Score above which a query is a segment.
    """

    figure = "PQ"
    """The figure that the best model is chosen by."""

    def __init__(self, index: CocoIndex, threshold: float = 0.5) -> None:
        self.index = index
        self.threshold = threshold
        self.quality = PanopticQuality(len(index.classes))
        self.is_stuff = np.array([name in index.stuff for name in index.classes])
        self.found: dict[int, list[FoundSegment]] = {}

    def __call__(self, batch: Batch, outputs: Any) -> None:
        """Add the outputs for a batch that has `segment_maps`."""
        kept = kept_queries(outputs.logits.float(), self.threshold, "paper")[2].cpu()
        sizes_hw = batch.sizes_hw()
        true_maps = batch.segment_maps or []
        for row, image in enumerate(batch.indices):
            if not batch.counted[row]:
                continue
            true_map = true_maps[row].numpy()
            queries = kept[row].nonzero()[:, 0].to(outputs.logits.device)
            found_map, infos = np.zeros_like(true_map), []
            if len(queries):
                found = self._segments(outputs, row, queries, sizes_hw[row], batch, true_map.shape)
                found_map, infos = found.segmentation.cpu().numpy(), found.infos
            self.found[image] = _found(found_map, infos)
            where = self.index.objects(image)
            self.quality.add(
                true_map,
                self.index.object_ids[where],
                self.index.labels[where],
                self.index.crowd[where],
                found_map,
                [info["id"] for info in infos],
                [info["label_id"] for info in infos],
            )

    def _segments(
        self,
        outputs: Any,
        row: int,
        queries: Tensor,
        size_hw: tuple[int, int],
        batch: Batch,
        orig_hw: tuple[int, int],
    ) -> segmentation.Segments:
        assert batch.pixels is not None
        padded_hw = batch.pixels.shape[2:]
        masks = outputs.pred_masks[row, queries].float()[None]
        # A mask covers the padding too: the image is cut out before its size is restored.
        masks = F.interpolate(masks, padded_hw, mode="bilinear", align_corners=False)
        logits, (height, width) = outputs.logits[row : row + 1, queries], size_hw
        return segmentation.segments(
            {"logits": logits, "pred_masks": masks[..., :height, :width]},
            self.threshold,
            _MASK_THRESHOLD,
            _VISIBLE_SHARE,
            set(np.flatnonzero(self.is_stuff).tolist()),
            [orig_hw],
            "paper",
        )[0]

    def gather(self, accelerator: Accelerator | None) -> None:
        """Add up the counts of all processes; all of them take part."""
        parts = all_gather_object(accelerator, (self.quality.counts, self.found))
        self.quality.counts = np.sum([counts for counts, _ in parts], axis=0)
        self.found = {image: found for _, part in parts for image, found in part.items()}

    def of_image(self, image: int) -> list[FoundSegment]:
        """Return the segments of one of the images that could be read, by its position there."""
        return self.found[sorted(self.found)[image]]

    def stats(self) -> dict[str, float]:
        """Return the figures over all classes, things and stuff."""
        return self.quality.stats(self.is_stuff)

    def figures(self) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Return the figures of the set, and those of each class `[K]`."""
        return self.stats(), self.quality.per_class()


def _found(segment_map: np.ndarray, infos: list[dict[str, Any]]) -> list[FoundSegment]:
    """Return segments with their extents as boxes."""
    codes = segmentation.coco_rle(torch.from_numpy(segment_map), [info["id"] for info in infos])
    return [
        FoundSegment(info["label_id"], info["score"], extent(segment_map == info["id"]), code)
        for info, code in zip(infos, codes, strict=True)
    ]


def extent(mask: np.ndarray) -> list[float]:
    """Return left, top, right and bottom of a mask that has pixels."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [float(v) for v in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)]
