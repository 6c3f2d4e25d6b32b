"""What is written after an evaluation: figures, tables and pictures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cdetr_fast.common.files import write_atomically
from cdetr_fast.training.data.index import CocoIndex
from cdetr_fast.training.evaluation.detection import (
    Detections,
    Evaluation,
    confusion_matrices,
    evaluate_detections,
    predict,
)
from cdetr_fast.training.evaluation.pictures import (
    draw_confusion,
    draw_curves,
    draw_images,
    draw_precision,
)
from cdetr_fast.training.run.log import read_rows

if TYPE_CHECKING:
    from cdetr_fast.training.evaluation.panoptic import PanopticScorer

__all__ = ["draw_run", "draw_samples", "predict", "score_epoch", "write_evaluation"]

_WORST = 8
_TOLD = ("AP", "AP50", "AP75", "PQ")  # on the console, at each evaluation


def score_epoch(
    engine: Any, index: CocoIndex, found: Detections, panoptic: PanopticScorer | None
) -> Evaluation:
    """Scores the detections of an epoch and logs the figures.

    Args:
        engine: The run.
        index: The validation set, as far as it could be read.
        found: Detections on it.
        panoptic: What scored the segments, if there are any.
    """
    evaluation = evaluate_detections(index, found, panoptic)
    if found.failures:
        print(f"{found.described_failures()}\nthey are left out of the figures")
    figures = [f"{name} {evaluation.stats[name]:.3f}" for name in _TOLD if name in evaluation.stats]
    engine.log.tell(f"epoch {engine.epoch}: {', '.join(figures)}")
    engine.log.write("eval", engine.step, {"epoch": engine.epoch} | plain(evaluation.stats))
    return evaluation


def draw_samples(engine: Any, index: CocoIndex, found: Detections) -> None:
    """Draws some validation images with what was found in this epoch."""
    count = min(engine.config.sample_pictures, len(index))
    if count:
        chosen = np.linspace(0, len(index) - 1, count).round().astype(int).tolist()
        path = engine.folder / "samples" / f"epoch_{engine.epoch:04d}.jpg"
        draw_images(index, found, chosen, path, threshold=0.3)


def draw_run(folder: Path) -> None:
    """Draws curves.png of a run's metrics.jsonl."""
    draw_curves(read_rows(folder / "metrics.jsonl"), folder / "curves.png")


def write_evaluation(
    index: CocoIndex,
    found: Detections,
    evaluation: Evaluation,
    folder: Path,
    threshold: float = 0.5,
) -> None:
    """Writes metrics.json, classes.csv, pr_curves.png, confusion.png and worst.jpg.

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
        "stats": plain(evaluation.stats),
        "classes": [plain(one) for one in evaluation.classes],
    }
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(folder / "metrics.json", lambda path: path.write_text(text, "utf-8"))
    rows = [list(evaluation.classes[0]), *(one.values() for one in evaluation.classes)]
    table = "".join(",".join(_cell(value) for value in row) + "\n" for row in rows)
    write_atomically(folder / "classes.csv", lambda path: path.write_text(table, "utf-8"))
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


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Returns values that JSON has: NaN becomes None."""
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4f}"
    text = str(value)
    return '"' + text.replace('"', '""') + '"' if set(text) & set(',"\n') else text
