"""Checks of a set's labels before the first step: a bad label can hide behind a loss for hours."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cdetr_fast.common import progress
from cdetr_fast.training.data.index import CocoIndex
from cdetr_fast.training.data.records import NO_ID
from cdetr_fast.training.errors import DataError

_OVERSHOOT = 1.0  # pixels; annotation tools round
_SHOWN = 3


@dataclass
class LabelReport:
    """Findings in an annotation file.

    Attributes:
        path: The file.
        counts: Numbers of images and objects, and of objects per class if there are few classes.
        bad: Kind of defect -> ids of the images or annotations with it, which cannot be used.
        notes: Kind of oddity -> ids, which can be trained on.
    """

    path: Path
    counts: dict[str, int] = field(default_factory=dict)
    bad: dict[str, list[Any]] = field(default_factory=dict)
    notes: dict[str, list[Any]] = field(default_factory=dict)

    def compare_with_queries(self, index: CocoIndex, num_queries: int) -> None:
        """Note the images of the set that have more objects than the model has queries."""
        fuller = _objects_of_images(index) > num_queries
        if fuller.any():
            kind = f"images with more objects than the model's {num_queries} queries, ids"
            self.notes[kind] = index.image_ids[fuller].tolist()

    def lines(self) -> list[str]:
        """Return the report as text, one line per finding."""
        summary = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        found = [f"{self.path}: {summary}"]
        for heading, kinds in (("bad", self.bad), ("note", self.notes)):
            for kind, ids in kinds.items():
                more = ", ..." if len(ids) > _SHOWN else ""
                found.append(
                    f"  {heading}: {len(ids)} {kind} ({', '.join(map(str, ids[:_SHOWN]))}{more})"
                )
        return found


def check_labels(index: CocoIndex, bad_labels: str = "stop") -> tuple[CocoIndex, LabelReport]:
    """Find labels that cannot be right.

    Args:
        index: The set.
        bad_labels: "stop" raises an error for them; "drop" drops them, and images without a file or
            without the file of their masks.

    Returns:
        The remaining index, and the report.

    Raises:
        DataError: There are bad labels and `bad_labels` is "stop", or nothing remains.
    """
    owner = index.image_of_object()
    height, width = index.sizes_hw[owner].T.astype(np.float64)
    left, top, box_width, box_height = index.boxes_xywh.T
    right, bottom = left + box_width, top + box_height
    finite = np.isfinite(index.boxes_xywh).all(1)
    inverted = finite & ((box_width < 0) | (box_height < 0))
    flat = finite & ~inverted & ((box_width == 0) | (box_height == 0))
    outside = (
        finite
        & ~inverted
        & ~flat
        & ((right <= 0) | (bottom <= 0) | (left >= width) | (top >= height))
    )
    defects = {
        "annotations of a category that the file does not list": index.labels < 0,
        "boxes that are not finite": ~finite,
        "boxes of negative width or height": inverted,
        "boxes of zero area": flat,
        "boxes outside of their image": outside,
        "annotations with an id that came before": _repeated(index),
    }
    spans = index.segmentation_spans
    if index.segmentation_text is not None:
        defects["objects without a segmentation"] = (spans == 0).all(1) & ~index.crowd
        defects[
            "segmentations that are neither polygons of three points or more nor run lengths of "
            "their image"
        ] = (spans < 0).all(1)
    with progress.task("looking for the images"):
        present = np.array([os.path.isfile(index.image_path(i)) for i in range(len(index))])
        paths = map(index.mask_path, range(len(index)))
        masked = np.array([path is None or os.path.isfile(path) for path in paths])
    sized = (index.sizes_hw > 0).all(1)

    report = LabelReport(index.path)
    for kind, bad in defects.items():
        if bad.any():
            report.bad[f"{kind}, annotation ids"] = _names(index, bad)
    if index.unassigned:
        report.bad["annotations of images that the file does not list, ids"] = index.unassigned
    for kind, usable in (
        (f"images without a file in {index.images}, ids", present),
        (f"images without a panoptic PNG file in {index.masks}, ids", masked),
        ("images without a size, ids", sized),
    ):
        if not usable.all():
            report.bad[kind] = index.image_ids[~usable].tolist()

    bad_object = np.logical_or.reduce(list(defects.values()))
    over = np.maximum.reduce([-left, -top, right - width, bottom - height])
    overshoot = ~bad_object & (over > _OVERSHOOT)
    counts = _objects_of_images(index)
    ids = np.sort(index.category_ids[index.category_ids >= 0])
    before_gaps = ids[:-1][np.diff(ids) > 1]
    without = "images without objects"
    if not counts.any():
        without += ", which is all of them: this set can neither be trained on nor measure AP"
    for kind, found in (
        ("boxes that extend beyond their image and are clipped, ids", index.object_ids[overshoot]),
        ("crowds, not trained on, ids", index.object_ids[index.crowd]),
        (f"{without}, ids", index.image_ids[counts == 0]),
        ("gaps in the category ids, after ids", before_gaps),
    ):
        if len(found):
            report.notes[kind] = found.tolist()
    per_class = np.bincount(index.labels[index.labels >= 0], minlength=len(index.classes))
    names = [f"of {name!r}" for name in index.classes]
    report.counts = {"images": len(index), "objects": len(owner)}
    if len(names) <= 20:
        report.counts |= dict(zip(names, per_class.tolist(), strict=True))
    unseen = [name for name, count in zip(index.classes, per_class, strict=True) if count == 0]
    if unseen:
        report.notes["classes without objects"] = unseen

    if report.bad and bad_labels == "stop":
        raise DataError(
            "\n".join(report.lines())
            + "\ncorrect the file, or drop these by --bad-labels drop (bad_labels: drop)"
        )
    kept = index.select(present & masked & sized, ~bad_object)
    if len(kept) == 0:
        raise DataError("\n".join(report.lines()) + "\nnothing remains to train on")
    return kept, report


def _objects_of_images(index: CocoIndex) -> np.ndarray:
    """Return the number of objects in each image without crowds, int64 `[N]`."""
    return np.bincount(index.image_of_object()[~index.crowd], minlength=len(index))


def _repeated(index: CocoIndex) -> np.ndarray:
    """Return which objects repeat an earlier id (segments: within their image), bool `[M]`."""
    owner = index.image_of_object() if index.masks is not None else np.zeros(index.num_objects)
    order = np.lexsort((index.object_ids, owner))  # stable: the first one of equals comes first
    ids, owner = index.object_ids[order], owner[order]
    again = np.zeros(index.num_objects, dtype=bool)
    again[order[1:]] = (ids[1:] == ids[:-1]) & (owner[1:] == owner[:-1]) & (ids[1:] != NO_ID)
    return again


def _names(index: CocoIndex, objects: np.ndarray) -> list[int | str]:
    """Return the ids of objects; for those without an id, the id of their image.

    Where segmentations were read, both.
    """
    images = index.image_ids[index.image_of_object()[objects]].tolist()
    ids = index.object_ids[objects].tolist()
    both = index.segmentation_text is not None
    return [
        f"one of image {image}"
        if number == NO_ID
        else f"{number} of image {image}" * both or number
        for number, image in zip(ids, images, strict=True)
    ]
