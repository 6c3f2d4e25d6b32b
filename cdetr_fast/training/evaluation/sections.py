"""Content of the report of an evaluation: figures, tables, charts and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from cdetr_fast.reports.charts import COLOURS, Line, line_chart
from cdetr_fast.reports.page import number
from cdetr_fast.reports.pictures import css_colour
from cdetr_fast.training.data.index import CocoIndex
from cdetr_fast.training.evaluation.detection import Evaluation
from cdetr_fast.training.evaluation.scored import Scored

_MOST_CONFUSED = 24  # classes in a confusion matrix
_SIZES = (("small", 0, 32**2), ("medium", 32**2, 96**2), ("large", 96**2, np.inf))
_LOSSES = ("loss", "loss_ce", "loss_bbox", "loss_giou", "loss_mask", "loss_dice")
_FIGURES = {
    "AP": "IoU 0.50-0.95",
    "AP50": "IoU 0.50",
    "AP75": "IoU 0.75",
    "AR100": "100 per image",
    "PQ": "panoptic quality",
    "mask_AP": "of masks",
    "mask_AP50": "of masks",
}


def headline(scored: Scored) -> list[tuple[str, str, str]]:
    """Return names, values and notes of the figures at the top."""
    stats, matrix = scored.evaluation.stats, scored.confusion
    right = int(np.trace(matrix))
    at = f"score from {scored.threshold:.2f}"
    rows = [(k, number(stats[k]), note) for k, note in _FIGURES.items() if k in stats]
    rows += [
        ("precision", _ratio(right, int(matrix[:, :-1].sum())), at),
        ("recall", _ratio(right, int(matrix[:-1].sum())), at),
        ("images", f"{len(scored.index):,}", ""),
        ("objects", f"{int(matrix[:-1].sum()):,}", ""),
    ]
    return rows


def highest_score_below(scored: Scored) -> str | None:
    """Return the highest score if there are detections and none reaches the threshold."""
    highest = scored.found.scores.max(initial=-1.0)
    return number(float(highest), 2) if 0 <= highest < scored.threshold else None


def class_table(scored: Scored) -> dict[str, Any]:
    """Return the columns and rows of the table of classes, and how many have nothing to show."""
    matrix = scored.confusion
    columns = [name for name in scored.evaluation.classes[0] if name not in ("class", "objects")]
    rows = []
    for label, one in enumerate(scored.evaluation.classes):
        right, found = int(matrix[label, label]), int(matrix[:, label].sum())
        if not one["objects"] and not found:
            continue
        rows.append(
            {
                "name": one["class"],
                "colour": css_colour(label),
                "objects": one["objects"],
                "found": found,
                "precision": _ratio(right, found),
                "recall": _ratio(right, int(matrix[label].sum())),
                "figures": [number(one[name]) for name in columns],
                "AP": max(0.0, float(np.nan_to_num(one["AP"]))),
            }
        )
    empty = len(scored.evaluation.classes) - len(rows)
    return {"columns": columns, "rows": rows, "empty": empty}


def size_table(scored: Scored) -> list[dict[str, Any]]:
    """Return COCO's sizes of objects with their numbers, AP and AR."""
    areas = scored.index.areas[~scored.index.crowd]
    stats = scored.evaluation.stats
    return [
        {
            "name": name,
            "objects": int(((areas >= low) & (areas < high)).sum()),
            "AP": number(stats[f"AP_{name}"]),
            "AR": number(stats[f"AR_{name}"]),
            "meter": max(0.0, float(np.nan_to_num(stats[f"AP_{name}"]))),
        }
        for name, low, high in _SIZES
    ]


