"""Files of an evaluation: figures, tables and pictures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from cdetr_fast.common.files import write_json, write_text
from cdetr_fast.training.data.index import CocoIndex
from cdetr_fast.training.evaluation.detection import Detections, Evaluation, confusion_matrices
from cdetr_fast.training.evaluation.pictures import draw_confusion, draw_images, draw_precision
from cdetr_fast.training.run.log import without_nan

_WORST = 8


def draw_samples(path: Path, index: CocoIndex, found: Detections, count: int) -> None:
    """Draw up to `count` validation images, evenly spread, with their detections."""
    count = min(count, len(index))
    if count:
        chosen = np.linspace(0, len(index) - 1, count).round().astype(int).tolist()
        draw_images(index, found, chosen, path, threshold=0.3)


def write_evaluation(
    index: CocoIndex,
    found: Detections,
    evaluation: Evaluation,
    folder: Path,
    threshold: float = 0.5,
) -> None:
    """Write metrics.json, classes.csv, pr_curves.png, confusion.png and worst.jpg.

    Args:
        index: The truth.
        found: Detections on its images.
        evaluation: Their figures.
        folder: Made if absent.
        threshold: Lowest score that counts in the confusion and among the worst images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "annotations": str(index.path),
        "images": len(index),
        "not_evaluated": found.failures,
        "stats": without_nan(evaluation.stats),
        "classes": [without_nan(one) for one in evaluation.classes],
    }
    write_json(folder / "metrics.json", content, indent=1, sort_keys=False)
    rows = [list(evaluation.classes[0]), *(one.values() for one in evaluation.classes)]
    table = "".join(",".join(_cell(value) for value in row) + "\n" for row in rows)
    write_text(folder / "classes.csv", table)
    draw_precision(evaluation, folder / "pr_curves.png")
    total = np.zeros((len(index.classes) + 1,) * 2, dtype=np.int64)
    errors = np.zeros(len(index), dtype=np.int64)
    for image, matrix in enumerate(confusion_matrices(index, found, threshold)):
        total += matrix
        errors[image] = matrix.sum() - np.trace(matrix)
    draw_confusion(total, index.classes, threshold, folder / "confusion.png")
    worst = [int(i) for i in np.argsort(-errors, kind="stable")[:_WORST] if errors[i] > 0]
    if worst:
        draw_images(index, found, worst, folder / "worst.jpg", threshold)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4f}"
    text = str(value)
    return '"' + text.replace('"', '""') + '"' if set(text) & set(',"\n') else text
