"""Pictures of a run: curves, precision over recall, confusion matrix, samples and worst images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cdetr_fast.common.files import write_atomically
from cdetr_fast.images.draw import contact_sheet, draw_detections
from cdetr_fast.training.data.dataset import read_image
from cdetr_fast.training.data.index import CocoIndex
from cdetr_fast.training.errors import DataError
from cdetr_fast.training.evaluation.detection import Detections, Evaluation, true_boxes

logger = logging.getLogger(__name__)

_SHEET_EDGE = 480  # pixels of a picture's longest edge on a sheet
_MOST_CLASSES = 12  # lines, or rows with a name, that a picture can hold


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # pyplot has global state

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))


def draw_curves(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw losses, AP and learning rates over the steps of a run.

    Args:
        rows: Rows of metrics.jsonl.
        path: PNG file.
    """
    training = [row for row in rows if row["kind"] == "train" and "loss" in row]
    evaluations = [row for row in rows if row["kind"] == "eval"]
    figure = _figure(13, 3.8)
    loss_axes, ap_axes, rate_axes = figure.subplots(1, 3)
    steps = [row["step"] for row in training]
    for name in ("loss", "loss_ce", "loss_bbox", "loss_giou", "loss_mask", "loss_dice"):
        if training and name in training[0]:
            label = "all layers, weighted" if name == "loss" else f"{name[5:]}, last layer"
            loss_axes.plot(steps, [row.get(name) for row in training], label=label)
    loss_axes.set_yscale("log")
    loss_axes.set(title="training loss", xlabel="step")
    for name in ("AP", "AP50", "AP75", "PQ", "mask_AP"):
        if evaluations and name in evaluations[0]:
            points = [(row["step"], row[name]) for row in evaluations]
            ap_axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    ap_axes.set(title="validation", xlabel="step", ylim=(0, None))
    for name in ("lr_rest", "lr_backbone"):
        if training and name in training[0]:
            rate_axes.plot(steps, [row[name] for row in training], label=name[3:])
    rate_axes.set(title="learning rate", xlabel="step")
    for axes in (loss_axes, ap_axes, rate_axes):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    _save(figure, path)


def draw_precision(evaluation: Evaluation, path: Path) -> None:
    """Draw precision over recall at IoU 0.5: the mean, and the classes with most objects."""
    figure = _figure(7.4, 4.8)
    axes = figure.subplots()
    recall = np.linspace(0, 1, 101)
    order = sorted(range(len(evaluation.classes)), key=lambda k: -evaluation.classes[k]["objects"])
    seen = [k for k in order if evaluation.classes[k]["objects"] > 0]
    for k in seen[:_MOST_CLASSES]:
        one = evaluation.classes[k]
        label = f"{one['class']} ({one['AP50']:.2f})"
        axes.plot(recall, evaluation.precision[:, k], linewidth=1, label=label)
    if seen:
        mean = evaluation.precision[:, seen].mean(1)
        axes.plot(recall, mean, "k", linewidth=2, label=f"all classes ({mean.mean():.2f})")
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    axes.set(title="precision at IoU 0.5 (AP50)", xlabel="recall", ylabel="precision")
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    _save(figure, path)


def draw_confusion(
    matrix: np.ndarray, classes: Sequence[str], threshold: float, path: Path
) -> None:
    """Draw a confusion matrix; of many classes only the most confused.

    Args:
        matrix: `[K + 1, K + 1]`, the last row and column stand for "nothing".
        classes: K names.
        threshold: Lowest score that counted, for the title.
        path: PNG file.
    """
    names = [*classes, "nothing"]
    chosen = np.arange(len(names))
    if len(names) > 2 * _MOST_CLASSES:
        wrong = matrix.sum(0) + matrix.sum(1) - 2 * np.diag(matrix)
        worst = np.argsort(-wrong[:-1], kind="stable")[: 2 * _MOST_CLASSES - 1]
        chosen = np.append(np.sort(worst), len(classes))
    part = matrix[np.ix_(chosen, chosen)]
    share = part / np.maximum(part.sum(1, keepdims=True), 1)
    side = max(4.5, 0.42 * len(chosen) + 2)
    figure = _figure(side + 1, side)
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for i, j in np.argwhere(part > 0):
        ink = "white" if share[i, j] > 0.6 else "black"
        axes.text(j, i, int(part[i, j]), ha="center", va="center", color=ink, fontsize=8)
    labels = [names[k] for k in chosen]
    axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set(title=f"scores from {threshold:.2f}, IoU from 0.5", xlabel="found", ylabel="is")
    _save(figure, path)


def draw_images(
    index: CocoIndex,
    detections: Detections,
    images: Sequence[int],
    path: Path,
    threshold: float = 0.5,
) -> None:
    """Draw images twice side by side: truth on the left, detections on the right.

    Args:
        index: The truth.
        detections: Detections on its images.
        images: Indices of the images to draw.
        path: JPEG or PNG file.
        threshold: Lowest score that is drawn.
    """
    names = dict(enumerate(index.classes))
    pairs = []
    for image in images:
        try:
            pixels = read_image(index, image)
        except DataError as error:  # it could be read when it was evaluated
            logger.warning("not drawn: %s", error)
            continue
        picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        zoom = _SHEET_EDGE / max(picture.size)
        picture = picture.resize([max(1, round(side * zoom)) for side in picture.size])
        boxes, labels = true_boxes(index, image)
        where = detections.of_image(image)
        kept = detections.scores[where] >= threshold
        left = draw_detections(picture, boxes * zoom, labels, None, names)
        right = draw_detections(
            picture,
            detections.boxes_xyxy[where][kept] * zoom,
            detections.labels[where][kept],
            detections.scores[where][kept],
            names,
        )
        pairs.append(contact_sheet([left, right], 2, gap=4))
    if not pairs:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet = contact_sheet(pairs, 2)
    write_atomically(path, lambda temporary: sheet.save(temporary, quality=88))
