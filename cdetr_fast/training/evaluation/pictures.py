"""Pictures of a run: validation images with the truth beside what was found."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from cdetr_fast.common.files import write_atomically
from cdetr_fast.images.draw import contact_sheet, draw_detections
from cdetr_fast.training.data.dataset import read_image
from cdetr_fast.training.data.index import CocoIndex
from cdetr_fast.training.errors import DataError
from cdetr_fast.training.evaluation.detection import Detections, true_boxes

logger = logging.getLogger(__name__)

_SHEET_EDGE = 480  # pixels of a picture's longest edge on a sheet


def draw_samples(path: Path, index: CocoIndex, found: Detections, count: int) -> None:
    """Draw up to `count` validation images, evenly spread, with their detections."""
    count = min(count, len(index))
    if count:
        chosen = np.linspace(0, len(index) - 1, count).round().astype(int).tolist()
        draw_images(index, found, chosen, path, threshold=0.3)


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
