"""Conversion of Pascal VOC and YOLO folders to COCO annotation files; images stay in place."""

from __future__ import annotations

import json
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cdetr_fast.common.files import write_text
from cdetr_fast.images.load import IMAGE_SUFFIXES, image_files, read_header, visible
from cdetr_fast.training.config import read_yaml
from cdetr_fast.training.errors import DataError

_ROUNDING = 0.01  # tolerance of relative coordinates outside 0 to 1


def convert(
    kind: str, source: str | os.PathLike[str], output: str | os.PathLike[str]
) -> dict[str, Path]:
    """Write `instances_<split>.json` for every split of a data set.

    Args:
        kind: "voc" (Annotations, JPEGImages and ImageSets/Main) or "yolo" (data.yaml, images and
            labels; a polygon becomes its extent).
        source: The folder.
        output: Folder for the JSON files; created if it does not exist.

    Returns:
        The file of each split. File names in them are relative to `image_folder(kind, source)`.

    Raises:
        DataError: The folder has another structure, or a file is broken.
    """
    source, output = Path(source), Path(output)
    if kind not in ("voc", "yolo"):
        raise DataError(f"kind: expected 'voc' or 'yolo', got {kind!r}")
    if not source.is_dir():
        raise DataError(f"source: expected a folder, got {source}")
    classes, splits = (_read_voc if kind == "voc" else _read_yolo)(source)
    if not classes:
        raise DataError(f"{source}: expected annotations with objects, got none")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"output: {output} cannot be made ({error.strerror})") from error
    written = {}
    for split, records in splits.items():
        if not records:
            raise DataError(f"{source}: expected images in split {split!r}, got none")
        path = output / f"instances_{split}.json"
        write_text(path, json.dumps(_coco(records, classes)))
        written[split] = path
    return written


def image_folder(kind: str, source: str | os.PathLike[str]) -> Path:
    """Return the folder that the file names of a converted data set are relative to."""
    return Path(source) / "JPEGImages" if kind == "voc" else Path(source)


Record = tuple[str, int, int, list[tuple[str, list[float], int]]]
"""File name, width, height; and class, box (left, top, width, height) and `iscrowd` per object."""


