"""The paper's augmentation: flip, a random scale, and half of the time a random crop before it.

What determines the size of the result (scale, crop or not, shape of the crop) is drawn once for all
images of a step, so that a batch holds images of similar sizes; each image alone sees the paper's
distribution. Source: datasets/coco.py and datasets/transforms.py of the authors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as tvF

from cdetr_fast.images.resize import resized_hw

_SMALLEST_BOX = 1.0  # pixels of a side, after a crop


class Sample(NamedTuple):
    """An image with its objects.

    Attributes:
        image: uint8 `[3, H, W]`.
        boxes: `tv_tensors.BoundingBoxes` XYXY fp32 `[T, 4]`, pixels.
        labels: int64 `[T]`.
        masks: `tv_tensors.Mask` uint8 `[T, H, W]`, or None.
    """

    image: Tensor
    boxes: tv_tensors.BoundingBoxes
    labels: Tensor
    masks: tv_tensors.Mask | None = None

    @property
    def size_hw(self) -> tuple[int, int]:
        """Height and width."""
        return self.image.shape[-2], self.image.shape[-1]

    def map(self, function: Any, *args: Any, **kwargs: Any) -> Sample:
        """Apply a function of torchvision's v2 to image, boxes and masks."""
        return self._replace(
            image=function(self.image, *args, **kwargs),
            boxes=function(self.boxes, *args, **kwargs),
            masks=self.masks if self.masks is None else function(self.masks, *args, **kwargs),
        )


Transform = Callable[[Sample, Any, Any], Sample]
"""Takes a sample, its image seed and its batch seed (see `ImageRequest`)."""


def resize(sample: Sample, size: Mapping[str, int]) -> Sample:
    """Resize to a size of the image processor, with its rounding."""
    new_hw = list(resized_hw(*sample.size_hw, size))
    return sample.map(tvF.resize, new_hw, antialias=True)


class EvaluationTransform:
    """Resizes as the image processor does.

    Args:
        size: As the image processor's, {"shortest_edge", "longest_edge"} for example.
    """

    def __init__(self, size: Mapping[str, int]) -> None:
        self.size = dict(size)

    def __call__(self, sample: Sample, *seeds: Any) -> Sample:
        return resize(sample, self.size)


class TrainingTransform:
    """Flips, crops and scales at random.

    Args:
        scales: Shortest edges to draw from.
        max_size: Limit of the longest edge.
        flip_probability: Probability of a horizontal flip.
        crop_probability: Probability of a crop.
        crop_scales: Shortest edges to draw from before a crop.
        crop_sizes: Smallest and largest side of a crop; the image's side if that is smaller.
        vertical_flip_probability: Probability of a vertical flip, for images without an up and a
            down.
        color_jitter: Brightness, contrast and saturation are multiplied by factors drawn from
            1 - color_jitter to 1 + color_jitter, in this order.
    """

    def __init__(
        self,
        scales: Sequence[int],
        max_size: int,
        flip_probability: float = 0.5,
        crop_probability: float = 0.5,
        crop_scales: Sequence[int] = (400, 500, 600),
        crop_sizes: tuple[int, int] = (384, 600),
        vertical_flip_probability: float = 0.0,
        color_jitter: float = 0.0,
    ) -> None:
        self.scales = tuple(scales)
        self.max_size = max_size
        self.flip_probability = flip_probability
        self.crop_probability = crop_probability
        self.crop_scales = tuple(crop_scales)
        self.crop_sizes = tuple(crop_sizes)
        self.vertical_flip_probability = vertical_flip_probability
        self.color_jitter = color_jitter

    def __call__(
        self, sample: Sample, image_seed: Sequence[int], batch_seed: Sequence[int]
    ) -> Sample:
        """Transform a sample.

        Args:
            sample: Image and objects.
            image_seed: Seed of the flips, the colours and the position of the crop.
            batch_seed: Seed of scale and crop size.
        """
        shape, content = np.random.default_rng(batch_seed), np.random.default_rng(image_seed)
        scale = int(shape.choice(self.scales))
        first, crop_hw = int(shape.choice(self.crop_scales)), shape.random(2)
        crops = shape.random() < self.crop_probability
        flips, place = content.random() < self.flip_probability, content.random(2)
        flips_vertically = content.random() < self.vertical_flip_probability
        colours = 1 + self.color_jitter * content.uniform(-1, 1, 3)
        if flips:
            sample = sample.map(tvF.horizontal_flip)
        if flips_vertically:
            sample = sample.map(tvF.vertical_flip)
        if crops:
            sample = self._crop(resize(sample, {"shortest_edge": first}), crop_hw, place)
        sample = resize(sample, {"shortest_edge": scale, "longest_edge": self.max_size})
        return self._recolor(sample, colours) if self.color_jitter else sample

    def _recolor(self, sample: Sample, factors: np.ndarray) -> Sample:
        image = sample.image
        adjustments = (tvF.adjust_brightness, tvF.adjust_contrast, tvF.adjust_saturation)
        for adjust, factor in zip(adjustments, factors, strict=True):
            image = adjust(image, float(factor))
        return sample._replace(image=image)

    def _crop(self, sample: Sample, fractions: np.ndarray, place: np.ndarray) -> Sample:
        low, high = self.crop_sizes
        size = []
        for fraction, side in zip(fractions, sample.size_hw, strict=True):
            least, most = min(low, side), min(high, side)
            size.append(least + int(fraction * (most - least + 1)))
        corner = [
            int(where * (side - cut + 1))
            for where, side, cut in zip(place, sample.size_hw, size, strict=True)
        ]
        return without_empty(sample.map(tvF.crop, *corner, *size))


def without_empty(sample: Sample) -> Sample:
    """Clip boxes to the image and drop objects of which nothing (or a line) is left."""
    boxes = tvF.clamp_bounding_boxes(sample.boxes)
    keep = (boxes[:, 2:] - boxes[:, :2] >= _SMALLEST_BOX).all(1)
    if sample.masks is not None:
        keep = keep & sample.masks.flatten(1).bool().any(1)
    keep = torch.as_tensor(keep)
    return sample._replace(
        boxes=tv_tensors.wrap(boxes[keep], like=sample.boxes),
        labels=sample.labels[keep],
        masks=None
        if sample.masks is None
        else tv_tensors.wrap(sample.masks[keep], like=sample.masks),
    )
