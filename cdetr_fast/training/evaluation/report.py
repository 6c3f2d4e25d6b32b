"""report.html of an evaluation or a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import cdetr_fast
from cdetr_fast.common.files import write_text
from cdetr_fast.reports.page import describe_environment, describe_settings, render
from cdetr_fast.reports.pictures import boxes_over, embed
from cdetr_fast.training.data.index import CocoIndex
from cdetr_fast.training.data.label_checks import LabelReport
from cdetr_fast.training.data.shards import ShardSet
from cdetr_fast.training.evaluation import sections
from cdetr_fast.training.evaluation.comparison import changed_images, compare
from cdetr_fast.training.evaluation.labels import label_section
from cdetr_fast.training.evaluation.scored import Scored
from cdetr_fast.training.evaluation.shown import labelled_pictures

_WORST = 8
_CHANGED = 5  # images that got better, and as many that got worse
_EDGE = 480  # pixels of a picture's longest edge
_BYTES_OF_PICTURES = 6_000_000


@dataclass(frozen=True)
class Report:
    """Content of a report.

    Attributes:
        title: Heading.
        settings: Names and values.
        device: What the model ran on.
        labels: Heading, set and findings of each set whose labels are described.
        scored: The evaluation, if there was one.
        rows: Rows of metrics.jsonl, of a training run.
        against: Name and content of the evaluation to compare with.
    """

    title: str
    settings: Mapping[str, Any]
    device: torch.device
    labels: Sequence[tuple[str, CocoIndex | ShardSet, LabelReport]]
    scored: Scored | None = None
    rows: Sequence[Mapping[str, Any]] = field(default_factory=list)
    against: tuple[str, Scored] | None = None


def write_report(report: Report, path: Path) -> None:
    """Write a page that needs neither a server nor a network.

    Args:
        report: Content.
        path: HTML file; its folder is made if absent.
    """
    environment = describe_environment(report.device, cdetr_fast.__version__)
    content: dict[str, Any] = {
        "title": report.title,
        "version": cdetr_fast.__version__,
        "date": dict(environment)["date"],
        "curves": sections.run_charts(report.rows) if report.rows else [],
        "evaluation": None,
        "comparison": None,
        "labels": [label_section(*one) for one in report.labels],
        "settings": describe_settings(dict(report.settings)),
        "environment": environment,
    }
    pictures = _Pictures()
    if (scored := report.scored) is not None:
        if report.against is not None:
            name, other = report.against
            better, worse = changed_images(scored, other, _CHANGED)
            content["comparison"] = compare(scored, other) | {
                "other": name,
                "better_images": pictures.of(scored, better, other),
                "worse_images": pictures.of(scored, worse, other),
            }
        content["evaluation"] = {
            "path": str(scored.index.path),
            "threshold": scored.threshold,
            "failures": scored.found.failures,
            "nothing_from": sections.highest_score_below(scored),
            "figures": sections.headline(scored),
            "classes": sections.class_table(scored),
            "sizes": sections.size_table(scored),
            "precision": sections.precision_chart(scored.evaluation),
            "calibration": sections.calibration_chart(scored),
            "confusion": sections.confusion_table(scored),
            "worst": pictures.of(scored, scored.worst(_WORST)),
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, render("evaluation.html", **content))


class _Pictures:
    """Images of a set with boxes, for a page that stays small."""

    def __init__(self) -> None:
        self.bytes = 0
        self.count = 0

    def of(
        self, scored: Scored, images: Sequence[int], other: Scored | None = None
    ) -> list[dict[str, Any]]:
        """Return images with labels and detections side by side, until the page is full.

        Args:
            scored: Their truth and detections.
            images: Indices.
            other: Detections on the same images to show in between.
        """
        shown = []
        names = sections.classes_by_name(scored.index)
        for image, pixels, labels in labelled_pictures(scored.index, images):
            if self.bytes > _BYTES_OF_PICTURES:
                break
            picture = embed(pixels, _EDGE)
            self.bytes += len(picture.uri)
            self.count += 1
            columns = [
                (title, boxes_over(picture, *one[:3], names, one.mask_of))
                for title, one in (
                    ("labels", labels),
                    ("before", None if other is None else other.shown(image)),
                    ("found", scored.shown(image)),
                )
                if one is not None
            ]
            drawn = [box.mask for _, column in columns for box in column if box.mask is not None]
            self.bytes += sum(len(mask.uri) for mask in drawn)
            before = None if other is None else int(other.errors[image])
            shown.append(
                {
                    "key": f"image-{self.count}",
                    "name": scored.index.file_names[image],
                    "id": int(scored.index.image_ids[image]),
                    "errors": int(scored.errors[image]),
                    "before": before,
                    "picture": picture,
                    "columns": columns,
                }
            )
        return shown
