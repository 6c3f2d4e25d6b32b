"""`predict`: results for images of any kind.

A thread reads and resizes the next batch while the model works on the current one.
"""

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from cdetr_fast.common.validation import PositiveInt, Probability, checked
from cdetr_fast.config.model import ConditionalDetrConfig
from cdetr_fast.images import ConditionalDetrImageProcessor
from cdetr_fast.images.load import Buffer, ImageInput, image_hw, load_images
from cdetr_fast.images.results import (
    DetectionResult,
    SegmentationResult,
    detection_results,
    segmentation_results,
)
from cdetr_fast.images.settings import PREPROCESSOR_NAME, has_settings
from cdetr_fast.models.pretrained import ModelWithLoss

Item = TypeVar("Item")
Result = TypeVar("Result", bound=DetectionResult)


class Batch(NamedTuple):
    """Preprocessed images.

    Attributes:
        pixel_values: `[B, 3, H, W]` in the model's dtype, on its device.
        pixel_mask: int64 `[B, H, W]`; None if the image processor does not pad.
        sizes_hw: Height and width of each image before it was resized.
    """

    pixel_values: Tensor
    pixel_mask: Tensor | None
    sizes_hw: list[tuple[int, int]]


class PredictingModel(ModelWithLoss):
    """A model with `predict`.

    Args:
        config: The model's configuration.
    """

    _mixes_sizes = True  # whether a batch may hold images of different sizes

    def __init__(self, config: ConditionalDetrConfig) -> None:
        super().__init__(config)
        self._image_processor: ConditionalDetrImageProcessor | None = None
        self._processor_source: tuple[str | os.PathLike[str], dict[str, Any]] | None = None

    @property
    def image_processor(self) -> ConditionalDetrImageProcessor:
        """Prepares the images of `predict`; may be replaced.

        At the first use it is read from where the model was loaded from. A model that was not
        loaded gets one with default settings; so does, with a warning, one without a file of it.
        """
        if self._image_processor is None:
            self._image_processor = self._load_processor()
        return self._image_processor

    @image_processor.setter
    def image_processor(self, value: ConditionalDetrImageProcessor) -> None:
        if not isinstance(value, ConditionalDetrImageProcessor):
            got = f"{type(value).__module__}.{type(value).__name__}"
            raise TypeError(
                f"image_processor: expected cdetr_fast.ConditionalDetrImageProcessor, got {got}"
            )
        self._image_processor = value

    def _load_processor(self) -> ConditionalDetrImageProcessor:
        compat = self.config.compat
        if self._processor_source is None:
            return ConditionalDetrImageProcessor(compat=compat)
        source, options = self._processor_source
        if Path(source).is_file():  # weights alone; their folder may have the rest
            source, options = Path(source).parent, {}
        is_folder = Path(source).is_dir()
        if not is_folder or has_settings(Path(source, options.get("subfolder", ""))):
            with contextlib.suppress(FileNotFoundError):
                return ConditionalDetrImageProcessor.from_pretrained(
                    source, compat=compat, **options
                )
        warnings.warn(
            f"{source}: no {PREPROCESSOR_NAME}: images are prepared with default settings; "
            "assign model.image_processor for others",
            stacklevel=4,
        )
        return ConditionalDetrImageProcessor(compat=compat)

    def _predict(
        self,
        images: ImageInput,
        batch_size: int,
        compute: Callable[[Batch], list[Result]],
    ) -> Result | list[Result]:
        """Return one result for one image, a list for several."""
        if is_single(images):
            (batch,) = self._batches([images], 1)
            with evaluating(self):
                return compute(batch)[0]
        many = cast("Iterable[ImageInput]", images)
        return list(self._predict_each(many, batch_size, compute))

    def _predict_each(
        self,
        images: Iterable[ImageInput],
        batch_size: int,
        compute: Callable[[Batch], list[Result]],
    ) -> Iterator[Result]:
        for batch in _ahead(self._batches(images, batch_size)):
            with evaluating(self):
                results = compute(batch)
            yield from results

    def _batches(self, images: Iterable[ImageInput], batch_size: int) -> Iterator[Batch]:
        """Read images and prepare them, a batch at a time."""
        processor = self.image_processor
        waiting: list[Tensor] = []
        for position, image in enumerate(images):
            pixels = self._read(image, position)
            size_hw = processor.resized_hw(pixels)
            if waiting and not (self._mixes_sizes or size_hw == processor.resized_hw(waiting[0])):
                yield self._batch(waiting, **self._batch_settings(waiting))
                waiting = []
            waiting.append(pixels)
            if len(waiting) == batch_size:
                yield self._batch(waiting, **self._batch_settings(waiting))
                waiting = []
        if waiting:
            yield self._batch(waiting, **self._batch_settings(waiting))

    def _read(self, image: ImageInput, position: int) -> Tensor:
        """Return the pixels of an image, upright, `[C, H, W]`; `position` is for messages."""
        processor = self.image_processor
        (pixels,) = load_images(
            [image],
            processor.do_convert_rgb,
            processor.input_data_format,
            self.device if processor.device is None else processor.device,
            position,
            rescale_factor=processor.rescale_factor if processor.do_rescale else None,
            recognizes_floats=True,
        )
        return pixels

    def _batch_settings(self, images: list[Tensor]) -> dict[str, Any]:
        """Return settings of the image processor for a batch that is predicted."""
        return {}

    def _batch(self, images: list[Tensor], **settings: Any) -> Batch:
        processor = self.image_processor.with_overrides(settings, "predict")
        pixel_values, pixel_mask = processor.to_batch(images)
        if pixel_mask is not None:
            pixel_mask = pixel_mask.to(self.device)
        sizes_hw = [image_hw(image) for image in images]
        return Batch(pixel_values.to(self.device, self.dtype), pixel_mask, sizes_hw)


