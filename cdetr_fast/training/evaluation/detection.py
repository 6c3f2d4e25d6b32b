"""Detections of a model on a data set, with their AP and AR by COCO's rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import box_convert, box_iou

from cdetr_fast.common import progress
from cdetr_fast.images.detections import detections as to_detections
from cdetr_fast.training.data.dataset import Batch
from cdetr_fast.training.data.index import CocoIndex
from cdetr_fast.training.errors import DataError
from cdetr_fast.training.evaluation.box_scores import score_boxes
from cdetr_fast.training.run.launch import all_gather_object

if TYPE_CHECKING:
    from accelerate import Accelerator

    from cdetr_fast.images.batch_feature import BatchFeature
    from cdetr_fast.training.evaluation.segments import SegmentScorer

_PER_IMAGE = 100  # detections, as COCO's rules have it
_FAILURES_SHOWN = 20


@dataclass
class Detections:
    """Detections on a data set: 36 bytes each, at most 3.6 KB per image.

    Attributes:
        images: int64 `[n]` indices of images.
        labels: int64 `[n]`.
        scores: fp32 `[n]`, descending within an image.
        boxes_xyxy: fp32 `[n, 4]`, pixels.
        failures: Why images could not be read, one line each.
        evaluated: int64 `[N]` indices of the images that could be read, ascending.
    """

    images: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    boxes_xyxy: np.ndarray
    failures: list[str]
    evaluated: np.ndarray

    def of_image(self, image: int) -> slice:
        """Return the slice of the detections of an image; images are in ascending order."""
        return slice(*np.searchsorted(self.images, [image, image + 1]).tolist())

    def without_failures(self, index: CocoIndex) -> tuple[CocoIndex, Detections]:
        """Remove images that could not be read from the truth, where they would count as missed.

        Args:
            index: The truth on all images.

        Returns:
            The truth on the images that could be read, and the detections on it.

        Raises:
            DataError: No image could be read.
        """
        if not self.failures:
            return index, self
        if not len(self.evaluated):
            first = self.failures[0]
            raise DataError(f"{index.path}: not one image could be read; the first: {first}")
        chosen = np.zeros(len(index), dtype=bool)
        chosen[self.evaluated] = True
        return index.select(chosen, np.ones(index.num_objects, dtype=bool)), replace(
            self,
            images=np.searchsorted(self.evaluated, self.images),
            evaluated=np.arange(len(self.evaluated)),
        )

    def described_failures(self) -> str:
        """Return how many images could not be read, and why; one line for each of the first."""
        total = len(self.evaluated) + len(self.failures)
        lines = [f"{len(self.failures)} of {total} images could not be read:"]
        lines += self.failures[:_FAILURES_SHOWN]
        more = len(self.failures) - _FAILURES_SHOWN
        return "\n".join(lines + ([f"and {more} more"] if more > 0 else []))


@torch.no_grad()
def predict(
    model: nn.Module,
    batches: Iterable[Batch],
    mean: Tensor,
    std: Tensor,
    accelerator: Accelerator | None = None,
    observe: Callable[[Batch, Any], None] | None = None,
) -> Detections:
    """Run a model over batches and collect the detections of all processes on each of them.

    Args:
        model: A detection or segmentation model; its training mode is restored.
        batches: Batches of this process.
        mean: Mean of the pixels `[3, 1, 1]`, on the model's device, in units of uint8.
        std: Standard deviation, likewise.
        accelerator: Accelerator of the processes that share the work, if any.
        observe: Called with each batch and the model's outputs for it.
    """
    was_training = model.training
    model.eval()
    parameter = next(model.parameters())
    # Asked for where the configuration says otherwise: a user's own model may not take the keyword.
    config = getattr(getattr(model, "module", model), "config", None)
    named = {} if getattr(config, "return_dict", True) else {"return_dict": True}
    columns: list[list[np.ndarray]] = [[np.zeros(0, np.int64)], [np.zeros(0, np.int64)]]
    columns += [[np.zeros(0, np.float32)], [np.zeros((0, 4), np.float32)]]
    failures: list[str] = []
    evaluated: list[int] = []
    for batch in progress.track(batches, "evaluating"):
        failures += batch.failures
        batch.fill_if_empty()
        inputs = batch.model_inputs(parameter.device, mean, std, parameter.dtype)
        del inputs["labels"]
        outputs = model(**inputs, **named)
        found = cast(
            "BatchFeature",
            to_detections(outputs, 0.0, batch.orig_sizes_hw, _PER_IMAGE, return_tensors="pt"),
        )
        names = ("labels", "scores", "boxes", "counts")
        labels, scores, boxes, counts = (found[name].cpu().numpy() for name in names)
        for row, (image, counted) in enumerate(zip(batch.indices, batch.counted, strict=True)):
            if not counted:
                continue
            evaluated.append(image)
            count = counts[row]
            values = (np.full(count, image), labels[row], scores[row], boxes[row])
            for column, value in zip(columns, values, strict=True):
                column.append(value[:count].copy())  # a view would keep the whole batch
        if observe is not None:
            observe(batch, outputs)
    model.train(was_training)
    merged = [np.concatenate(column) for column in columns]
    seen = np.array(evaluated, dtype=np.int64)
    parts = all_gather_object(accelerator, (merged, failures, seen))
    merged = [np.concatenate(column) for column in zip(*(p[0] for p in parts), strict=True)]
    order = np.argsort(merged[0], kind="stable")
    indices, labels, scores, boxes = (column[order] for column in merged)
    # An image that fills up a batch may fail twice.
    all_failures = sorted({failure for part in parts for failure in part[1]})
    all_seen = np.sort(np.concatenate([part[2] for part in parts]))
    return Detections(indices, labels, scores, boxes, all_failures, all_seen)


@dataclass
class Evaluation:
    """COCO's figures of detections; with PQ or mask_AP and the like where segments were scored.

    Attributes:
        stats: AP, AP50, AP75, AP and AR by size of object and number of detections, in [0, 1]; NaN
            where there is nothing to measure.
        classes: For each class its name, number of objects, AP, AP50 and AR100.
        precision: Precision at IoU 0.5 of all object sizes `[101, K]`, over recall 0, 0.01 ... 1;
            -1 for classes without objects.
        outcomes: int8 of each detection; see `BoxScores`.
    """

    stats: dict[str, float]
    classes: list[dict[str, Any]]
    precision: np.ndarray
    outcomes: np.ndarray


def evaluate_detections(
    index: CocoIndex,
    detections: Detections,
    segments: SegmentScorer | None = None,
) -> Evaluation:
    """Score detections by COCO's rules.

    Args:
        index: The truth, with the labels of the detections.
        detections: Detections on images of the index.
        segments: Scores of the segments on the same images.
    """
    rows = np.column_stack(
        (
            detections.images.astype(np.float64),
            box_convert(torch.from_numpy(detections.boxes_xyxy).double(), "xyxy", "xywh").numpy(),
            detections.scores.astype(np.float64),
            detections.labels.astype(np.float64),
        )
    )
    scores = score_boxes(index.coco_dictionary(), rows)
    counts = np.bincount(index.labels[~index.crowd], minlength=len(index.classes))
    nan = float("nan")
    classes: list[dict[str, Any]] = []
    for label, name in enumerate(index.classes):
        precision, recall = scores.precision[:, :, label], scores.recall[:, label]
        has = counts[label] > 0
        classes.append(
            {
                "class": name,
                "objects": int(counts[label]),
                "AP": float(precision.mean()) if has else nan,
                "AP50": float(precision[0].mean()) if has else nan,
                "AR100": float(recall.mean()) if has else nan,
            }
        )
    stats = scores.stats
    if segments is not None:
        further, per_class = segments.figures()
        stats |= further
        for name, values in per_class.items():
            for one, value in zip(classes, values.tolist(), strict=True):
                one[name] = value
    return Evaluation(stats, classes, scores.precision[0], scores.outcomes)


def confusion_matrices(
    index: CocoIndex, detections: Detections, threshold: float = 0.5, iou: float = 0.5
) -> Iterator[np.ndarray]:
    """Yield for each image which class was detected where which class is.

    Args:
        index: The truth.
        detections: Detections on its images.
        threshold: Lowest score that counts.
        iou: Least overlap of a pair, whatever its classes; best pairs first.

    Yields:
        int64 `[K + 1, K + 1]`, rows the truth and columns what was found; the last row counts
        detections of nothing, the last column objects that were missed.
    """
    classes = len(index.classes)
    for image in range(len(index)):
        matrix = np.zeros((classes + 1, classes + 1), dtype=np.int64)
        truth, labels = true_boxes(index, image)
        where = detections.of_image(image)
        kept = detections.scores[where] >= threshold
        boxes, found = detections.boxes_xyxy[where][kept], detections.labels[where][kept]
        overlaps = box_iou(torch.from_numpy(truth), torch.from_numpy(boxes)).numpy()
        missed, made_up = set(range(len(truth))), set(range(len(found)))
        for place in np.argsort(-overlaps, axis=None, kind="stable"):
            i, j = divmod(int(place), len(found))
            if overlaps[i, j] < iou:
                break
            if i in missed and j in made_up:
                matrix[labels[i], found[j]] += 1
                missed.remove(i)
                made_up.remove(j)
        for i in missed:
            matrix[labels[i], classes] += 1
        for j in made_up:
            matrix[classes, found[j]] += 1
        yield matrix


def true_boxes(index: CocoIndex, image: int) -> tuple[np.ndarray, np.ndarray]:
    """Return boxes xyxy fp32 `[T, 4]` and labels `[T]` of an image, without crowds."""
    where = index.objects(image)
    keep = ~index.crowd[where]
    boxes_xywh = torch.from_numpy(index.boxes_xywh[where][keep].astype(np.float32))
    return box_convert(boxes_xywh, "xywh", "xyxy").numpy(), index.labels[where][keep]