def _coco(records: list[Record], classes: list[str]) -> dict[str, Any]:
    ids = {name: i for i, name in enumerate(classes, 1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (name, width, height, objects) in enumerate(records, 1):
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        for label, box, crowd in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": ids[label],
                    "bbox": [round(v, 3) for v in box],
                    "area": round(box[2] * box[3], 3),
                    "iscrowd": crowd,
                }
            )
    categories = [{"id": i, "name": name} for name, i in ids.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


# Pascal VOC ---------------------------------------------------------------------------------------


def _read_voc(source: Path) -> tuple[list[str], dict[str, list[Record]]]:
    folder = source / "Annotations"
    if not folder.is_dir():
        raise DataError(f"{source}: expected the folders Annotations and JPEGImages of Pascal VOC")
    splits = {}
    lists = source / "ImageSets" / "Main"
    for path in visible(lists, lists.glob("*.txt"), {".txt"}):
        rows = [line.split() for line in _lines(path) if line.strip()]
        # The class lists ("dog_train.txt") repeat the splits with a column of labels.
        if rows and all(len(row) == 1 for row in rows):
            splits[path.stem] = [row[0] for row in rows]
    if not splits:
        splits = {"all": [path.stem for path in visible(folder, folder.glob("*.xml"), {".xml"})]}
    found = {name: [_read_voc_file(folder, stem) for stem in s] for name, s in splits.items()}
    names = {label for records in found.values() for r in records for label, _, _ in r[3]}
    return sorted(names), found


def _read_voc_file(folder: Path, stem: str) -> Record:
    path = folder / f"{stem}.xml"
    try:
        root = ElementTree.parse(path).getroot()
        width, height = (int(_text(root, f"size/{side}")) for side in ("width", "height"))
        objects = [_voc_object(item) for item in root.iter("object")]
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise DataError(
            f"{path}: expected an annotation of Pascal VOC with size, name and bndbox ({error})"
        ) from error
    images = folder.parent / "JPEGImages"
    name = root.findtext("filename") or f"{stem}.jpg"
    if not (images / name).is_file():  # some tools write a name that no file has
        suffixes = (s for s in sorted(IMAGE_SUFFIXES) if (images / f"{stem}{s}").is_file())
        name = next((f"{stem}{s}" for s in suffixes), name)
    return name, width, height, objects


def _voc_object(item: ElementTree.Element) -> tuple[str, list[float], int]:
    x0, y0, x1, y1 = (
        float(_text(item, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")
    )
    # VOC counts pixels from 1 and includes the last one.
    box = [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1]
    # Evaluation by VOC's rules ignores difficult objects, as COCO's does with crowds.
    return _text(item, "name").strip(), box, int(item.findtext("difficult") or 0)


def _text(element: ElementTree.Element, path: str) -> str:
    text = element.findtext(path)
    if not text:
        raise ValueError(f"{element.tag} has no {path}")
    return text


# YOLO ---------------------------------------------------------------------------------------------


def _read_yolo(source: Path) -> tuple[list[str], dict[str, list[Record]]]:
    files = [source / "data.yaml", *sorted(source.glob("*.yaml")), *sorted(source.glob("*.yml"))]
    settings = next((path for path in files if path.is_file()), None)
    if settings is None:
        raise DataError(f"{source}: expected a data.yaml with the class names (names: [...])")
    content = read_yaml(settings)
    names = content.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names or not all(isinstance(i, int) for i in names):
        raise DataError(f"{settings}: expected 'names', a list of classes, got {names!r}")
    names = {i: str(names[i]) for i in sorted(names)}
    for i, name in names.items():
        if any(other == name for j, other in names.items() if j < i):
            raise DataError(f"{settings}: names: {name!r} comes twice; give class {i} another name")
    root = source / str(content.get("path") or "")
    if not root.is_dir():
        root = source
    splits, labelled = {}, False
    for split in ("train", "val", "test"):
        entries = content.get(split) or []
        records = []
        for entry in entries if isinstance(entries, list) else [entries]:
            for image in _yolo_images(str(entry), root, source, f"{settings}: {split}"):
                labels = _yolo_label_path(image)
                labelled |= labels.is_file()
                records.append(_read_yolo_file(source, image, labels, names))
        if entries:
            splits[split] = records
    if not splits:
        raise DataError(f"{settings}: expected a folder for 'train', 'val' or 'test'")
    if not labelled:
        raise DataError(f"{source}: expected label files (*.txt) in folders 'labels', got none")
    return list(names.values()), splits


def _yolo_images(entry: str, root: Path, source: Path, what: str) -> list[Path]:
    """Return the images of a folder, or of a text file that lists them."""
    # Some exports write "../train/images" for a folder beside data.yaml.
    for place in (root / entry, source / entry.removeprefix("../")):
        if place.is_dir():
            return image_files(place, recursive=True)
        if place.is_file():
            return [root / line.strip() for line in _lines(place) if line.strip()]
    raise DataError(f"{what}: expected a folder or a list of images, got {entry}")


def _yolo_label_path(image: Path) -> Path:
    parts = list(image.parts)
    places = [i for i, part in enumerate(parts) if part == "images"]
    if places:
        parts[places[-1]] = "labels"
    return Path(*parts).with_suffix(".txt")


def _read_yolo_file(source: Path, image: Path, labels: Path, names: dict[int, str]) -> Record:
    try:
        height, width = read_header(image).upright_hw  # which labels refer to
    except (OSError, ValueError) as error:
        raise DataError(f"{error}; replace the file, or remove it from the folder") from error
    objects = []
    for number, line in enumerate(_lines(labels) if labels.is_file() else [], 1):
        if not line.strip():
            continue
        try:
            label, *values = line.split()
            objects.append((names[_class_id(label)], _yolo_box(values, width, height), 0))
        except (ValueError, KeyError) as error:
            raise DataError(
                f"{labels}, line {number}: expected class ({min(names)} to {max(names)}) and "
                "centre, width, height or polygon relative to the image (0 to 1), got "
                f"{line[:200]!r}"
            ) from error
    return os.path.relpath(image, source), width, height, objects


def _class_id(text: str) -> int:
    value = float(text)  # some tools write 3.0
    if not value.is_integer():
        raise ValueError(text)
    return int(value)


def _yolo_box(values: list[str], width: int, height: int) -> list[float]:
    numbers = [float(v) for v in values]
    if not all(-_ROUNDING <= v <= 1 + _ROUNDING for v in numbers):  # NaN too
        raise ValueError("pixels, or not finite")
    if len(numbers) == 4:
        x, y, w, h = numbers
        return [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
    if len(numbers) < 6 or len(numbers) % 2:
        raise ValueError(f"{len(numbers)} numbers")
    xs, ys = numbers[0::2], numbers[1::2]  # a polygon: its extent
    x0, y0 = min(xs) * width, min(ys) * height
    return [x0, y0, max(xs) * width - x0, max(ys) * height - y0]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected a text file ({error})") from error


def summary_lines(written: dict[str, Path], images: Path) -> Iterator[str]:
    """Yield what `convert` wrote, and the flags to train on it."""
    for split, path in written.items():
        content = json.loads(path.read_text("utf-8"))
        yield f"{split}: {len(content['images'])} images, {len(content['annotations'])} objects"
    for split in ("train", "val"):
        if split in written:
            yield f"--{split}-annotations {written[split]} --{split}-images {images}"
