"""Training or evaluation set as arrays, which worker processes share without copying.

A list of dictionaries for 118,000 images would be copied page by page into every worker, since
reading an object in Python writes its reference count; arrays are not.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cdetr_fast.images.coco import object_mask
from cdetr_fast.images.segments import coco_rle
from cdetr_fast.training.errors import DataError

_SHOWN = 12  # names of classes in an error


@dataclass(frozen=True)
class CocoIndex:
    """The content of an annotation file.

    Attributes:
        path: The JSON file.
        images: Folder of the images.
        masks: Folder of panoptic PNG files, or None.
        image_ids: int64 `[N]`.
        file_names: N names relative to `images`.
        sizes_hw: int32 `[N, 2]`, pixels, as the file has them.
        offsets: int64 `[N + 1]`; the objects of image i are `offsets[i]:offsets[i + 1]`.
        object_ids: int64 `[M]`, as the file has them (segment ids in panoptic files); -1 for
            objects without an id.
        boxes_xywh: float64 `[M, 4]`, left, top, width, height in pixels.
        areas: float64 `[M]`.
        labels: int64 `[M]` indices into `classes`; -1 where the category is not in the file.
        crowd: bool `[M]`.
        classes: K names, in the order of category ids.
        category_ids: int64 `[K]`.
        mask_names: N names relative to `masks`; empty without masks.
        stuff: Names of classes that are stuff (`isthing` 0), not things.
        segmentation_spans: int64 `[M, 2]`, start and end of an object's segmentation in
            `segmentation_text`; (0, 0) without one, (-1, -1) if it is no mask.
        segmentation_text: uint8, JSON of the segmentations; None if they were not read.
        exif: Which picture labels are on, where the size of an image does not show it: "upright",
            as its EXIF orientation turns it, or "stored".
        unassigned: Ids of annotations whose image is not in the file; in panoptic files, ids of
            those images.
    """

    path: Path
    images: Path
    masks: Path | None
    image_ids: np.ndarray
    file_names: list[str]
    sizes_hw: np.ndarray
    offsets: np.ndarray
    object_ids: np.ndarray
    boxes_xywh: np.ndarray
    areas: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    classes: tuple[str, ...]
    category_ids: np.ndarray
    mask_names: list[str] = field(default_factory=list)
    stuff: frozenset[str] = frozenset()
    exif: Literal["upright", "stored"] = "upright"
    unassigned: list[int] = field(default_factory=list)
    segmentation_spans: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    segmentation_text: np.ndarray | None = None

    def __post_init__(self) -> None:
        if len(self.segmentation_spans) == 0:
            spans = np.zeros((self.num_objects, 2), np.int64)
            object.__setattr__(self, "segmentation_spans", spans)

    def __len__(self) -> int:
        return len(self.file_names)

    @property
    def num_objects(self) -> int:
        """Number of objects M."""
        return len(self.labels)

    def image_path(self, index: int) -> Path:
        """Return the path of an image."""
        return self.images / self.file_names[index]

    def mask_path(self, index: int) -> Path | None:
        """Return the path of an image's panoptic PNG file; None without masks."""
        return None if self.masks is None else self.masks / self.mask_names[index]

    def objects(self, index: int) -> slice:
        """Return the part of the arrays of objects that belongs to an image."""
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))

    def mask(self, item: int, image: int) -> Tensor:
        """Return the mask of an object whose segmentation was read, bool `[H, W]`."""
        assert self.segmentation_text is not None
        height, width = self.sizes_hw[image].tolist()
        start, end = self.segmentation_spans[item].tolist()
        if end <= start:  # a crowd may have none
            return torch.zeros(height, width, dtype=torch.bool)
        content = json.loads(self.segmentation_text[start:end].tobytes())
        return object_mask(content, (height, width))

    @property
    def has_segmentations(self) -> bool:
        """Whether any object has a segmentation that was read."""
        return self.segmentation_text is not None and bool((self.segmentation_spans != 0).any())

    def without_segmentations(self) -> CocoIndex:
        """Return the index of the boxes alone."""
        return dataclasses.replace(self, segmentation_text=None)

    def image_of_object(self) -> np.ndarray:
        """Return the image index of every object, int64 `[M]`."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def select(self, images: np.ndarray, objects: np.ndarray) -> CocoIndex:
        """Return the index of the images and objects for which the masks are True."""
        owner = self.image_of_object()
        objects = objects & images[owner]
        counts = np.bincount(owner[objects], minlength=len(self))[images]
        kept = np.flatnonzero(images).tolist()
        per_object = ("object_ids", "boxes_xywh", "areas", "labels", "crowd", "segmentation_spans")
        return dataclasses.replace(
            self,
            **{name: getattr(self, name)[objects] for name in per_object},
            image_ids=self.image_ids[images],
            sizes_hw=self.sizes_hw[images],
            offsets=np.concatenate([[0], np.cumsum(counts)]),
            file_names=[self.file_names[i] for i in kept],
            mask_names=[self.mask_names[i] for i in kept] if self.mask_names else [],
            unassigned=[],
        )

    def with_classes(self, classes: Sequence[str], owner: str) -> CocoIndex:
        """Return the index with labels that follow another order of classes.

        Args:
            classes: Class names, those of a model for example.
            owner: What has these classes, for the message.

        Raises:
            DataError: A class of this file is not among them.
        """
        position = {name: i for i, name in enumerate(classes)}
        missing = [name for name in self.classes if name not in position]
        if missing:
            raise DataError(
                f"{self.path}: classes {_some(missing)} are not among the {len(classes)} of "
                f"{owner}: {_some(classes)}; take a model trained on these classes, or rename the "
                "categories in the file"
            )
        order = np.array([position[name] for name in self.classes] + [-1])  # -1 stays -1
        ids = np.full(len(classes), -1, dtype=np.int64)
        ids[order[:-1]] = self.category_ids
        return dataclasses.replace(
            self, labels=order[self.labels], classes=tuple(classes), category_ids=ids
        )

    def coco_dictionary(self, with_masks: bool = False) -> dict[str, Any]:
        """Return a COCO dictionary for evaluation; ids of images and categories are our indices.

        Evaluation takes ids as fp64, which does not hold all that a file may have.

        Args:
            with_masks: Whether annotations have a `segmentation`, as run lengths.
        """
        owners = self.image_of_object().tolist()
        masks: list[dict[str, Any]] = [{}] * self.num_objects
        if with_masks:
            masks = [
                {"segmentation": coco_rle(self.mask(item, image).to(torch.uint8), [1])[0]}
                for item, image in enumerate(owners)
            ]
        rows = zip(
            owners,
            self.labels.tolist(),
            self.boxes_xywh.tolist(),
            self.areas.tolist(),
            self.crowd.tolist(),
            masks,
            strict=True,
        )
        return {
            "info": {},
            "images": [
                {"id": i, "height": h, "width": w}
                for i, (h, w) in enumerate(self.sizes_hw.tolist())
            ],
            "annotations": [
                {
                    "id": k,
                    "image_id": image,
                    "category_id": label,
                    "bbox": box,
                    "area": area,
                    "iscrowd": int(crowd),
                    **mask,
                }
                for k, (image, label, box, area, crowd, mask) in enumerate(rows, 1)
            ],
            "categories": [{"id": i, "name": name} for i, name in enumerate(self.classes)],
        }


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:_SHOWN]))
    return shown + (", ..." if len(names) > _SHOWN else "")
