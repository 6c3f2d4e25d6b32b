"""Pictures of a run: validation images with the truth beside what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from cdetr_fast.common.files import write_atomically
from cdetr_fast.images.draw import contact_sheet, draw_detections, draw_masks
from cdetr_fast.training.evaluation.scored import Scored
from cdetr_fast.training.evaluation.shown import Shown, labelled_pictures

_SHEET_EDGE = 480  # pixels of a picture's longest edge on a sheet
_LOWEST_SCORE = 0.3


def draw_samples(path: Path, scored: Scored, count: int) -> None:
    """Draw up to `count` validation images, evenly spread, with their detections or segments."""
    count = min(count, len(scored.index))
    if count:
        chosen = np.linspace(0, len(scored.index) - 1, count).round().astype(int).tolist()
        draw_images(scored, chosen, path, threshold=_LOWEST_SCORE)


def draw_images(
    scored: Scored, images: Sequence[int], path: Path, threshold: float | None = None
) -> None:
    """Draw images twice side by side: truth on the left, what was found on the right.

    Args:
        scored: The truth, and what was found.
        images: Indices of the images to draw.
        path: JPEG or PNG file.
        threshold: Lowest score that is drawn; None is that of the evaluation.
    """
    names = dict(enumerate(scored.index.classes))
    pairs = []
    for image, picture, labels in labelled_pictures(scored.index, images):
        sides = [_drawn(picture, one, names) for one in (labels, scored.shown(image, threshold))]
        pairs.append(contact_sheet(sides, 2, gap=4))
    if not pairs:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet = contact_sheet(pairs, 2)
    write_atomically(path, lambda temporary: sheet.save(temporary, quality=88))


def _drawn(picture: Image.Image, shown: Shown, names: Mapping[int, str]) -> Image.Image:
    """Return a picture of the sheet's size with the masks of objects, or else their boxes."""
    zoom = _SHEET_EDGE / max(picture.size)
    size = max(1, round(picture.width * zoom)), max(1, round(picture.height * zoom))
    picture = picture.resize(size)
    if shown.mask_of is None:
        return draw_detections(picture, shown.boxes_xyxy * zoom, shown.labels, shown.scores, names)
    order = range(len(shown.labels)) if shown.scores is None else np.argsort(shown.scores).tolist()
    owner = np.zeros((picture.height, picture.width), np.int32)
    infos = []
    for i in order:  # the highest score last, which is on top
        mask = Image.fromarray(shown.mask_of(i)).resize(size, Image.Resampling.NEAREST)
        owner[np.asarray(mask)] = i + 1
        info = {"id": i + 1, "label_id": int(shown.labels[i])}
        infos.append(info if shown.scores is None else info | {"score": float(shown.scores[i])})
    return draw_masks(picture, owner, infos, names)
