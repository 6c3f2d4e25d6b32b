"""Images and labels as the model takes them: read, transformed and put together by the workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors

from cdetr_fast.images.load import require_8_bits
from cdetr_fast.training.data.coco import UNREADABLE, CocoIndex
from cdetr_fast.training.data.sampling import Draw
from cdetr_fast.training.data.transforms import Sample
from cdetr_fast.training.errors import DataError
from cdetr_fast.training.run.signals import outlive_in_worker


@dataclass
class Batch:
    """A batch on its way to the model.

    Attributes:
        pixels: uint8 `[B, 3, H, W]`, padded with 0; normalised on the device, which makes the
            transfer four times smaller.
        pixel_mask: bool `[B, H, W]`, True = image; None if nothing is padded.
        labels: One dictionary an image: `class_labels` int64 `[T]`, `boxes` fp32 `[T, 4]` as centre
            and size relative to the image, `masks` bool `[T, H, W]` for segmentation.
        image_ids: Of the images, as in the annotation file.
        indices: Of the images in the index.
        counted: Whether evaluation counts the image.
        orig_sizes_hw: Height and width before all transforms.
        failures: What was wrong with images that could not be read, and are not in the batch.
        segment_maps: In evaluation of segmentation, for each image int32 `[H, W]`, the id of each
            pixel's segment, at the image's own size.
    """

    pixels: Tensor | None
    pixel_mask: Tensor | None
    labels: list[dict[str, Tensor]]
    image_ids: list[int]
    indices: list[int]
    counted: list[bool]
    orig_sizes_hw: list[tuple[int, int]]
    failures: list[str]
    segment_maps: list[Tensor] | None = None

    def sizes_hw(self) -> list[tuple[int, int]]:
        """Returns height and width of each image within the batch."""
        if self.pixel_mask is None:
            return [tuple(self.pixels.shape[2:])] * len(self.pixels)
        mask = self.pixel_mask
        sizes = torch.stack([mask[:, :, 0].sum(1), mask[:, 0].sum(1)], 1)
        return [tuple(size) for size in sizes.tolist()]

    def fill_if_empty(self, masks: bool = False) -> None:
        """Puts something without objects in place of images of which not one could be read.

        Every process has to run the model equally often.
        """
        if self.pixels is not None:
            return
        self.pixels = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
        label = {"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
        if masks:
            label["masks"] = torch.zeros(0, 64, 64, dtype=torch.bool)
        self.labels, self.image_ids, self.indices = [label], [-1], [-1]
        self.counted, self.orig_sizes_hw = [False], [(64, 64)]

    def pin_memory(self) -> Batch:
        """Moves the tensors to pinned memory; `DataLoader` calls it."""
        if self.pixels is not None:
            self.pixels = self.pixels.pin_memory()
        if self.pixel_mask is not None:
            self.pixel_mask = self.pixel_mask.pin_memory()
        self.labels = [{k: v.pin_memory() for k, v in x.items()} for x in self.labels]
        return self

    def model_inputs(
        self, device: torch.device, mean: Tensor, std: Tensor, dtype: torch.dtype = torch.float32
    ) -> dict[str, Any]:
        """Returns the arguments of the model's forward: normalised images, mask and labels.

        Args:
            device: Where the model is.
            mean: `[3, 1, 1]` on `device`, in units of uint8.
            std: The same.
            dtype: Of the pixel values.
        """
        pixels = self.pixels.to(device, non_blocking=True)
        values = (pixels.float() - mean) / std
        mask = self.pixel_mask
        if mask is not None:
            mask = mask.to(device, non_blocking=True)
            values = values * mask[:, None]  # the image processor pads after normalising
        labels = [
            {k: v.to(device, non_blocking=True) for k, v in label.items()} for label in self.labels
        ]
        return {"pixel_values": values.to(dtype), "pixel_mask": mask, "labels": labels}


class DetectionDataset(Dataset):
    """Images of a `CocoIndex`, transformed; items are asked for by `Draw`.

    Args:
        index: Images and objects, whose labels are those of the model.
        transform: Takes a sample, an image seed and a batch seed.
        with_maps: For evaluation: give the maps of segments as they are, in place of masks.
    """

    def __init__(self, index: CocoIndex, transform: Any, with_maps: bool = False) -> None:
        self.index = index
        self.transform = transform
        self.with_maps = with_maps

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, draw: Draw) -> dict[str, Any] | str:
        """Returns the item, or what is wrong with its file."""
        index = self.index
        try:
            image = read_image(index, draw.index)
            segments = masks = None
            if index.masks is not None:
                segments = self._read_segments(draw.index, *image.shape[-2:])
        except DataError as error:
            return str(error)
        where = index.objects(draw.index)
        keep = ~index.crowd[where]
        if segments is not None and not self.with_maps:
            ids = torch.from_numpy(index.object_ids[where][keep])
            masks = (segments == ids[:, None, None]).to(torch.uint8)
        boxes, labels = index.boxes_xywh[where][keep], index.labels[where][keep]
        seeds = draw.image_seed, draw.batch_seed
        return make_item(image, boxes, labels, masks, self.transform, *seeds) | {
            "image_id": int(index.image_ids[draw.index]),
            "index": draw.index,
            "counted": draw.counted,
            "segments": segments if self.with_maps else None,
        }

    def _read_segments(self, image: int, height: int, width: int) -> Tensor:
        index = self.index
        path = index.masks / index.mask_names[image]
        name = f"{path} (masks of image id {index.image_ids[image]})"
        picture = _open(path, name)
        if (picture.height, picture.width) != (height, width):
            raise DataError(
                f"{name}: expected {width} x {height} pixels as the image has, "
                f"got {picture.width} x {picture.height}; correct one of the two"
            )
        colours = torch.from_numpy(np.array(picture)).to(torch.int32)
        segments = colours[..., 0] + 256 * colours[..., 1] + 256**2 * colours[..., 2]
        ids = torch.from_numpy(index.object_ids[index.objects(image)])
        missing = ids[~torch.isin(ids, segments.unique())].tolist()
        if missing:
            raise DataError(
                f"{name}: no pixel of segments {', '.join(map(str, missing))}, which "
                f"{index.path} lists; take them out there, or correct the masks"
            )
        return segments


def make_item(
    image: Tensor,
    boxes_xywh: np.ndarray,
    labels: np.ndarray,
    masks: Tensor | None,
    transform: Any,
    image_seed: Any,
    batch_seed: Any,
) -> dict[str, Any]:
    """Transforms an image with its objects: `pixels`, `label` and `orig_size_hw`.

    Args:
        image: uint8 `[3, H, W]`.
        boxes_xywh: `[T, 4]`, left, top, width, height in pixels; cut off at the image's edges.
        labels: int64 `[T]`.
        masks: uint8 `[T, H, W]`, or None.
        transform: Takes a sample and the seeds.
        image_seed: See `Draw`.
        batch_seed: See `Draw`.
    """
    boxes = torch.tensor(boxes_xywh, dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    height, width = image.shape[-2:]
    limit = boxes.new_tensor([width, height, width, height])
    boxes = torch.minimum(boxes.clamp(min=0), limit)
    sample = Sample(
        image=tv_tensors.Image(image),
        boxes=tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
        labels=torch.from_numpy(labels),
        masks=masks if masks is None else tv_tensors.Mask(masks),
    )
    sample = transform(sample, image_seed, batch_seed)
    return {
        "pixels": sample.image.as_subclass(Tensor),
        "label": _label(sample),
        "orig_size_hw": (height, width),
    }


def _label(sample: Sample) -> dict[str, Tensor]:
    height, width = sample.size_hw
    x0, y0, x1, y1 = sample.boxes.as_subclass(Tensor).unbind(-1)
    boxes_cxcywh = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], -1)
    boxes_cxcywh = boxes_cxcywh / boxes_cxcywh.new_tensor([width, height, width, height])
    label = {"class_labels": sample.labels, "boxes": boxes_cxcywh}
    if sample.masks is not None:
        label["masks"] = sample.masks.as_subclass(Tensor).bool()
    return label


def read_image(index: CocoIndex, image: int) -> Tensor:
    """Reads an image of an index as uint8 `[3, H, W]`.

    An image whose EXIF tag turns it is turned if only so it has the size that the file of
    annotations gives: tools differ in whether their boxes are on the turned image.

    Raises:
        DataError: The file cannot be read; the message has the file, the id and what to do.
    """
    path = index.image_path(image)
    name = f"{path} (image id {index.image_ids[image]})"
    return decode(path, name, tuple(index.sizes_hw[image].tolist()), str(index.path))


def decode(file: Any, name: str, size_hw: tuple[int, int], source: str) -> Tensor:
    """Reads an image file as uint8 `[3, H, W]`; see `read_image`.

    Args:
        file: Path or stream.
        name: For messages.
        size_hw: Height and width that it has to have.
        source: What says so.
    """
    picture = _open(file, name)
    height, width = size_hw
    if (picture.height, picture.width) != (height, width):
        picture = ImageOps.exif_transpose(picture)
    if (picture.height, picture.width) != (height, width):
        raise DataError(
            f"{name}: expected {width} x {height} pixels as in {source}, "
            f"got {picture.width} x {picture.height}; correct one of the two"
        )
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _open(path: Any, name: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            require_8_bits(image)
            return image.convert("RGB")
    except UNREADABLE as error:
        raise DataError(
            f"{name}: cannot be read ({error}); replace the file, take the image out of the "
            "annotations, or pass --bad-images skip"
        ) from error


class Collate:
    """Puts items together, padded at the bottom and on the right.

    Args:
        multiple: Heights and widths are rounded up to it, so that fewer different shapes come up.
    """

    def __init__(self, multiple: int = 1) -> None:
        self.multiple = multiple

    def __call__(self, items: Sequence[dict[str, Any] | str]) -> Batch:
        failures = [item for item in items if isinstance(item, str)]
        items = [item for item in items if not isinstance(item, str)]
        pixels = mask = None
        if items:
            pixels, mask = self._pad([item["pixels"] for item in items])
        labels = [item["label"] for item in items]
        for label in labels:
            if "masks" in label:
                height, width = label["masks"].shape[1:]
                bottom, right = pixels.shape[2] - height, pixels.shape[3] - width
                label["masks"] = torch.nn.functional.pad(label["masks"], (0, right, 0, bottom))
        maps = [item["segments"] for item in items if item.get("segments") is not None]
        return Batch(
            pixels=pixels,
            pixel_mask=mask,
            labels=labels,
            image_ids=[item["image_id"] for item in items],
            indices=[item["index"] for item in items],
            counted=[item["counted"] for item in items],
            orig_sizes_hw=[item["orig_size_hw"] for item in items],
            failures=failures,
            segment_maps=maps or None,
        )

    def _pad(self, images: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        height, width = (
            -(-max(image.shape[axis] for image in images) // self.multiple) * self.multiple
            for axis in (1, 2)
        )
        pixels = images[0].new_zeros(len(images), 3, height, width)
        mask = torch.zeros(len(images), height, width, dtype=torch.bool)
        for row, row_mask, image in zip(pixels, mask, images, strict=True):
            row[:, : image.shape[1], : image.shape[2]] = image
            row_mask[: image.shape[1], : image.shape[2]] = True
        return pixels, None if mask.all() else mask


def make_loader(
    dataset: Dataset, sampler: Any, workers: int, multiple: int, pin_memory: bool
) -> DataLoader:
    """Returns a loader of `Batch`; it leaves the process's random numbers alone."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=Collate(multiple),
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        worker_init_fn=outlive_in_worker,
        # Workers take their base seed from here; nothing random in them depends on it.
        generator=torch.Generator().manual_seed(0),
    )


def grouped(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """Puts each `size` batches of a loader into one list: those of a step."""
    step = []
    for batch in batches:
        step.append(batch)
        if len(step) == size:
            yield step
            step = []
