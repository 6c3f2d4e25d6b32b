"""Labels checked before the first step, since a bad one can hide for hours behind a loss."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cdetr_fast.training.data.index import CocoIndex
from cdetr_fast.training.data.records import NO_ID
from cdetr_fast.training.errors import DataError

_OVERSHOOT = 1.0  # pixels; annotation tools round
_SHOWN = 3


@dataclass
class LabelReport:
    """What was found in an annotation file.

    Attributes:
        path: The file.
        counts: Images, objects, images without objects, and objects of each class.
        bad: Kind of defect -> ids of what has it; these cannot be trained on.
        notes: Kind of oddity -> ids; these are fine to train on.
    """

    path: Path
    counts: dict[str, int] = field(default_factory=dict)
    bad: dict[str, list[Any]] = field(default_factory=dict)
    notes: dict[str, list[Any]] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Returns the report as text, one finding a line."""
        summary = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        found = [f"{self.path}: {summary}"]
        for heading, kinds in (("bad", self.bad), ("note", self.notes)):
            for kind, ids in kinds.items():
                more = ", ..." if len(ids) > _SHOWN else ""
                found.append(
                    f"  {heading}: {len(ids)} {kind} ({', '.join(map(str, ids[:_SHOWN]))}{more})"
                )
        return found


def check_labels(
    index: CocoIndex, bad_labels: str = "stop", num_queries: int | None = None
) -> tuple[CocoIndex, LabelReport]:
    """Looks for labels that cannot be right.

    Args:
        index: The annotation file.
        bad_labels: "stop" raises for them; "drop" leaves them out, and with them images without a
            file.
        num_queries: Of the model; images with more objects are noted.

    Returns:
        The index that is left, and the report.

    Raises:
        DataError: There are bad labels and `bad_labels` is "stop", or nothing is left.
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
    present = np.array([os.path.isfile(index.image_path(i)) for i in range(len(index))])
    sized = (index.sizes_hw > 0).all(1)

    report = LabelReport(index.path)
    for kind, bad in defects.items():
        if bad.any():
            report.bad[f"{kind}, annotation ids"] = _names(index, bad)
    if index.unassigned:
        report.bad["annotations of images that the file does not list, ids"] = index.unassigned
    if not present.all():
        report.bad[f"images without a file in {index.images}, ids"] = index.image_ids[
            ~present
        ].tolist()
    if not sized.all():
        report.bad["images without a size, ids"] = index.image_ids[~sized].tolist()

    bad_object = np.logical_or.reduce(list(defects.values()))
    over = np.maximum.reduce([-left, -top, right - width, bottom - height])
    overshoot = ~bad_object & (over > _OVERSHOOT)
    counts = np.bincount(owner[~index.crowd], minlength=len(index))
    ids = np.sort(index.category_ids[index.category_ids >= 0])
    before_gaps = ids[:-1][np.diff(ids) > 1]
    without = "images without objects"
    if not counts.any():
        without += ", which is all of them: AP cannot be measured on this set, nor objects learnt"
    for kind, found in (
        ("boxes that reach out of their image and are clipped, ids", index.object_ids[overshoot]),
        ("crowds, not trained on, ids", index.object_ids[index.crowd]),
        (f"{without}, ids", index.image_ids[counts == 0]),
        ("gaps in the category ids, after ids", before_gaps),
    ):
        if len(found):
            report.notes[kind] = found.tolist()
    if num_queries is not None and (counts > num_queries).any():
        kind = f"images with more objects than the model's {num_queries} queries, ids"
        report.notes[kind] = index.image_ids[counts > num_queries].tolist()
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
            + "\ncorrect the file, or leave these out by --bad-labels drop (bad_labels: drop)"
        )
    kept = index.select(present & sized, ~bad_object)
    if len(kept) == 0:
        raise DataError("\n".join(report.lines()) + "\nnothing is left to train on")
    return kept, report


def _repeated(index: CocoIndex) -> np.ndarray:
    """Which objects have the id of an earlier one, bool `[M]`; segments, of one of their image."""
    owner = index.image_of_object() if index.masks is not None else np.zeros(index.num_objects)
    order = np.lexsort((index.object_ids, owner))  # stable: the first one of equals comes first
    ids, owner = index.object_ids[order], owner[order]
    again = np.zeros(index.num_objects, dtype=bool)
    again[order[1:]] = (ids[1:] == ids[:-1]) & (owner[1:] == owner[:-1]) & (ids[1:] != NO_ID)
    return again


def _names(index: CocoIndex, objects: np.ndarray) -> list[int | str]:
    """Returns the ids of objects; of those that have none, that of their image."""
    images = index.image_ids[index.image_of_object()[objects]].tolist()
    ids = index.object_ids[objects].tolist()
    return [
        f"one of image {image}" if number == NO_ID else number
        for number, image in zip(ids, images, strict=True)
    ]
