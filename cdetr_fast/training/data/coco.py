"""Reader of COCO annotation files, detection and panoptic."""

from __future__ import annotations

import json
import os
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, Field

from cdetr_fast.common.validation import Expected
from cdetr_fast.images.load import read_header
from cdetr_fast.training.data.index import CocoIndex
from cdetr_fast.training.data.records import (
    Annotation,
    Category,
    ImageRecord,
    ObjectRecord,
    PanopticAnnotation,
    Segment,
    parsed,
    parsed_whole,
)
from cdetr_fast.training.errors import DataError

Exif = Literal["auto", "upright", "stored"]
"""Which picture labels are on; see `read_coco`."""

_HEADERS_READ = 200  # for the orientation of a set

# The arrays of objects of a `CocoIndex`.
_PER_OBJECT = [
    ("object_ids", np.int64, ()),
    ("boxes_xywh", np.float64, (4,)),
    ("areas", np.float64, ()),
    ("labels", np.int64, ()),
    ("crowd", np.bool_, ()),
]
_OBJECT = np.dtype([("image", np.int64, ()), *_PER_OBJECT])  # image: its position


class _CocoFile(BaseModel):
    """A COCO file, whose records are checked one by one."""

    images: Annotated[list[Any], Field(min_length=1), Expected("a list with at least one entry")]
    annotations: list[Any]
    categories: list[Any]


def read_coco(
    annotations: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
    masks: str | os.PathLike[str] | None = None,
    exif: Exif = "auto",
) -> CocoIndex:
    """Read a COCO annotation file, detection or (with `masks`) panoptic.

    Category ids may have gaps: labels count from 0 in the order of the ids.

    Labels may be on a photograph as its EXIF orientation turns it, or as it is stored. Where only
    one of the two has the size that the file gives, it is that one; `exif` says which it is
    elsewhere (orientations 2 to 4, square images, images whose size the file does not give).

    Args:
        annotations: The JSON file.
        images: Folder of the images; None looks in the usual places.
        masks: Folder of the panoptic PNG files.
        exif: "upright", "stored", or "auto": as the sizes of other images of the file show (the
            first 200, evenly spread), upright if none does.

    Raises:
        DataError: A file is missing or broken, or ids are not unique.
    """
    path = Path(annotations)
    content = _read(path)
    categories = sorted_categories(
        parsed(Category, content.categories, str(path), "category"), path
    )
    records = list(parsed(ImageRecord, content.images, str(path), "image"))
    file_names = [record.file_name for record in records]
    _require_unique((record.id for record in records), path, "image id")
    folder = _find_images(path, images, file_names)
    position = {record.id: i for i, record in enumerate(records)}
    label_of = {category.id: label for label, category in enumerate(categories)}
    unassigned: list[int] = []
    mask_names: dict[int, str] = {}
    if masks is None:
        rows = _detection_rows(content.annotations, path, position, label_of, unassigned)
    else:
        rows = _panoptic_rows(content.annotations, path, position, label_of, unassigned, mask_names)
    objects = np.fromiter(rows, _OBJECT)
    for image, i in position.items():
        if masks is not None and i not in mask_names:
            raise DataError(f"{path}: image {image} has no panoptic annotation")
    objects = objects[np.argsort(objects["image"], kind="stable")]
    sizes_hw = [_size(record, folder, path, exif) for record in records]
    return CocoIndex(
        path=path,
        images=folder,
        masks=None if masks is None else Path(masks),
        image_ids=np.array(list(position), dtype=np.int64),
        file_names=file_names,
        sizes_hw=np.array(sizes_hw, np.int32),
        exif=_shown_orientation(folder, file_names, sizes_hw) if exif == "auto" else exif,
        offsets=np.searchsorted(objects["image"], np.arange(len(records) + 1)),
        classes=tuple(category.name for category in categories),
        category_ids=np.array(list(label_of), dtype=np.int64),
        mask_names=[mask_names[i] for i in sorted(mask_names)],
        stuff=frozenset(category.name for category in categories if not category.isthing),
        unassigned=unassigned,
        **{name: np.ascontiguousarray(objects[name]) for name, *_ in _PER_OBJECT},
    )


