"""Comparison of detections: those of one image are matched by class and place, then compared."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_iou

from benchmarks.case import GateFailed
from cdetr_fast.images.results import DetectionResult

ERRORS = ("lost", "share without match", "max score error", "max box error, px")
LIMITS = dict(zip(ERRORS, (0.0, 0.1, 1e-3, 0.5), strict=True))
"""Largest errors of the same model in fp32."""

_OVERLAP = 0.5
"""Least intersection over union of two boxes of one object."""
_MARGIN = 1e-3
"""Detections whose scores are this close to the lowest that is returned may be returned or not."""


class Found(NamedTuple):
    """Detections of an image.

    Attributes:
        scores: `[T]`, in falling order.
        labels: `[T]`.
        boxes_xyxy: `[T, 4]` in pixels.
    """

    scores: Tensor
    labels: Tensor
    boxes_xyxy: Tensor

    @classmethod
    def of(cls, found: Any) -> "Found":
        """Return what transformers' post-processing or `predict` found."""
        if isinstance(found, DetectionResult):
            return cls(found.scores, found.labels, found.boxes_xyxy)
        return cls(found["scores"], found["labels"], found["boxes"])


def detection_errors(
    got: Iterable[Any], expected: Iterable[Any], threshold: float = 0.0, most: int = 100
) -> dict[str, float]:
    """Compare detections of images, as transformers' post-processing or `predict` returns them.

    Args:
        got: Of each image.
        expected: Of the same images.
        threshold: All detections with a score above it are there,
        most: but not more of an image than this.

    Returns:
        "lost", the number of detections without a match on the other side, although their scores
        are clear of threshold and number; the share of all detections without one; the largest
        errors of those with one.

    Raises:
        GateFailed: There are no detections to compare, or not of the same images.
    """
    pairs = [(Found.of(a), Found.of(b)) for a, b in zip(got, expected, strict=True)]
    places = [_pairs(a, b) for a, b in pairs]
    count = sum(len(a.scores) + len(b.scores) for a, b in pairs)
    if not count:
        raise GateFailed("no detections to compare, choose a lower threshold")
    lost, scores, boxes = 0, [0.0], [0.0]
    for (a, b), (i, j) in zip(pairs, (x.T for x in places), strict=True):
        for one, other, matched in ((a, b, i), (b, a, j)):
            certain = one.scores > _lowest(other, threshold, most) + _MARGIN
            certain[matched] = False
            lost += int(certain.sum())
        scores += (a.scores[i] - b.scores[j]).abs().tolist()
        boxes += (a.boxes_xyxy[i] - b.boxes_xyxy[j]).abs().flatten().tolist()
    share = 1 - 2 * sum(map(len, places)) / count
    return dict(zip(ERRORS, (float(lost), share, max(scores), max(boxes)), strict=True))


def _lowest(found: Found, threshold: float, most: int) -> float:
    """Return the score above which all detections are there."""
    return found.scores.min().item() if len(found.scores) >= most else threshold


def _pairs(got: Found, expected: Found) -> Tensor:
    """Return the places of detections of the same objects `[N, 2]`, each at most once."""
    alike = box_iou(got.boxes_xyxy.double(), expected.boxes_xyxy.double())
    alike -= (got.scores[:, None] - expected.scores).abs()  # of boxes in one place
    alike[got.labels[:, None] != expected.labels] = -1.0
    pairs = torch.from_numpy(np.stack(linear_sum_assignment(alike, maximize=True), axis=1))
    return pairs[alike[pairs[:, 0], pairs[:, 1]] > _OVERLAP]
