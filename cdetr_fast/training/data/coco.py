"""Reader of COCO annotation files, detection and panoptic."""

from __future__ import annotations

import json
import os
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, Field

from cdetr_fast.common import progress
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
from cdetr_fast.training.data.segmentation_text import NO_SEGMENTATION, SegmentationText
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
    ("segmentation_spans", np.int64, (2,)),
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
    segments: bool = False,
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
        segments: Whether to read the masks of a detection file too (`segmentation`).

    Raises:
        DataError: A file is missing or broken, or ids are not unique.
    """
    path = Path(annotations)
    with progress.task(f"reading {path.name}"):
        return index_of(load_json(path), path, images, masks, exif, segments)


def index_of(
    json_content: Any,
    path: Path,
    images: str | os.PathLike[str] | None,
    masks: str | os.PathLike[str] | None,
    exif: Exif,
    segments: bool,
) -> CocoIndex:
    """Return the index of a COCO file's content; see `read_coco`.

    Args:
        json_content: What `json.loads` returns.
        path: The file, for messages.
        images: As in `read_coco`, and so are the others.
        masks: See there.
        exif: See there.
        segments: See there.
    """
    content = read_content(json_content, path)
    categories = sorted_categories(
        _real_categories(
            list(parsed(Category, content.categories, str(path), "category")), content
        ),
        path,
    )
    records = list(parsed(ImageRecord, content.images, str(path), "image"))
    file_names = [record.file_name for record in records]
    _require_unique((record.id for record in records), path, "image id")
    folder = find_images(path, images, file_names)
    if masks is not None and not Path(masks).is_dir():
        raise DataError(f"masks of {path}: expected a folder of panoptic PNG files, got {masks}")
    position = {record.id: i for i, record in enumerate(records)}
    label_of = {category.id: label for label, category in enumerate(categories)}
    unassigned: list[int] = []
    mask_names: dict[int, str] = {}
    sizes_hw = [_size(record, folder, path, exif) for record in records]
    text = SegmentationText(sizes_hw) if segments and masks is None else None
    if masks is None:
        if text is not None:
            _require_no_panoptic(content.annotations, path)
        rows = _detection_rows(content.annotations, path, position, label_of, unassigned, text)
    else:
        rows = _panoptic_rows(content.annotations, path, position, label_of, unassigned, mask_names)
    objects = np.fromiter(rows, _OBJECT)
    for image, i in position.items():
        if masks is not None and i not in mask_names:
            raise DataError(f"{path}: image {image} has no panoptic annotation")
    objects = objects[np.argsort(objects["image"], kind="stable")]
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
        segmentation_text=None if text is None else text.array(),
        **{name: np.ascontiguousarray(objects[name]) for name, *_ in _PER_OBJECT},
    )


def load_json(path: Path) -> Any:
    """Read a JSON file; DataError if it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; expected a COCO JSON file") from error
    except (ValueError, RecursionError) as error:  # the second for thousands of nested brackets
        raise DataError(f"{path}: broken JSON ({error}); write the file again") from error


def read_content(content: Any, path: Path) -> _CocoFile:
    """Return the lists of a COCO file; DataError if it has others."""
    hint = "a COCO file has the lists 'images', 'annotations' and 'categories'"
    return parsed_whole(_CocoFile, content, str(path), hint)


def _real_categories(categories: list[Category], content: _CocoFile) -> list[Category]:
    """Leave out Roboflow's placeholder: the group of all classes, of which there are no objects.

    It is named after the project, and often like one of the classes.
    """
    groups = {category.supercategory for category in categories}
    suspects = {c.id for c in categories if c.supercategory == "none" and c.name in groups}
    if suspects:
        for item in content.annotations:
            suspects.discard(item.get("category_id") if isinstance(item, dict) else None)
    return [category for category in categories if category.id not in suspects]


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


def _require_no_panoptic(items: list[Any], path: Path) -> None:
    if any(isinstance(item, dict) and "segments_info" in item for item in items):
        raise DataError(
            f"{path}: a panoptic file: train_masks: expected the folder of panoptic PNG files (or "
            "val_masks, masks), got None"
        )


def _row(
    image: int,
    record: ObjectRecord,
    label_of: dict[int, int],
    span: tuple[int, int] = NO_SEGMENTATION,
) -> tuple[Any, ...]:
    box = record.bbox
    area = record.area if "area" in record.model_fields_set else box[2] * box[3]
    label = label_of.get(record.category_id, -1)
    return image, record.id, box, area, label, record.iscrowd, span


def _detection_rows(
    items: list[Any],
    path: Path,
    position: dict[int, int],
    label_of: dict[int, int],
    unassigned: list[int],
    text: SegmentationText | None,
) -> Iterator[tuple[Any, ...]]:
    """Yield the objects of a detection file; ids of those without an image go to `unassigned`."""
    for record in parsed(Annotation, items, str(path), "annotation"):
        image = position.get(record.image_id)
        if image is None:
            unassigned.append(record.id)
        else:
            span = NO_SEGMENTATION if text is None else text.add(record.segmentation, image)
            yield _row(image, record, label_of, span)


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


def find_images(path: Path, images: str | os.PathLike[str] | None, file_names: list[str]) -> Path:
    """Return the folder of a file's images: the one that is given, or one of the usual places.

    Raises:
        DataError: It is not there.
    """
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
        "(images; train_images and val_images of train)"
    )
