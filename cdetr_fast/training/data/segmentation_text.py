"""Segmentations of a set's objects as one array of text, which worker processes share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from cdetr_fast.images.coco import segmentation_parts

NO_SEGMENTATION, BAD_SEGMENTATION = (0, 0), (-1, -1)
"""Spans of objects without one, and of those whose segmentation is no mask of the image."""


class SegmentationText:
    """The JSON text of segmentations, one after the other.

    Args:
        sizes_hw: Height and width of each image.
    """

    def __init__(self, sizes_hw: Sequence[tuple[int, int]]) -> None:
        self.sizes_hw = sizes_hw
        self._text = bytearray()

    def add(self, segmentation: Any, image: int) -> tuple[int, int]:
        """Add the segmentation of an object; return where it starts and ends."""
        if segmentation is None or segmentation == []:
            return NO_SEGMENTATION
        try:
            segmentation_parts(segmentation, self.sizes_hw[image])
        except ValueError:
            return BAD_SEGMENTATION
        start = len(self._text)
        self._text += json.dumps(segmentation).encode()
        return start, len(self._text)

    def array(self) -> np.ndarray:
        """Return the whole text, uint8."""
        return np.frombuffer(bytes(self._text), dtype=np.uint8)