def precision_chart(evaluation: Evaluation) -> Markup:
    """Draw precision over recall at IoU 0.5: the mean, and the classes with most objects."""
    order = sorted(range(len(evaluation.classes)), key=lambda k: -evaluation.classes[k]["objects"])
    seen = [k for k in order if evaluation.classes[k]["objects"] > 0]
    recall = np.linspace(0, 1, 101).round(2).tolist()

    def line(name: str, values: np.ndarray, style: str = "") -> Line:
        points = list(zip(recall, values.tolist(), strict=True))
        return Line(f"{name} ({values.mean():.2f})", points, style)

    lines = [
        line(evaluation.classes[k]["class"], evaluation.precision[:, k]) for k in seen[:COLOURS]
    ]
    if len(seen) > 1:
        lines.append(line("all classes", evaluation.precision[:, seen].mean(1), "mean"))
    return line_chart(lines, "recall", "precision", (0, 1), (0, 1))


def calibration_chart(scored: Scored) -> Markup:
    """Draw the share of right detections over their score, of ten ranges of scores."""
    counted = scored.evaluation.outcomes >= 0
    scores = scored.found.scores[counted].astype(np.float64)
    right = scored.evaluation.outcomes[counted] == 1
    place = np.minimum((scores * 10).astype(int), 9)
    points: list[tuple[float, float | None]] = []
    for k in np.unique(place).tolist():
        inside = place == k
        points.append((float(scores[inside].mean()), float(right[inside].mean())))
    ideal = Line("ideal", [(0.0, 0.0), (1.0, 1.0)], "ideal")
    lines = [Line("this model", points), ideal] if points else []
    return line_chart(lines, "score", "share that is right", (0, 1), (0, 1))


def confusion_table(scored: Scored) -> dict[str, Any]:
    """Return names and cells (count, share of its row) of the confusion matrix.

    Of many classes those with most errors are shown.
    """
    matrix = scored.confusion
    names = [*scored.index.classes, "nothing"]
    used = np.append((matrix.sum(0) + matrix.sum(1))[:-1] > 0, True)
    chosen = np.flatnonzero(used)
    if len(chosen) > _MOST_CONFUSED + 1:
        wrong = (matrix.sum(0) + matrix.sum(1) - 2 * np.diag(matrix))[:-1]
        worst = np.argsort(-wrong, kind="stable")[:_MOST_CONFUSED]
        chosen = np.append(np.sort(worst), len(names) - 1)
    part = matrix[np.ix_(chosen, chosen)]
    share = part / np.maximum(matrix[chosen].sum(1, keepdims=True), 1)
    return {
        "names": [names[k] for k in chosen],
        "rows": [
            list(zip(counts, shares, strict=True))
            for counts, shares in zip(part.tolist(), share.round(2).tolist(), strict=True)
        ],
        "hidden": int(used.sum()) - len(chosen),
    }


def run_charts(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, Markup]]:
    """Return titles and charts of a run: losses, validation and learning rates by step.

    Args:
        rows: Rows of metrics.jsonl.
    """
    training = [row for row in rows if row["kind"] == "train"]
    evaluations = [row for row in rows if row["kind"] == "eval"]

    def lines(source: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> list[Line]:
        return [
            Line(label, [(row["step"], row.get(name)) for row in source])
            for name, label in names.items()
            if any(name in row for row in source)
        ]

    losses = {name: f"{name[5:]}, last layer" for name in _LOSSES[1:]}
    losses = {"loss": "all layers, weighted"} | losses
    scores = {name: name for name in ("AP", "AP50", "AP75", "PQ", "mask_AP")}
    rates = {"lr_rest": "all but the backbone", "lr_backbone": "backbone"}
    return [
        ("Training loss", line_chart(lines(training, losses), "step", "loss", log=True)),
        ("Validation", line_chart(lines(evaluations, scores), "step", "AP")),
        ("Learning rates", line_chart(lines(training, rates), "step", "learning rate")),
    ]


def classes_by_name(index: CocoIndex) -> dict[int, str]:
    """Return the class names of an index by label."""
    return dict(enumerate(index.classes))


def _ratio(part: int, whole: int) -> str:
    return number(part / whole if whole else None)
