"""`predict`: images of any kind in, results out.

Batches are read and resized in a thread of their own while the model works on the one before.
"""

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from cdetr_fast.common import validation as check
from cdetr_fast.config.model import ConditionalDetrConfig
from cdetr_fast.images import ConditionalDetrImageProcessor
from cdetr_fast.images.load import ImageInput, load_images
from cdetr_fast.images.results import DetectionResult, SegmentationResult
from cdetr_fast.images.segments import segments
from cdetr_fast.images.settings import PREPROCESSOR_NAME, PROCESSOR_NAME
from cdetr_fast.images.sizes import resized_hw
from cdetr_fast.models.pretrained import ModelWithLoss

Item = TypeVar("Item")


class Batch(NamedTuple):
    """Images made ready for the model.

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
        self._processor_source: tuple[str | os.PathLike, dict[str, Any]] | None = None

    @property
    def image_processor(self) -> ConditionalDetrImageProcessor:
        """What `predict` prepares images with; may be replaced.

        At the first use it is read from where the model was loaded from. A model that was not
        loaded, or has none there (then with a warning), gets one with default settings.
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
        names = (PREPROCESSOR_NAME, PROCESSOR_NAME)
        folder = Path(source, options.get("subfolder", ""))
        if not is_folder or any((folder / name).is_file() for name in names):
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
        compute: Callable[[Batch], list[DetectionResult]],
    ) -> Any:
        """One result for one image, a list for several."""
        if _is_single(images):
            (batch,) = self._batches([images], 1)
            with _evaluating(self):
                return compute(batch)[0]
        return list(self._predict_each(images, batch_size, compute))

    def _predict_each(
        self,
        images: Iterable[ImageInput],
        batch_size: int,
        compute: Callable[[Batch], list[DetectionResult]],
    ) -> Iterator[DetectionResult]:
        for batch in _ahead(self._batches(images, batch_size)):
            with _evaluating(self):
                results = compute(batch)
            yield from results

    def _batches(self, images: Iterable[ImageInput], batch_size: int) -> Iterator[Batch]:
        """Reads images and prepares them, a batch at a time."""
        processor = self.image_processor
        device = self.device if processor.device is None else processor.device
        waiting: list[Tensor] = []
        for position, image in enumerate(images):
            (pixels,) = load_images(
                [image], processor.do_convert_rgb, processor.input_data_format, device, position
            )
            if waiting and not (self._mixes_sizes or _same_size(pixels, waiting[0], processor)):
                yield self._batch(waiting)
                waiting = []
            waiting.append(pixels)
            if len(waiting) == batch_size:
                yield self._batch(waiting)
                waiting = []
        if waiting:
            yield self._batch(waiting)

    def _batch(self, images: list[Tensor]) -> Batch:
        features = self.image_processor(
            images,
            input_data_format="channels_first",
            data_format="channels_first",
            return_tensors="pt",
        )
        pixel_values = features["pixel_values"].to(self.device, self.dtype)
        pixel_mask = features.get("pixel_mask")
        if pixel_mask is not None:
            pixel_mask = pixel_mask.to(self.device)
        return Batch(pixel_values, pixel_mask, [tuple(image.shape[-2:]) for image in images])


