"""Images and labels as the model takes them: read, transformed and collated by the workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from cdetr_fast.images.boxes import clipped_corners, relative_boxes, segment_ids
from cdetr_fast.images.load import image_hw, read_file, turned_upright
from cdetr_fast.training.data.index import CocoIndex
from cdetr_fast.training.data.sampling import ImageRequest
from cdetr_fast.training.data.transforms import Sample, Transform
from cdetr_fast.training.errors import DataError


class Item(TypedDict):
    """An image on its way into a batch; the fields are those of `Batch`, for one image."""

    pixels: Tensor
    label: dict[str, Tensor]
    image_id: int
    index: int
    counted: bool
    orig_size_hw: tuple[int, int]
    segment_map: Tensor | None


@dataclass
class Batch:
    """A batch on its way to the model.

    Attributes:
        pixels: uint8 `[B, 3, H, W]`, padded with 0; normalised on the device, which makes the
            transfer four times smaller. None if no image could be read.
        pixel_mask: bool `[B, H, W]`, True = image; None if nothing is padded.
        labels: One dictionary per image: `class_labels` int64 `[T]`, `boxes` fp32 `[T, 4]` as
            centre and size relative to the image, `masks` bool `[T, H, W]` for segmentation.
        image_ids: Ids of the images, as in the annotation file.
        indices: Positions of the images in the index.
        counted: Whether evaluation counts the image.
        orig_sizes_hw: Height and width before all transforms.
        failures: Errors of the images that could not be read, which are not in the batch.
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

    def images(self) -> Tensor:
        """Return `pixels` of a batch that has images, also by `fill_if_empty`."""
        if self.pixels is None:
            raise ValueError("pixels: expected at least one image, got none; call fill_if_empty")
        return self.pixels

    def sizes_hw(self) -> list[tuple[int, int]]:
        """Return height and width of each image within the batch."""
        mask, pixels = self.pixel_mask, self.images()
        if mask is None:
            return [(pixels.shape[2], pixels.shape[3])] * len(pixels)
        heights, widths = mask[:, :, 0].sum(1), mask[:, 0].sum(1)
        return list(zip(heights.tolist(), widths.tolist(), strict=True))

    def fill_if_empty(self, masks: bool = False) -> None:
        """Add an image without objects to a batch none of whose images could be read.

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
        """Move what is copied to the device as it is to pinned memory; `DataLoader` calls it."""
        if self.pixels is not None:
            self.pixels = self.pixels.pin_memory()
        if self.pixel_mask is not None:
            self.pixel_mask = self.pixel_mask.pin_memory()
        for label in self.labels:
            if "masks" in label:
                label["masks"] = label["masks"].pin_memory()
        return self

    def model_inputs(
        self, device: torch.device, mean: Tensor, std: Tensor, dtype: torch.dtype = torch.float32
    ) -> dict[str, Any]:
        """Return the arguments of the model's forward: normalised images, mask and labels.

        Classes and boxes stay on the host, where the criterion checks them and packs those of all
        images into one copy; masks, which are large, are moved at once. The labels are read-only
        mappings: DDP and FSDP would move the tensors of dictionaries to the device, one by one.

        Args:
            device: Device of the model.
            mean: `[3, 1, 1]` on `device`, in units of uint8.
            std: The same.
            dtype: Of the pixel values.
        """
        pixels = self.images().to(device, non_blocking=True)
        values = (pixels.float() - mean) / std
        mask = self.pixel_mask
        if mask is not None:
            mask = mask.to(device, non_blocking=True)
            values = values * mask[:, None]  # the image processor pads after normalising
        labels = [
            MappingProxyType(
                {k: v.to(device, non_blocking=True) if k == "masks" else v for k, v in x.items()}
            )
            for x in self.labels
        ]
        return {"pixel_values": values.to(dtype), "pixel_mask": mask, "labels": labels}


class DetectionDataset(Dataset[Item | str]):
    """Images of a `CocoIndex`, transformed.

    Args:
        index: Images and objects, whose labels are those of the model.
        transform: Takes a sample, an image seed and a batch seed.
        with_maps: For evaluation: give the maps of segments instead of masks.
    """

    def __init__(self, index: CocoIndex, transform: Transform, with_maps: bool = False) -> None:
        self.index = index
        self.transform = transform
        self.with_maps = with_maps

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, request: ImageRequest) -> Item | str:
        """Return the item, or the error of a file that cannot be read."""
        index, position = self.index, request.position
        segment_map = masks = None
        try:
            image = read_image(index, position)
            if index.masks is not None:
                segment_map = read_segments(index, position, image_hw(image))
        except DataError as error:
            return str(error)
        where = index.objects(position)
        keep = ~index.crowd[where]
        if segment_map is not None and not self.with_maps:
            ids = torch.from_numpy(index.object_ids[where][keep])
            masks = (segment_map == ids[:, None, None]).to(torch.uint8)
        if index.segmentation_text is not None and not self.with_maps:
            items = np.arange(where.start, where.stop)
            kept = [index.mask(i, position) for i in items[keep].tolist()]
            stacked = torch.stack(kept) if kept else torch.zeros(0, *image_hw(image)).bool()
            seen = stacked.flatten(1).any(1)
            masks = stacked[seen].to(torch.uint8)
            keep[items[keep][~seen.numpy()] - where.start] = False
        return make_item(
            image,
            index.boxes_xywh[where][keep],
            index.labels[where][keep],
            masks,
            self.transform,
            request,
            int(index.image_ids[position]),
            segment_map if self.with_maps else None,
        )


def make_item(
    image: Tensor,
    boxes_xywh: np.ndarray,
    labels: np.ndarray,
    masks: Tensor | None,
    transform: Transform,
    request: ImageRequest,
    image_id: int,
    segment_map: Tensor | None = None,
) -> Item:
    """Transform an image with its objects.

    Args:
        image: uint8 `[3, H, W]`.
        boxes_xywh: `[T, 4]`, left, top, width, height in pixels; clipped to the image.
        labels: int64 `[T]`.
        masks: uint8 `[T, H, W]`, or None.
        transform: Takes a sample and the seeds of the request.
        request: The request for this image.
        image_id: Id of the image in the annotation file.
        segment_map: See `Batch`.
    """
    height, width = size_hw = (image.shape[1], image.shape[2])
    boxes = torch.tensor(boxes_xywh, dtype=torch.float32).reshape(-1, 4)
    corners = clipped_corners(boxes, size_hw)
    sample = Sample(
        image=tv_tensors.Image(image),
        boxes=tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(height, width)),
        labels=torch.from_numpy(labels),
        masks=masks if masks is None else tv_tensors.Mask(masks),
    )
    sample = transform(sample, request.image_seed, request.batch_seed)
    boxes_xyxy = sample.boxes.as_subclass(Tensor)
    label = {"class_labels": sample.labels, "boxes": relative_boxes(boxes_xyxy, sample.size_hw)}
    if sample.masks is not None:
        label["masks"] = sample.masks.as_subclass(Tensor).bool()
    return Item(
        pixels=sample.image.as_subclass(Tensor),
        label=label,
        image_id=image_id,
        index=request.position,
        counted=request.counted,
        orig_size_hw=size_hw,
        segment_map=segment_map,
    )


def read_segments(index: CocoIndex, position: int, size_hw: tuple[int, int]) -> Tensor:
    """Read the panoptic PNG file of an image: the segment of each pixel, int32 `[H, W]`.

    Args:
        index: With `masks`.
        position: Of the image.
        size_hw: Height and width of the image.

    Raises:
        DataError: The file cannot be read, has another size, or lacks a segment.
    """
    path = index.mask_path(position)
    assert path is not None
    name = f"{path} (masks of image id {index.image_ids[position]})"
    segment_map = segment_ids(_read(path, name)[0])
    if segment_map.shape != size_hw:
        raise _wrong_size(name, size_hw, "the image has", segment_map.shape)
    ids = torch.from_numpy(index.object_ids[index.objects(position)])
    missing = ids[~torch.isin(ids, segment_map.unique())].tolist()
    if missing:
        raise DataError(
            f"{name}: no pixel of segments {', '.join(map(str, missing))}, which "
            f"{index.path} lists; remove them there, or correct the masks"
        )
    return segment_map


def read_image(index: CocoIndex, position: int) -> Tensor:
    """Read an image of an index as uint8 `[3, H, W]`: the picture that its labels are on.

    Raises:
        DataError: The file cannot be read; the message has the file, the id and what to do.
    """
    path = index.image_path(position)
    name = f"{path} (image id {index.image_ids[position]})"
    height, width = index.sizes_hw[position].tolist()
    return decode(path, name, (height, width), str(index.path), index.exif)


def decode(
    file: Path | bytes, name: str, size_hw: tuple[int, int], source: str, exif: str
) -> Tensor:
    """Read an image file as uint8 `[3, H, W]`, turned so that it is the picture that labels are on.

    Args:
        file: Path or content.
        name: Name of the file in messages.
        size_hw: Height and width that it has to have.
        source: Where that size is from, for messages.
        exif: "upright" or "stored", if the picture has that size both ways; see `read_coco`.
    """
    stored, orientation = _read(file, name)
    upright = turned_upright(stored, orientation)
    pictures = (stored, upright) if exif == "stored" else (upright, stored)
    for picture in pictures:
        if image_hw(picture) == size_hw:
            return picture
    raise _wrong_size(name, size_hw, f"in {source}", image_hw(upright))


def _wrong_size(
    name: str, expected_hw: Sequence[int], source: str, got_hw: Sequence[int]
) -> DataError:
    (height, width), (got_height, got_width) = expected_hw, got_hw
    return DataError(
        f"{name}: expected {width} x {height} pixels as {source}, got {got_width} x {got_height}; "
        "correct one of the two"
    )


def _read(file: Path | bytes, name: str) -> tuple[Tensor, int]:
    try:
        return read_file(file, name)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{error}; replace the file, remove the image from the annotations, or pass "
            "--bad-images skip"
        ) from error


class Collate:
    """Collates items into a batch, padded at the bottom and on the right.

    Args:
        multiple: Heights and widths are rounded up to it, so that fewer different shapes occur.
    """

    def __init__(self, multiple: int = 1) -> None:
        self.multiple = multiple

    def __call__(self, results: Sequence[Item | str]) -> Batch:
        failures = [result for result in results if isinstance(result, str)]
        items = [result for result in results if not isinstance(result, str)]
        pixels = mask = None
        if items:
            pixels, mask = self._pad(items)
        maps = [item["segment_map"] for item in items if item["segment_map"] is not None]
        return Batch(
            pixels=pixels,
            pixel_mask=mask,
            labels=[item["label"] for item in items],
            image_ids=[item["image_id"] for item in items],
            indices=[item["index"] for item in items],
            counted=[item["counted"] for item in items],
            orig_sizes_hw=[item["orig_size_hw"] for item in items],
            failures=failures,
            segment_maps=maps or None,
        )

    def _pad(self, items: list[Item]) -> tuple[Tensor, Tensor | None]:
        """Pad images and masks; return pixels and pixel mask."""
        height, width = (
            -(-max(item["pixels"].shape[axis] for item in items) // self.multiple) * self.multiple
            for axis in (1, 2)
        )
        pixels = items[0]["pixels"].new_zeros(len(items), 3, height, width)
        mask = torch.zeros(len(items), height, width, dtype=torch.bool)
        for row, row_mask, item in zip(pixels, mask, items, strict=True):
            image, label = item["pixels"], item["label"]
            row[:, : image.shape[1], : image.shape[2]] = image
            row_mask[: image.shape[1], : image.shape[2]] = True
            if "masks" in label:
                padding = (0, width - image.shape[2], 0, height - image.shape[1])
                label["masks"] = F.pad(label["masks"], padding)
        return pixels, None if mask.all() else mask
