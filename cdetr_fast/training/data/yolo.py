"""Reader of YOLO data sets: data.yaml, images, and labels that are boxes, polygons or poses."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from cdetr_fast.common import progress
from cdetr_fast.images.load import image_files, read_header
from cdetr_fast.training.config import read_yaml
from cdetr_fast.training.data.labelled import LabelledImage, LabelledObject, read_lines
from cdetr_fast.training.errors import DataError

_ROUNDING = 0.01  # tolerance of relative coordinates outside 0 to 1
_BOX_NUMBERS, _POLYGON_NUMBERS = 4, 6


def yolo_settings(source: Path) -> Path | None:
    """Return the data.yaml of a folder, by whatever name."""
    files = [source / "data.yaml", *sorted(source.glob("*.yaml")), *sorted(source.glob("*.yml"))]
    return next((path for path in files if path.is_file()), None)


def read_yolo(
    source: Path, only: Collection[str] = ("train", "val", "test"), exif: str = "upright"
) -> tuple[list[str], dict[str, list[LabelledImage]]]:
    """Read the splits that data.yaml names.

    Args:
        source: Folder of data.yaml.
        only: Splits to read.
        exif: Picture that labels are on, "stored" or as it is turned by its EXIF orientation.

    Returns:
        Classes in the order of their numbers, and the images of each split by its name.

    Raises:
        DataError: The folder has another structure, or a file is broken.
    """
    settings = yolo_settings(source)
    if settings is None:
        raise DataError(f"{source}: expected a data.yaml with the class names (names: [...])")
    content = read_yaml(settings)
    names = _class_names(content, settings)
    keypoints = _keypoint_numbers(content, settings)
    root = source / str(content.get("path") or "")
    if not root.is_dir():
        root = source
    splits, labelled = {}, False
    for split in only:
        entries = content.get(split) or []
        images = []
        for entry in entries if isinstance(entries, list) else [entries]:
            found = _images(str(entry), root, source, f"{settings}: {split}")
            for image in progress.track(found, f"reading {split}"):
                labels = _label_path(image)
                labelled |= labels.is_file()
                images.append(_read_file(source, image, labels, names, keypoints, exif))
        if entries:
            splits[split] = images
    if not splits:
        wanted = " or ".join(map(repr, only)).replace(" or ", ", ", max(0, len(only) - 2))
        raise DataError(f"{settings}: expected a folder for {wanted}")
    if not labelled:
        raise DataError(f"{source}: expected label files (*.txt) in folders 'labels', got none")
    return list(names.values()), splits


def _class_names(content: dict[str, Any], settings: Path) -> dict[int, str]:
    names = content.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names or not all(isinstance(i, int) for i in names):
        raise DataError(f"{settings}: expected 'names', a list of classes, got {names!r}")
    names = {i: str(names[i]) for i in sorted(names)}
    for i, name in names.items():
        if any(other == name for j, other in names.items() if j < i):
            raise DataError(f"{settings}: names: {name!r} comes twice; give class {i} another name")
    return names


def _keypoint_numbers(content: dict[str, Any], settings: Path) -> int:
    """Return how many numbers follow the box of a pose; 0 if the labels are no poses."""
    shape = content.get("kpt_shape")
    if shape is None:
        return 0
    is_pair = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int for n in shape)
    if not is_pair or shape[0] < 1 or shape[1] not in (2, 3):
        raise DataError(f"{settings}: kpt_shape: expected [points, 2 or 3], got {shape!r}")
    return shape[0] * shape[1]


def _images(entry: str, root: Path, source: Path, what: str) -> list[Path]:
    """Return the images of a folder, or of a text file that lists them."""
    # Some exports write "../train/images" for a folder beside data.yaml.
    for place in (root / entry, source / entry.removeprefix("../")):
        if place.is_dir():
            return image_files(place, recursive=True)
        if place.is_file():
            return [root / line.strip() for line in read_lines(place) if line.strip()]
    raise DataError(f"{what}: expected a folder or a list of images, got {entry}")


def _label_path(image: Path) -> Path:
    parts = list(image.parts)
    places = [i for i, part in enumerate(parts) if part == "images"]
    if places:
        parts[places[-1]] = "labels"
    return Path(*parts).with_suffix(".txt")


def _read_file(
    source: Path, image: Path, labels: Path, names: dict[int, str], keypoints: int, exif: str
) -> LabelledImage:
    try:
        header = read_header(image)
    except (OSError, ValueError) as error:
        raise DataError(f"{error}; replace the file, or remove it from the folder") from error
    height, width = header.stored_hw if exif == "stored" else header.upright_hw
    objects = []
    for number, line in enumerate(read_lines(labels) if labels.is_file() else [], 1):
        if not line.strip():
            continue
        try:
            label, *values = line.split()
            objects.append(_object(names[_class_id(label)], values, width, height, keypoints))
        except (ValueError, KeyError) as error:
            shape = f"and {keypoints} numbers of keypoints" if keypoints else "or polygon"
            raise DataError(
                f"{labels}, line {number}: expected class ({min(names)} to {max(names)}) and "
                f"centre, width, height {shape} relative to the image (0 to 1), got {line[:200]!r}"
            ) from error
    return LabelledImage(os.path.relpath(image, source), width, height, objects)


def _class_id(text: str) -> int:
    value = float(text)  # some tools write 3.0
    if not value.is_integer():
        raise ValueError(text)
    return int(value)


def _object(
    label: str, values: list[str], width: int, height: int, keypoints: int
) -> LabelledObject:
    numbers = [float(v) for v in values]
    if keypoints:
        if len(numbers) not in (_BOX_NUMBERS, _BOX_NUMBERS + keypoints):
            raise ValueError(f"{len(numbers)} numbers")
        if not np.isfinite(numbers).all():
            raise ValueError("not finite")
        numbers = numbers[:_BOX_NUMBERS]
    if not all(-_ROUNDING <= v <= 1 + _ROUNDING for v in numbers):  # NaN too
        raise ValueError("pixels, or not finite")
    if len(numbers) == _BOX_NUMBERS:
        x, y, w, h = numbers
        box_xywh = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
        return LabelledObject(label, box_xywh)
    if len(numbers) < _POLYGON_NUMBERS or len(numbers) % 2:
        raise ValueError(f"{len(numbers)} numbers")
    polygon = [v * (height if i % 2 else width) for i, v in enumerate(numbers)]
    xs, ys = polygon[0::2], polygon[1::2]
    box_xywh = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    return LabelledObject(label, box_xywh, polygon=polygon)
