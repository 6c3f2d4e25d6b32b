"""Reader of Pascal VOC annotations, in a folder of their own or beside the images."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from cdetr_fast.common import progress
from cdetr_fast.common.validation import Expected, first_problem
from cdetr_fast.images.load import IMAGE_SUFFIXES, visible
from cdetr_fast.training.data.labelled import (
    LabelledImage,
    LabelledObject,
    read_lines,
    split_folders,
)
from cdetr_fast.training.errors import DataError

_ANNOTATIONS = ("Annotations", "annotations")
_IMAGES = ("JPEGImages", "images", "Images")

# Numbers come as text, which pydantic parses.
_Pixels = Annotated[int, Expected("a whole number of pixels")]
_Coordinate = Annotated[float, Field(allow_inf_nan=False), Expected("a number of pixels")]


class _Box(BaseModel):
    xmin: _Coordinate
    ymin: _Coordinate
    xmax: _Coordinate
    ymax: _Coordinate


class _Object(BaseModel):
    name: Annotated[str, Field(min_length=1), Expected("the name of a class")]
    difficult: Annotated[bool, Expected("0 or 1")] = False
    bndbox: _Box


class _Size(BaseModel):
    width: _Pixels
    height: _Pixels


class _Annotation(BaseModel):
    filename: str = ""
    size: _Size
    object: list[_Object]


def read_voc(source: Path) -> tuple[list[str], dict[str, list[LabelledImage]]]:
    """Read VOC's folders, Roboflow's with one for each split, or XML files beside images.

    Returns:
        Classes in alphabetical order, and the images of each split by its name: "all" if the set is
        not divided.

    Raises:
        DataError: The folder has another structure, or a file is broken.
    """
    splits = _lists(source) or {
        name: _files(folder) for name, folder in split_folders(source).items()
    }
    if not any(splits.values()):
        splits = {"all": _files(source)}
    if not any(splits.values()):
        raise DataError(
            f"{source}: expected the folders Annotations and JPEGImages of Pascal VOC, or images "
            "and XML files, in that folder or in train, valid and test in it"
        )
    found = {
        name: [_read_file(path, source) for path in progress.track(paths, f"reading {name}")]
        for name, paths in splits.items()
    }
    names = {item.label for images in found.values() for image in images for item in image.objects}
    return sorted(names), found


def voc_image_folder(source: Path) -> Path:
    """Return the folder that the names of images are relative to."""
    if _folder(source, _ANNOTATIONS) is None:
        return source
    return _folder(source, _IMAGES) or source / _IMAGES[0]


def is_voc(source: Path) -> bool:
    """Return whether a folder has annotations of Pascal VOC that no folders of splits divide."""
    return bool(_files(_folder(source, _ANNOTATIONS) or source))


def _folder(source: Path, names: Iterable[str]) -> Path | None:
    return next((source / name for name in names if (source / name).is_dir()), None)


def _files(folder: Path) -> list[Path]:
    return visible(folder, folder.glob("*.xml"), {".xml"})


def _lists(source: Path) -> dict[str, list[Path]]:
    """Return the annotation files of each split in VOC's own folders."""
    folder, lists = _folder(source, _ANNOTATIONS), source / "ImageSets" / "Main"
    if folder is None:
        return {}
    splits = {}
    for path in visible(lists, lists.glob("*.txt"), {".txt"}):
        rows = [line.split() for line in read_lines(path) if line.strip()]
        # The class lists ("dog_train.txt") repeat the splits with a column of labels.
        if rows and all(len(row) == 1 for row in rows):
            splits[path.stem] = [folder / f"{row[0]}.xml" for row in rows]
    return splits or {"all": _files(folder)}


def _read_file(path: Path, source: Path) -> LabelledImage:
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise DataError(f"{path}: expected an annotation of Pascal VOC ({error})") from error
    content = _fields(root) | {"object": [_fields(item) for item in root.iter("object")]}
    try:
        found = _Annotation.model_validate(content)
    except ValidationError as error:
        problem = first_problem(error, _Annotation, content)
        raise DataError(f"{problem.line(str(path))}; correct the file") from error
    images = voc_image_folder(source)
    own = images if images != source else path.parent
    name = found.filename or f"{path.stem}.jpg"
    if not (own / name).is_file():  # some tools write a name that no file has
        suffixes = (s for s in sorted(IMAGE_SUFFIXES) if (own / f"{path.stem}{s}").is_file())
        name = next((f"{path.stem}{s}" for s in suffixes), name)
    return LabelledImage(
        str((own / name).relative_to(images)),
        found.size.width,
        found.size.height,
        [_object(item) for item in found.object],
    )


def _fields(element: ElementTree.Element) -> dict[str, Any]:
    """Return the children of an element, those without children as text."""
    return {
        child.tag: _fields(child) if len(child) else (child.text or "").strip() for child in element
    }


def _object(item: _Object) -> LabelledObject:
    box = item.bndbox
    # VOC counts pixels from 1 and includes the last one.
    box_xywh = [box.xmin - 1, box.ymin - 1, box.xmax - box.xmin + 1, box.ymax - box.ymin + 1]
    # Evaluation by VOC's rules ignores difficult objects, as COCO's does with crowds.
    return LabelledObject(item.name, box_xywh, item.difficult)