class DetectingModel(PredictingModel):
    """`predict` of a detection model."""

    def predict(
        self,
        images: ImageInput,
        threshold: float = 0.5,
        *,
        top_k: int = 100,
        batch_size: int = 1,
    ) -> DetectionResult | list[DetectionResult]:
        """Detect objects in images.

        Runs in inference mode and evaluation mode, on the device and in the dtype of the model;
        training mode is restored. `image_processor` prepares the images.

        Args:
            images: Paths, URLs, image files as bytes or open in binary mode, PIL images, arrays or
                tensors (`[H, W]`, `[C, H, W]` or `[H, W, C]`, from 0 to 255 or as floats from 0 to
                1): one, a list of them, or a four-dimensional batch. Pictures are turned upright by
                their EXIF orientation.
            threshold: Detections with a score above it are returned.
            top_k: Most detections per image.
            batch_size: Images in one forward pass.

        Returns:
            A `DetectionResult` for one image, a list of them for a list or batch.

        Raises:
            TypeError: An image or argument has the wrong type.
            ValueError: An image or argument does not fit.
            OSError: A file cannot be read; the message names it.
        """
        return self._predict(images, *self._check(threshold, top_k, batch_size))

    def predict_each(
        self,
        images: Iterable[ImageInput],
        threshold: float = 0.5,
        *,
        top_k: int = 100,
        batch_size: int = 1,
    ) -> Iterator[DetectionResult]:
        """Yield the results of `predict` for any iterable of images, each when it is computed.

        `images` is iterated in another thread, one batch ahead of the results.
        """
        return self._predict_each(images, *self._check(threshold, top_k, batch_size))

    def _check(
        self, threshold: float, top_k: int, batch_size: int
    ) -> tuple[int, Callable[[Batch], list[DetectionResult]]]:
        checked(Probability, threshold, "threshold")
        checked(PositiveInt, top_k, "top_k")
        return checked(PositiveInt, batch_size, "batch_size"), functools.partial(
            self._detect, threshold=threshold, top_k=top_k
        )

    def _detect(self, batch: Batch, threshold: float, top_k: int) -> list[DetectionResult]:
        with torch.inference_mode():
            outputs = self(batch.pixel_values, batch.pixel_mask, return_dict=True)
        return detection_results(
            outputs, batch.sizes_hw, self.config.id2label, threshold=threshold, top_k=top_k
        )


