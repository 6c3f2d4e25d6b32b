"""Objects of an image as pictures show them: labels, or what was found."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from cdetr_fast.images.coco import object_mask
from cdetr_fast.training.data.dataset import read_image, read_segments
from cdetr_fast.training.data.index import CocoIndex
from cdetr_fast.training.errors import DataError
from cdetr_fast.training.evaluation.detection import true_boxes
from cdetr_fast.training.evaluation.panoptic import FoundSegment

logger = logging.getLogger(__name__)


class Shown(NamedTuple):
    """Objects of an image.

    Attributes:
        boxes_xyxy: fp32 `[n, 4]`, pixels.
        labels: int64 `[n]`.
        scores: fp32 `[n]`; None for labels.
        mask_of: Returns the mask of an object, bool `[H, W]`; None where there are boxes alone.
    """

    boxes_xyxy: np.ndarray
    labels: np.ndarray
    scores: np.ndarray | None
    mask_of: Callable[[int], np.ndarray] | None = None


def shown_labels(index: CocoIndex, image: int) -> Shown:
    """Return the labels of an image, without crowds.

    Raises:
        DataError: The file of the masks cannot be read.
    """
    boxes_xyxy, labels = true_boxes(index, image)
    where = index.objects(image)
    items = np.arange(where.start, where.stop)[~index.crowd[where]].tolist()
    mask_of = None
    if index.masks is not None:
        height, width = index.sizes_hw[image].tolist()
        owner = read_segments(index, image, (height, width)).numpy()
        mask_of = lambda i: owner == index.object_ids[items[i]]  # noqa: E731
    elif index.segmentation_text is not None:
        mask_of = lambda i: index.mask(items[i], image).numpy()  # noqa: E731
    return Shown(boxes_xyxy, labels, None, mask_of)


def labelled_pictures(
    index: CocoIndex, images: Sequence[int]
) -> Iterator[tuple[int, Image.Image, Shown]]:
    """Yield images that can still be read, with their pictures and labels; warn of others."""
    for image in images:
        try:
            pixels, labels = read_image(index, image), shown_labels(index, image)
        except DataError as error:  # it could be read when it was evaluated
            logger.warning("not drawn: %s", error)
            continue
        yield image, Image.fromarray(pixels.permute(1, 2, 0).numpy()), labels


def shown_segments(found: Sequence[FoundSegment]) -> Shown:
    """Return segments that were found."""

    def mask_of(i: int) -> np.ndarray:
        code: dict[str, Any] = found[i].run_lengths
        height, width = code["size"]
        return object_mask(code, (height, width)).numpy()

    return Shown(
        np.array([one.box_xyxy for one in found], dtype=np.float32).reshape(-1, 4),
        np.array([one.label for one in found], dtype=np.int64),
        np.array([one.score for one in found], dtype=np.float32),
        mask_of,
    )
