"""Scores of segments: mask AP where objects have masks of their own, else panoptic quality."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cdetr_fast.images.detections import detections as to_detections
from cdetr_fast.images.segments import coco_rle
from cdetr_fast.training.data.dataset import Batch
from cdetr_fast.training.data.index import CocoIndex
from cdetr_fast.training.evaluation.box_scores import BoxScores, score_boxes
from cdetr_fast.training.evaluation.panoptic import FoundSegment, PanopticScorer
from cdetr_fast.training.run.launch import all_gather_object

if TYPE_CHECKING:
    from accelerate import Accelerator

    from cdetr_fast.images.batch_feature import BatchFeature

_PER_IMAGE = 100  # masks, as COCO's rules have it


def segment_scorer(index: CocoIndex | None, threshold: float = 0.5) -> SegmentScorer | None:
    """Return what scores the segments of a model on a set; None for a set of boxes.

    Args:
        index: The truth.
        threshold: Score above which a query is a segment of a panoptic map; mask AP takes all.
    """
    if index is None:
        return None
    if index.masks is not None:
        return PanopticScorer(index, threshold)
    return None if index.segmentation_text is None else MaskScorer(index)


class MaskScorer:
    """COCO's AP of masks, batch by batch: each detection has the mask of its query.

    A pixel is in a mask from a probability of 0.5 on, as in DETR's PostProcessSegm; masks may
    overlap.

    Args:
        index: The truth, with segmentations.
    """

    figure = "mask_AP"
    """The figure that the best model is chosen by."""

    def __init__(self, index: CocoIndex) -> None:
        self.index = index
        self.results: list[dict[str, Any]] = []
        self.boxes_xyxy: list[list[float]] = []
        self.images: list[int] = []

    def __call__(self, batch: Batch, outputs: Any) -> None:
        """Add the outputs for a batch."""
        found = cast(
            "BatchFeature",
            to_detections(outputs, 0.0, batch.orig_sizes_hw, _PER_IMAGE, return_tensors="pt"),
        )
        names = ("scores", "labels", "boxes", "query_index", "counts")
        columns = (found[name].tolist() for name in names)
        rows = zip(*columns, batch.indices, batch.counted, strict=True)
        for row, (scores, labels, boxes, queries, count, image, counted) in enumerate(rows):
            if not counted:
                continue
            self.images.append(image)
            self.boxes_xyxy += boxes[:count]
            codes = self._masks(outputs, row, sorted(set(queries[:count])), batch)
            for score, label, query in zip(
                scores[:count], labels[:count], queries[:count], strict=True
            ):
                entry = {"image_id": image, "category_id": label, "score": score}
                self.results.append(entry | {"segmentation": codes[query]})

    def _masks(
        self, outputs: Any, row: int, queries: list[int], batch: Batch
    ) -> dict[int, dict[str, Any]]:
        """Return the masks of queries at the image's own size, as run lengths."""
        padded_hw, (height, width) = batch.images().shape[2:], batch.sizes_hw()[row]
        codes = {}
        for query in queries:
            mask: Tensor = outputs.pred_masks[row, query].float()[None, None]
            # A mask covers the padding too: the image is cut out before its size is restored.
            mask = F.interpolate(mask, padded_hw, mode="bilinear", align_corners=False)
            mask = mask[..., :height, :width]
            mask = F.interpolate(
                mask, batch.orig_sizes_hw[row], mode="bilinear", align_corners=False
            )
            (codes[query],) = coco_rle((mask[0, 0] >= 0).to(torch.uint8), [1])
        return codes

    def gather(self, accelerator: Accelerator | None) -> None:
        """Collect the masks of all processes; all of them take part."""
        parts = all_gather_object(accelerator, (self.results, self.boxes_xyxy, self.images))
        self.results = [entry for results, _, _ in parts for entry in results]
        self.boxes_xyxy = [box for _, boxes, _ in parts for box in boxes]
        self.images = sorted({image for _, _, images in parts for image in images})

    def of_image(self, image: int) -> list[FoundSegment]:
        """Return the detections on one of the images that could be read, by its position there."""
        number = self.images[image]
        return [
            FoundSegment(entry["category_id"], entry["score"], box, entry["segmentation"])
            for entry, box in zip(self.results, self.boxes_xyxy, strict=True)
            if entry["image_id"] == number
        ]

    def scores(self) -> BoxScores:
        """Return COCO's figures of the masks on the images that could be read."""
        read = np.zeros(len(self.index), dtype=bool)
        read[self.images] = True
        index = self.index.select(read, np.ones(self.index.num_objects, dtype=bool))
        position = {image: i for i, image in enumerate(np.flatnonzero(read).tolist())}
        results = [entry | {"image_id": position[entry["image_id"]]} for entry in self.results]
        return score_boxes(index.coco_dictionary(with_masks=True), results, "segm")

    def figures(self) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Return the figures of the set, and those of each class `[K]`."""
        scores = self.scores()
        has = (scores.precision >= 0).any((0, 1))
        per_class = {
            "mask_AP": np.where(has, scores.precision.mean((0, 1)), np.nan),
            "mask_AP50": np.where(has, scores.precision[0].mean(0), np.nan),
        }
        return {f"mask_{name}": value for name, value in scores.stats.items()}, per_class


SegmentScorer = PanopticScorer | MaskScorer