def _read(path: Path) -> _CocoFile:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; expected a COCO JSON file") from error
    except (ValueError, RecursionError) as error:  # the second for thousands of nested brackets
        raise DataError(f"{path}: broken JSON ({error}); write the file again") from error
    hint = "a COCO file has the lists 'images', 'annotations' and 'categories'"
    return parsed_whole(_CocoFile, content, str(path), hint)


def sorted_categories(categories: Iterable[Category], path: Path | str) -> list[Category]:
    """Return categories in the order of their ids.

    Args:
        categories: Those of a file.
        path: The file, for messages.

    Raises:
        DataError: There are none, or two of them have the same id or name.
    """
    found = sorted(categories, key=lambda category: category.id)
    if not found:
        raise DataError(f"{path}: expected at least one entry in 'categories', got none")
    _require_unique((category.id for category in found), path, "category id")
    _require_unique((category.name for category in found), path, "category name")
    return found


def _row(image: int, record: ObjectRecord, label_of: dict[int, int]) -> tuple[Any, ...]:
    box = record.bbox
    area = record.area if "area" in record.model_fields_set else box[2] * box[3]
    return image, record.id, box, area, label_of.get(record.category_id, -1), record.iscrowd


def _detection_rows(
    items: list[Any],
    path: Path,
    position: dict[int, int],
    label_of: dict[int, int],
    unassigned: list[int],
) -> Iterator[tuple[Any, ...]]:
    """Yield the objects of a detection file; ids of those without an image go to `unassigned`."""
    for record in parsed(Annotation, items, str(path), "annotation"):
        image = position.get(record.image_id)
        if image is None:
            unassigned.append(record.id)
        else:
            yield _row(image, record, label_of)


def _panoptic_rows(
    items: list[Any],
    path: Path,
    position: dict[int, int],
    label_of: dict[int, int],
    unassigned: list[int],
    mask_names: dict[int, str],
) -> Iterator[tuple[Any, ...]]:
    """Yield the segments of a panoptic file.

    Names of PNG files go to `mask_names`, by the position of the image; ids of images that the file
    does not list go to `unassigned`.
    """
    for record in parsed(PanopticAnnotation, items, str(path), "panoptic annotation"):
        image = position.get(record.image_id)
        if image is None:
            unassigned.append(record.image_id)
            continue
        source = f"{path}: image {record.image_id}"
        if image in mask_names:
            raise DataError(f"{source} has two panoptic annotations; remove one of them")
        mask_names[image] = record.file_name
        for segment in parsed(Segment, record.segments_info, source, "segment"):
            yield _row(image, segment, label_of)


def _require_unique(values: Iterable[Hashable], path: Path | str, what: str) -> None:
    seen = set()
    for value in values:
        if value in seen:
            raise DataError(f"{path}: {what} {value!r} comes twice; ids and names must be unique")
        seen.add(value)


def _size(record: ImageRecord, folder: Path, path: Path, exif: Exif) -> tuple[int, int]:
    if record.model_fields_set >= {"height", "width"}:
        return record.height, record.width
    try:
        header = read_header(folder / record.file_name)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: image {record.id} has no width and height, and {error}; add them to the "
            "file, or remove the image from it"
        ) from error
    return header.stored_hw if exif == "stored" else header.upright_hw


def _shown_orientation(
    folder: Path, file_names: list[str], sizes_hw: list[tuple[int, int]]
) -> Literal["upright", "stored"]:
    """Return which picture labels are on, as far as the sizes of turned photographs show it."""
    shown = set()
    step = -(-len(file_names) // _HEADERS_READ)
    for name, size_hw in zip(file_names[::step], sizes_hw[::step], strict=True):
        try:
            header = read_header(folder / name)
        except (OSError, ValueError):  # reported where the image is needed
            continue
        if header.upright_hw != header.stored_hw:
            shown.add({header.upright_hw: "upright", header.stored_hw: "stored"}.get(size_hw))
    return "stored" if shown - {None} == {"stored"} else "upright"


def _find_images(path: Path, images: str | os.PathLike[str] | None, file_names: list[str]) -> Path:
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
