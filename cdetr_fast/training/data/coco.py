"""COCO annotation files, read into arrays that worker processes share without copying.

A list of dictionaries for 118,000 images is copied page by page into every worker, since reading an
object in Python writes its reference count; arrays are not.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from cdetr_fast.training.data.json_fields import (
    BOX,
    FLAG,
    LIST,
    NAME,
    NUMBER,
    PIXELS,
    TEXT,
    WHOLE,
    Place,
    read_field,
)
from cdetr_fast.training.errors import DataError

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What PIL raises for files that are missing, damaged or absurdly large."""

NO_ID = -1
"""Of objects whose annotation has no id."""

_CLASS_SHOWN = 12


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
        object_ids: int64 `[M]`, as the file has them (segment ids in panoptic files); or `NO_ID`.
        boxes_xywh: float64 `[M, 4]`, left, top, width, height in pixels.
        areas: float64 `[M]`.
        labels: int64 `[M]` indices into `classes`; -1 where the category is not in the file.
        crowd: bool `[M]`.
        classes: K names, in the order of category ids.
        category_ids: int64 `[K]`.
        mask_names: N names relative to `masks`, or None.
        stuff: Names of classes that are stuff (`isthing` 0), not things.
        strays: Ids of annotations whose image is not in the file; in panoptic files, of the image.
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
    mask_names: list[str] | None = None
    stuff: frozenset[str] = frozenset()
    strays: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.file_names)

    @property
    def num_objects(self) -> int:
        """Number of objects M."""
        return len(self.labels)

    def image_path(self, index: int) -> Path:
        """Returns the file of an image."""
        return self.images / self.file_names[index]

    def objects(self, index: int) -> slice:
        """Returns where the objects of an image are in the arrays of objects."""
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))

    def image_of_object(self) -> np.ndarray:
        """Returns the image index of every object, int64 `[M]`."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def select(self, images: np.ndarray, objects: np.ndarray) -> CocoIndex:
        """Returns the index with only those images and objects for which the masks are True."""
        owner = self.image_of_object()
        objects = objects & images[owner]
        counts = np.bincount(owner[objects], minlength=len(self))[images]
        kept = np.flatnonzero(images).tolist()
        per_object = ("object_ids", "boxes_xywh", "areas", "labels", "crowd")
        return dataclasses.replace(
            self,
            **{name: getattr(self, name)[objects] for name in per_object},
            image_ids=self.image_ids[images],
            sizes_hw=self.sizes_hw[images],
            offsets=np.concatenate([[0], np.cumsum(counts)]),
            file_names=[self.file_names[i] for i in kept],
            mask_names=self.mask_names and [self.mask_names[i] for i in kept],
            strays=[],
        )

    def with_classes(self, classes: Sequence[str], what: str) -> CocoIndex:
        """Returns the index with labels that count in another order of classes.

        Args:
            classes: Class names, those of a model for example.
            what: What has these classes, for the message.

        Raises:
            DataError: A class of this file is not among them.
        """
        position = {name: i for i, name in enumerate(classes)}
        missing = [name for name in self.classes if name not in position]
        if missing:
            raise DataError(
                f"{self.path}: classes {_some(missing)} are not among the {len(classes)} of "
                f"{what}: {_some(classes)}; take a model trained on these classes, or rename the "
                "categories in the file"
            )
        order = np.array([position[name] for name in self.classes] + [-1])  # -1 stays -1
        ids = np.full(len(classes), -1, dtype=np.int64)
        ids[order[:-1]] = self.category_ids
        return dataclasses.replace(
            self, labels=order[self.labels], classes=tuple(classes), category_ids=ids
        )

    def coco_dictionary(self) -> dict[str, Any]:
        """Returns a COCO dictionary for evaluation; ids of images and categories are our indices.

        Evaluation takes ids as fp64, which does not hold all that a file may have.
        """
        rows = zip(
            self.image_of_object().tolist(),
            self.labels.tolist(),
            self.boxes_xywh.tolist(),
            self.areas.tolist(),
            self.crowd.tolist(),
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
                }
                for k, (image, label, box, area, crowd) in enumerate(rows, 1)
            ],
            "categories": [{"id": i, "name": name} for i, name in enumerate(self.classes)],
        }


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:_CLASS_SHOWN]))
    return shown + (", ..." if len(names) > _CLASS_SHOWN else "")


def read_coco(
    annotations: str | Path, images: str | Path | None = None, masks: str | Path | None = None
) -> CocoIndex:
    """Reads a COCO annotation file, detection or (with `masks`) panoptic.

    Category ids may have gaps: labels count from 0 in the order of the ids.

    Args:
        annotations: The JSON file.
        images: Folder of the images; None looks where they usually lie.
        masks: Folder of the panoptic PNG files.

    Raises:
        DataError: A file is missing or broken, or ids are not unique.
    """
    path = Path(annotations)
    content = _read(path)
    ids, classes, stuff = read_categories(content["categories"], path)
    records = content["images"]
    places = [Place(str(path), "image", i) for i in range(len(records))]
    rows = list(zip(records, places, strict=True))
    image_ids = [read_field(record, "id", WHOLE, place) for record, place in rows]
    _require_unique(image_ids, path, "image id")
    file_names = [read_field(record, "file_name", TEXT, place) for record, place in rows]
    folder = _find_images(path, images, file_names)
    sizes = [_size(record, folder / record["file_name"], place) for record, place in rows]
    position = {image: i for i, image in enumerate(image_ids)}
    grouped: list[list[_Object]] = [[] for _ in records]
    mask_names = None
    if masks is None:
        strays = _group_annotations(content["annotations"], path, position, grouped)
    else:
        mask_names, strays = _group_segments(content["annotations"], path, position, grouped)
    flat = [item for group in grouped for item in group]
    label_of = {category: label for label, category in enumerate(ids)}
    return CocoIndex(
        path=path,
        images=folder,
        masks=None if masks is None else Path(masks),
        image_ids=np.array(image_ids, dtype=np.int64),
        file_names=file_names,
        sizes_hw=np.array(sizes, np.int32).reshape(-1, 2),
        offsets=np.cumsum([0, *(len(group) for group in grouped)]),
        object_ids=np.array([item.id for item in flat], dtype=np.int64),
        boxes_xywh=np.array([item.box for item in flat], dtype=np.float64).reshape(-1, 4),
        areas=np.array([item.area for item in flat], dtype=np.float64),
        labels=np.array([label_of.get(item.category, -1) for item in flat], dtype=np.int64),
        crowd=np.array([item.crowd for item in flat], dtype=bool),
        classes=classes,
        category_ids=np.array(ids, dtype=np.int64),
        mask_names=mask_names,
        stuff=stuff,
        strays=strays,
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; expected a COCO JSON file") from error
    except (ValueError, RecursionError) as error:  # the second for thousands of nested brackets
        raise DataError(f"{path}: broken JSON ({error}); write the file anew") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{path}: expected a COCO dictionary with a list {key!r}")
    for key in ("images", "categories"):
        if not content[key]:
            raise DataError(f"{path}: expected at least one entry in {key!r}, got none")
    return content


def read_categories(
    records: list[Any], path: Path | str
) -> tuple[list[int], tuple[str, ...], frozenset[str]]:
    """Returns ids and names in the order of the ids, and the names of those that are stuff.

    Args:
        records: COCO's list of categories, not empty.
        path: The file, for messages.

    Raises:
        DataError: One of them has no id or name, or the same as another one.
    """
    found = []
    for i, record in enumerate(records):
        place = Place(str(path), "category", i)
        found.append(
            (
                read_field(record, "id", WHOLE, place),
                read_field(record, "name", NAME, place),
                read_field(record, "isthing", FLAG, place, True),
            )
        )
    _require_unique([category for category, _, _ in found], path, "category id")
    _require_unique([name for _, name, _ in found], path, "category name")
    ids, names, things = zip(*sorted(found), strict=True)
    stuff = frozenset(name for name, thing in zip(names, things, strict=True) if not thing)
    return list(ids), names, stuff


class _Object(NamedTuple):
    id: int
    category: int
    box: list[float]
    area: float
    crowd: bool


def _read_object(item: Any, place: Place) -> _Object:
    box = read_field(item, "bbox", BOX, place)
    return _Object(
        read_field(item, "id", WHOLE, place, NO_ID),
        read_field(item, "category_id", WHOLE, place),
        box,
        read_field(item, "area", NUMBER, place, box[2] * box[3]),
        read_field(item, "iscrowd", FLAG, place, False),
    )


def _group_annotations(
    items: list[Any], path: Path, position: dict[int, int], grouped: list[list[_Object]]
) -> list[int]:
    """Adds the objects of a detection file to their images; returns ids of those without one."""
    strays = []
    for i, item in enumerate(items):
        place = Place(str(path), "annotation", i)
        where = position.get(read_field(item, "image_id", WHOLE, place))
        found = _read_object(item, place)
        if where is None:
            strays.append(found.id)
        else:
            grouped[where].append(found)
    return strays


def _group_segments(
    items: list[Any], path: Path, position: dict[int, int], grouped: list[list[_Object]]
) -> tuple[list[str], list[int]]:
    """Adds the segments of a panoptic file to their images.

    Returns:
        Of each image the name of its PNG file; and ids of images that the file does not list.
    """
    names: dict[int, str] = {}
    strays = []
    for i, item in enumerate(items):
        place = Place(str(path), "panoptic annotation", i)
        image_id = read_field(item, "image_id", WHOLE, place)
        where = position.get(image_id)
        if where is None:
            strays.append(image_id)
            continue
        if where in names:
            raise DataError(
                f"{path}: image {image_id} has two panoptic annotations; leave one of them"
            )
        names[where] = read_field(item, "file_name", TEXT, place)
        for k, segment in enumerate(read_field(item, "segments_info", LIST, place)):
            inner = Place(f"{path}: image {image_id}", "segment", k)
            read_field(segment, "id", WHOLE, inner)  # which pixels are its own
            grouped[where].append(_read_object(segment, inner))
    for image_id, where in position.items():
        if where not in names:
            raise DataError(f"{path}: image {image_id} has no panoptic annotation")
    return [names[i] for i in range(len(position))], strays


def _require_unique(values: Sequence, path: Path | str, what: str) -> None:
    seen = set()
    for value in values:
        if value in seen:
            raise DataError(f"{path}: {what} {value!r} comes twice; ids and names must be unique")
        seen.add(value)


def _size(record: dict, image: Path, place: Place) -> tuple[int, int]:
    if "height" in record and "width" in record:
        height, width = (read_field(record, key, PIXELS, place) for key in ("height", "width"))
        return height, width
    try:
        with Image.open(image) as picture:
            return picture.height, picture.width
    except UNREADABLE as error:
        raise DataError(
            f"{place.describe(record)} has no width and height, and {image} cannot be read "
            f"({error}); write them into the file, or take the image out of it"
        ) from error


def _find_images(path: Path, images: str | Path | None, file_names: list[str]) -> Path:
    if images is not None:
        if not Path(images).is_dir():
            raise DataError(f"images of {path}: expected a folder, got {images}")
        return Path(images)
    split = path.stem.split("_")[-1]  # instances_train2017.json -> train2017
    parents = (path.parent, path.parent.parent)
    tried = [parent / name for parent in parents for name in ("", split, "images")]
    tried += [parent / "images" / split for parent in parents]
    for folder in tried:
        if any(os.path.isfile(folder / name) for name in file_names[:20]):
            return folder
    raise DataError(
        f"images of {path}: not found in {', '.join(map(str, tried))}; name their folder "
        "(train_images, val_images)"
    )
