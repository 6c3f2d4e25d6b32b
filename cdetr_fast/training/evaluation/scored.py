"""Detections on a set with their figures, errors of each image, and files that hold them."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.ops import box_convert

from cdetr_fast.common.files import read_json, write_json, write_text
from cdetr_fast.training.data.index import CocoIndex
from cdetr_fast.training.errors import DataError
from cdetr_fast.training.evaluation.detection import (
    Detections,
    Evaluation,
    confusion_matrices,
    evaluate_detections,
)
from cdetr_fast.training.evaluation.segments import SegmentScorer
from cdetr_fast.training.evaluation.shown import Shown, shown_segments
from cdetr_fast.training.run.log import without_nan

_SAVED = ("metrics.json", "images.csv", "detections.json")


@dataclass(frozen=True)
class Scored:
    """Detections on a set, with their figures.

    Attributes:
        index: The truth.
        found: Detections on its images.
        evaluation: Their figures.
        threshold: Lowest score that counts in the confusion and as an error of an image.
        segments: What scored the masks, of a segmentation model.
    """

    index: CocoIndex
    found: Detections
    evaluation: Evaluation
    threshold: float = 0.5
    segments: SegmentScorer | None = None

    @property
    def confusion(self) -> np.ndarray:
        """The sum of `confusion_matrices`, int64 `[K + 1, K + 1]`."""
        return self._counts[0]

    @property
    def errors(self) -> np.ndarray:
        """Objects missed or of another class, and detections of nothing, int64 `[N]`."""
        return self._counts[1]

    @cached_property
    def _counts(self) -> tuple[np.ndarray, np.ndarray]:
        total = np.zeros((len(self.index.classes) + 1,) * 2, dtype=np.int64)
        errors = np.zeros(len(self.index), dtype=np.int64)
        for image, matrix in enumerate(confusion_matrices(self.index, self.found, self.threshold)):
            total += matrix
            errors[image] = matrix.sum() - np.trace(matrix)
        return total, errors

    def shown(self, image: int, threshold: float | None = None) -> Shown:
        """Return what pictures show as found on an image.

        Args:
            image: Index.
            threshold: Lowest score; None is that of the evaluation.
        """
        threshold = self.threshold if threshold is None else threshold
        if self.segments is not None:
            found = self.segments.of_image(image)
            return shown_segments([one for one in found if one.score >= threshold])
        where = self.found.of_image(image)
        kept = self.found.scores[where] >= threshold
        return Shown(
            self.found.boxes_xyxy[where][kept],
            self.found.labels[where][kept],
            self.found.scores[where][kept],
        )

    def worst(self, count: int) -> list[int]:
        """Return the images with most errors, at most `count` and none without."""
        order = np.argsort(-self.errors, kind="stable")[:count]
        return [int(image) for image in order if self.errors[image] > 0]


def write_evaluation(scored: Scored, folder: Path) -> None:
    """Write metrics.json, classes.csv, images.csv and detections.json; `read_saved` reads them.

    Args:
        scored: What was evaluated.
        folder: Made if absent.
    """
    folder.mkdir(parents=True, exist_ok=True)
    evaluation = scored.evaluation
    content = {
        "annotations": str(scored.index.path),
        "images": len(scored.index),
        "not_evaluated": scored.found.failures,
        "stats": without_nan(evaluation.stats),
        "classes": [without_nan(one) for one in evaluation.classes],
    }
    write_json(folder / "metrics.json", content, indent=1, sort_keys=False)
    classes = [list(evaluation.classes[0]), *(one.values() for one in evaluation.classes)]
    write_text(folder / "classes.csv", _csv_text(classes))
    write_text(folder / "images.csv", _csv_text(_image_rows(scored)))
    write_text(folder / "detections.json", _coco_results(scored.index, scored.found))


def _image_rows(scored: Scored) -> list[Sequence[Any]]:
    """Return the head and a row for each image; errors are those at the threshold."""
    index = scored.index
    objects = np.bincount(index.image_of_object()[~index.crowd], minlength=len(index))
    columns = (index.image_ids.tolist(), index.file_names, objects.tolist(), scored.errors.tolist())
    return [("image_id", "file_name", "objects", "errors"), *zip(*columns, strict=True)]


def _coco_results(index: CocoIndex, found: Detections) -> str:
    """Return COCO results as JSON with the ids of the file, without classes that it lacks."""
    categories = index.category_ids[found.labels]
    kept = (categories >= 0) & np.isfinite(found.boxes_xyxy).all(1)
    boxes_xyxy = torch.from_numpy(found.boxes_xyxy[kept]).double()
    columns = (
        index.image_ids[found.images[kept]].tolist(),
        categories[kept].tolist(),
        box_convert(boxes_xyxy, "xyxy", "xywh").round(decimals=3).tolist(),
        found.scores[kept].astype(np.float64).round(6).tolist(),
    )
    rows = [
        {"image_id": image, "category_id": category, "bbox": box, "score": score}
        for image, category, box, score in zip(*columns, strict=True)
    ]
    return json.dumps(rows, separators=(",", ":")) + "\n"


def read_saved(folder: Path, index: CocoIndex, threshold: float) -> Scored:
    """Score on a set what `write_evaluation` wrote for the same images.

    Figures of segments are those that were saved; all others are worked out again.

    Args:
        folder: An evaluation's folder, or a training run's.
        index: The truth.
        threshold: Of the result.

    Raises:
        DataError: As `saved_detections`.
    """
    found, saved = saved_detections(folder, index)
    evaluation = evaluate_detections(index, found)
    evaluation.stats = saved | evaluation.stats
    return Scored(index, found, evaluation, threshold)


def saved_detections(folder: Path, index: CocoIndex) -> tuple[Detections, dict[str, float]]:
    """Return the detections and the figures that `write_evaluation` wrote for the same images.

    Args:
        folder: An evaluation's folder, or a training run's.
        index: The truth.

    Raises:
        DataError: There is no such evaluation, or it was of other images.
    """
    if not (folder / "metrics.json").is_file() and (folder / "evaluation").is_dir():
        folder = folder / "evaluation"
    missing = [name for name in _SAVED if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"against: expected the folder of an evaluation or of a training run, {folder} has no "
            f"{' and no '.join(missing)}; write it by cdetr-fast evaluate --output"
        )
    try:
        stats = read_json(folder / "metrics.json")["stats"]
        rows = json.loads((folder / "detections.json").read_text(encoding="utf-8"))
        with (folder / "images.csv").open(encoding="utf-8", newline="") as stream:
            evaluated = {(int(row["image_id"]), row["file_name"]) for row in csv.DictReader(stream)}
        found = _detections(rows, index)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"against: {folder} is not what cdetr-fast evaluate writes ({error!r})"
        ) from error
    # Ids alone would do for the validation set of a run and a test set: both count from 0.
    ours = set(zip(index.image_ids.tolist(), index.file_names, strict=True))
    if ours - evaluated:
        raise DataError(
            f"against: {folder} was evaluated on other images: it has nothing on "
            f"{len(ours - evaluated)} of {len(index)} images of {index.path}"
        )
    return found, {name: math.nan if value is None else value for name, value in stats.items()}


def _detections(rows: Sequence[dict[str, Any]], index: CocoIndex) -> Detections:
    """Return COCO results as detections on the images and classes of an index."""
    images = {image: i for i, image in enumerate(index.image_ids.tolist())}
    labels = {
        category: i for i, category in enumerate(index.category_ids.tolist()) if category >= 0
    }
    kept = [r for r in rows if r["image_id"] in images and r["category_id"] in labels]
    owners = np.array([images[row["image_id"]] for row in kept], dtype=np.int64)
    boxes_xywh = torch.tensor([row["bbox"] for row in kept], dtype=torch.float32).reshape(-1, 4)
    order = np.argsort(owners, kind="stable")
    return Detections(
        owners[order],
        np.array([labels[row["category_id"]] for row in kept], dtype=np.int64)[order],
        np.array([row["score"] for row in kept], dtype=np.float32)[order],
        box_convert(boxes_xywh, "xywh", "xyxy").numpy()[order],
        failures=[],
        evaluated=np.arange(len(index)),
    )


def _csv_text(rows: Iterable[Iterable[Any]]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerows([_cell(value) for value in row] for row in rows)
    return stream.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4f}"
    return value