class SegmentingModel(PredictingModel):
    """`predict` of a segmentation model."""

    _mixes_sizes = False  # a padded image's mask would cover the padding
    forward_kept: Callable[..., Any]

    def _batch_settings(self, images: list[Tensor]) -> dict[str, Any]:
        """Leave out the padding that `pad_size` adds to images of one size."""
        height, width = self.image_processor.resized_hw(images[0])
        return {"pad_size": {"height": height, "width": width}}

    def predict(
        self,
        images: ImageInput,
        threshold: float = 0.5,
        *,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.8,
        label_ids_to_fuse: Collection[int] = (),
        batch_size: int = 1,
    ) -> SegmentationResult | list[SegmentationResult]:
        """Segment objects in images; masks are computed only for queries above the threshold.

        Modes, device and preparation of the images are as in detection.

        Args:
            images: As in detection.
            threshold: Score above which a query is kept.
            mask_threshold: Probability from which on a pixel is in a mask.
            overlap_mask_area_threshold: Share of its mask above which a query has to get its
                pixels.
            label_ids_to_fuse: Classes (stuff) whose parts become one segment: panoptic instead of
                instance segmentation.
            batch_size: Most images in one forward pass; only images of one size share one.

        Returns:
            A `SegmentationResult` for one image, a list of them for a list or batch. Boxes are
            those of the box head; that of a fused segment encloses the boxes of its parts.

        Raises:
            TypeError: An image or argument has the wrong type.
            ValueError: An image or argument does not fit.
            OSError: A file cannot be read; the message names it.
        """
        thresholds = (threshold, mask_threshold, overlap_mask_area_threshold)
        return self._predict(images, *self._check(*thresholds, label_ids_to_fuse, batch_size))

    def predict_each(
        self,
        images: Iterable[ImageInput],
        threshold: float = 0.5,
        *,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.8,
        label_ids_to_fuse: Collection[int] = (),
        batch_size: int = 1,
    ) -> Iterator[SegmentationResult]:
        """Yield the results of `predict` for any iterable of images, each when it is computed.

        `images` is iterated in another thread, one batch ahead of the results.
        """
        thresholds = (threshold, mask_threshold, overlap_mask_area_threshold)
        return self._predict_each(images, *self._check(*thresholds, label_ids_to_fuse, batch_size))

    def _check(
        self,
        threshold: float,
        mask_threshold: float,
        overlap_mask_area_threshold: float,
        label_ids_to_fuse: Collection[int],
        batch_size: int,
    ) -> tuple[int, Callable[[Batch], list[SegmentationResult]]]:
        checked(Probability, threshold, "threshold")
        checked(Probability, mask_threshold, "mask_threshold")
        checked(Probability, overlap_mask_area_threshold, "overlap_mask_area_threshold")
        return checked(PositiveInt, batch_size, "batch_size"), functools.partial(
            self._segment,
            threshold=threshold,
            mask_threshold=mask_threshold,
            overlap_mask_area_threshold=overlap_mask_area_threshold,
            labels_to_fuse=frozenset(label_ids_to_fuse),
        )

    def _segment(self, batch: Batch, **settings: Any) -> list[SegmentationResult]:
        with torch.inference_mode():
            outputs = self.forward_kept(batch.pixel_values, batch.pixel_mask, settings["threshold"])
        return segmentation_results(
            outputs, batch.sizes_hw, self.config.id2label, compat=self.config.compat, **settings
        )


def is_single(images: ImageInput) -> bool:
    """Return whether this is one image, and not a list or batch of them."""
    if isinstance(images, np.ndarray | Tensor):
        return images.ndim != 4
    one = isinstance(images, str | os.PathLike | Buffer | Image.Image) or hasattr(images, "read")
    return one or isinstance(images, Mapping) or not isinstance(images, Iterable)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and each module back into its own mode at the end."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _ahead(items: Iterator[Item]) -> Iterator[Item]:
    """Yield items while another thread makes the next one."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="cdetr_fast-images") as pool:
        item = next(items, None)
        while item is not None:
            following = pool.submit(next, items, None)
            yield item
            item = following.result()