class DetectingModel(PredictingModel):
    """`predict` of a model that detects."""

    def predict(
        self,
        images: ImageInput,
        threshold: float = 0.5,
        *,
        top_k: int = 100,
        batch_size: int = 1,
    ) -> DetectionResult | list[DetectionResult]:
        """Detects objects in images.

        Runs in inference mode and evaluation mode, on the device and in the dtype of the model;
        training mode is restored. `image_processor` prepares the images.

        Args:
            images: Paths, URLs, bytes of image files, PIL images, arrays or tensors (`[H, W]`, `[C,
                H, W]` or `[H, W, C]`): one, a list of them, or a batch in four dimensions.
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
        """As `predict` for many images: takes any iterable, yields each result when it is there.

        `images` is iterated in another thread, a batch ahead of the results.
        """
        return self._predict_each(images, *self._check(threshold, top_k, batch_size))

    def _check(self, threshold: float, top_k: int, batch_size: int) -> tuple[int, Callable]:
        check.number(0, 1)("threshold", threshold)
        check.integer(1)("top_k", top_k)
        return check.integer(1)("batch_size", batch_size), functools.partial(
            self._detect, threshold=threshold, top_k=top_k
        )

    def _detect(self, batch: Batch, threshold: float, top_k: int) -> list[DetectionResult]:
        with torch.inference_mode():
            outputs = self(pixel_values=batch.pixel_values, pixel_mask=batch.pixel_mask)
        found = self.image_processor.post_process_object_detection(
            outputs, threshold, batch.sizes_hw, top_k, return_tensors="pt"
        ).to("cpu")
        return [
            DetectionResult(
                found["scores"][image, :count],
                found["labels"][image, :count],
                found["boxes"][image, :count],
                size_hw,
                self.config.id2label,
            )
            for image, (count, size_hw) in enumerate(
                zip(found["counts"].tolist(), batch.sizes_hw, strict=True)
            )
        ]


class SegmentingModel(PredictingModel):
    """`predict` of a model that segments."""

    _mixes_sizes = False  # a padded image's mask would cover the padding

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
        """Segments objects in images; masks are computed for the queries above the threshold alone.

        Modes, device and preparation of the images are as in detection.

        Args:
            images: As in detection.
            threshold: Score above which a query is kept.
            mask_threshold: Probability from which on a pixel is in a mask.
            overlap_mask_area_threshold: Share of its mask above which a query has to get its
                pixels.
            label_ids_to_fuse: Classes (stuff) whose parts become one segment: panoptic in place of
                instance segmentation.
            batch_size: Most images in one forward pass; only images of one size share one.

        Returns:
            A `SegmentationResult` for one image, a list of them for a list or batch. Boxes are
            those of the box head, of a fused segment the box around its parts'.

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
        """As `predict` for many images: takes any iterable, yields each result when it is there.

        `images` is iterated in another thread, a batch ahead of the results.
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
    ) -> tuple[int, Callable]:
        check.number(0, 1)("threshold", threshold)
        check.number(0, 1)("mask_threshold", mask_threshold)
        check.number(0, 1)("overlap_mask_area_threshold", overlap_mask_area_threshold)
        return check.integer(1)("batch_size", batch_size), functools.partial(
            self._segment,
            threshold=threshold,
            mask_threshold=mask_threshold,
            overlap_mask_area_threshold=overlap_mask_area_threshold,
            labels_to_fuse=frozenset(label_ids_to_fuse),
        )

    def _segment(self, batch: Batch, **settings: Any) -> list[SegmentationResult]:
        with torch.inference_mode():
            outputs = self.forward_above(
                batch.pixel_values, batch.pixel_mask, settings["threshold"]
            )
        found = segments(
            outputs, target_sizes=batch.sizes_hw, compat=self.config.compat, **settings
        )
        boxes_cxcywh = outputs.pred_boxes.cpu()
        results = []
        for image, (segmented, (height, width)) in enumerate(
            zip(found, batch.sizes_hw, strict=True)
        ):
            center_xy, half_size = boxes_cxcywh[image, :, :2], 0.5 * boxes_cxcywh[image, :, 2:]
            corners = torch.cat((center_xy - half_size, center_xy + half_size), dim=1)
            corners = corners * torch.tensor([width, height, width, height])
            boxes = [corners[queries] for queries in segmented.queries]
            boxes = [torch.cat((b[:, :2].amin(0), b[:, 2:].amax(0))) for b in boxes]
            infos = segmented.infos
            results.append(
                SegmentationResult(
                    torch.tensor([info["score"] for info in infos]),
                    torch.tensor([info["label_id"] for info in infos], dtype=torch.int64),
                    torch.stack(boxes) if boxes else torch.zeros(0, 4),
                    (height, width),
                    self.config.id2label,
                    segmented.segmentation.clamp_(min=0).cpu(),
                    [info["id"] for info in infos],
                )
            )
        return results


def _is_single(images: ImageInput) -> bool:
    """Whether this is one image, and not a list or batch of them."""
    if isinstance(images, np.ndarray | Tensor):
        return images.ndim != 4
    return isinstance(images, str | os.PathLike | bytes | Image.Image)


def _same_size(a: Tensor, b: Tensor, processor: ConditionalDetrImageProcessor) -> bool:
    """Whether two images have one size after resizing."""
    sizes = [tuple(image.shape[-2:]) for image in (a, b)]
    if processor.do_resize:
        sizes = [resized_hw(*size, processor.size) for size in sizes]
    return sizes[0] == sizes[1]


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and then each module's own mode again."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _ahead(items: Iterator[Item]) -> Iterator[Item]:
    """Yields items while the one after is being made in another thread."""
    end = object()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="cdetr_fast-images") as pool:
        item = next(items, end)
        while item is not end:
            following = pool.submit(next, items, end)
            yield item
            item = following.result()
