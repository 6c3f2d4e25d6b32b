"""COCO annotation files, read into arrays that worker processes share without copying.

A list of dictionaries for 118,000 images is copied page by page into every worker, since reading an
object in Python writes its reference count; arrays are not.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cdetr_fast.training.errors import DataError

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
        object_ids: int64 `[M]`, as the file has them (segment ids in panoptic files).
        boxes_xywh: float64 `[M, 4]`, left, top, width, height in pixels.
        areas: float64 `[M]`.
        labels: int64 `[M]` indices into `classes`; -1 where the category is not in the file.
        crowd: bool `[M]`.
        classes: K names, in the order of category ids.
        category_ids: int64 `[K]`.
        mask_names: N names relative to `masks`, or None.
        stuff: Names of classes that are stuff (`isthing` 0), not things.
        strays: Ids of annotations whose image is not in the file.
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
    strays: list[Any] = field(default_factory=list)

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
        """Returns a COCO dictionary for evaluation; category ids are labels, ids count from 1."""
        owner = self.image_ids[self.image_of_object()].tolist()
        rows = zip(
            owner,
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
                for i, (h, w) in zip(self.image_ids.tolist(), self.sizes_hw.tolist(), strict=True)
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
    categories = sorted(content["categories"], key=lambda c: _get(c, "id", path, "category"))
    ids = [c["id"] for c in categories]
    classes = tuple(str(_get(c, "name", path, f"category {c['id']}")) for c in categories)
    _require_unique(ids, path, "category id")
    _require_unique(classes, path, "category name")
    label_of = {category: label for label, category in enumerate(ids)}

    records = content["images"]
    image_ids = [_get(record, "id", path, "image") for record in records]
    _require_unique(image_ids, path, "image id")
    file_names = [str(_get(r, "file_name", path, f"image {r['id']}")) for r in records]
    folder = _find_images(path, images, file_names)
    position = {image: i for i, image in enumerate(image_ids)}
    grouped: list[list[dict]] = [[] for _ in records]
    strays = []
    mask_names = None
    if masks is None:
        for item in content["annotations"]:
            name = f"annotation {item.get('id', item)}"
            where = position.get(_get(item, "image_id", path, name))
            _get(item, "category_id", path, name)
            _get(item, "bbox", path, name)
            if where is None:
                strays.append(item.get("id"))
            else:
                grouped[where].append(item)
    else:
        mask_names = [""] * len(records)
        for item in content["annotations"]:
            name = f"annotation of image {_get(item, 'image_id', path, 'annotation')}"
            where = position.get(item["image_id"])
            if where is None:
                strays.append(item["image_id"])
                continue
            mask_names[where] = _get(item, "file_name", path, name)
            grouped[where] = _get(item, "segments_info", path, name)
            for segment in grouped[where]:
                _get(segment, "category_id", path, name)
        for record, name in zip(records, mask_names, strict=True):
            if not name:
                raise DataError(f"{path}: image {record['id']} has no panoptic annotation")
    flat = [item for group in grouped for item in group]
    boxes = _boxes(flat, path)
    return CocoIndex(
        path=path,
        images=folder,
        masks=None if masks is None else Path(masks),
        image_ids=np.array(image_ids, dtype=np.int64),
        file_names=file_names,
        sizes_hw=np.array([_size(r, folder, path) for r in records], np.int32).reshape(-1, 2),
        offsets=np.cumsum([0, *(len(group) for group in grouped)]),
        object_ids=np.array([item.get("id", -1) for item in flat], dtype=np.int64),
        boxes_xywh=boxes,
        areas=np.array(
            [item.get("area", w * h) for item, (_, _, w, h) in zip(flat, boxes, strict=True)],
            dtype=np.float64,
        ),
        labels=np.array([label_of.get(item["category_id"], -1) for item in flat], dtype=np.int64),
        crowd=np.array([bool(item.get("iscrowd", 0)) for item in flat], dtype=bool),
        classes=classes,
        category_ids=np.array(ids, dtype=np.int64),
        mask_names=mask_names,
        stuff=frozenset(str(c["name"]) for c in categories if c.get("isthing", 1) == 0),
        strays=strays,
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; expected a COCO JSON file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: broken JSON ({error}); write the file anew") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{path}: expected a COCO dictionary with a list {key!r}")
    for key in ("images", "categories"):
        if not content[key]:
            raise DataError(f"{path}: expected at least one entry in {key!r}, got none")
    return content


def _get(item: Any, key: str, path: Path, what: str) -> Any:
    if not isinstance(item, dict) or key not in item:
        raise DataError(f"{path}: {what}: expected the key {key!r}, got {str(item)[:200]}")
    return item[key]


def _require_unique(values: Sequence, path: Path, what: str) -> None:
    seen = set()
    for value in values:
        if value in seen:
            raise DataError(f"{path}: {what} {value!r} comes twice; ids and names must be unique")
        seen.add(value)


def _boxes(items: list[dict], path: Path) -> np.ndarray:
    boxes = np.full((len(items), 4), np.nan)
    for row, item in zip(boxes, items, strict=True):
        try:
            row[:] = item["bbox"]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}: annotation {item.get('id')}: expected bbox = [left, top, width, height], "
                f"got {item.get('bbox')!r}"
            ) from error
    return boxes


def _size(record: dict, folder: Path, path: Path) -> tuple[int, int]:
    if "height" in record and "width" in record:
        return int(record["height"]), int(record["width"])
    try:
        with Image.open(folder / record["file_name"]) as image:
            return image.height, image.width
    except OSError as error:
        raise DataError(
            f"{path}: image {record['id']} has no width and height, and "
            f"{folder / record['file_name']} cannot be read ({error})"
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
        if any((folder / name).is_file() for name in file_names[:20]):
            return folder
    raise DataError(
        f"images of {path}: not found in {', '.join(map(str, tried))}; name their folder "
        "(train_images, val_images)"
    )
