"""Pascal VOC and YOLO folders as COCO annotation files; the images stay where they are."""

from __future__ import annotations

import json
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from cdetr_fast.files import write_atomically
from cdetr_fast.training.config import read_yaml
from cdetr_fast.training.errors import DataError

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def convert(kind: str, source: str | os.PathLike, output: str | os.PathLike) -> dict[str, Path]:
    """Writes `instances_<split>.json` for every split of a data set.

    Args:
        kind: "voc" (Annotations, JPEGImages and ImageSets/Main) or "yolo" (data.yaml, or images
            and labels).
        source: The folder.
        output: Folder for the JSON files; made if absent.

    Returns:
        The file of each split. File names in them are relative to `image_folder(kind, source)`.

    Raises:
        DataError: The folder has another form, or a file is broken.
    """
    source, output = Path(source), Path(output)
    if kind not in ("voc", "yolo"):
        raise DataError(f"kind: expected 'voc' or 'yolo', got {kind!r}")
    if not source.is_dir():
        raise DataError(f"source: expected a folder, got {source}")
    classes, splits = (_read_voc if kind == "voc" else _read_yolo)(source)
    output.mkdir(parents=True, exist_ok=True)
    written = {}
    for split, records in splits.items():
        path = output / f"instances_{split}.json"
        text = json.dumps(_coco(records, classes))
        write_atomically(path, lambda temporary, text=text: temporary.write_text(text, "utf-8"))
        written[split] = path
    return written


def image_folder(kind: str, source: str | os.PathLike) -> Path:
    """Returns the folder that the file names of a converted data set are relative to."""
    return Path(source) / "JPEGImages" if kind == "voc" else Path(source)


Record = tuple[str, int, int, list[tuple[str, list[float], int]]]
"""File name, width, height; and of each object class, left-top-width-height and `iscrowd`."""


def _coco(records: list[Record], classes: list[str]) -> dict[str, Any]:
    ids = {name: i for i, name in enumerate(classes, 1)}
    images, annotations = [], []
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
    lists = sorted((source / "ImageSets" / "Main").glob("*.txt"))
    # The class lists ("dog_train.txt") repeat the splits with a column of labels.
    lists = [path for path in lists if "_" not in path.stem]
    splits = {path.stem: path.read_text("utf-8").split() for path in lists} or {
        "all": sorted(path.stem for path in folder.glob("*.xml"))
    }
    found = {name: [_read_voc_file(folder, stem) for stem in s] for name, s in splits.items()}
    names = {label for records in found.values() for r in records for label, _, _ in r[3]}
    return sorted(names), found


def _read_voc_file(folder: Path, stem: str) -> Record:
    path = folder / f"{stem}.xml"
    try:
        root = ElementTree.parse(path).getroot()
        width, height = (int(root.findtext(f"size/{side}")) for side in ("width", "height"))
        objects = []
        for item in root.iter("object"):
            x0, y0, x1, y1 = (
                float(item.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")
            )
            # VOC counts pixels from 1 and includes the last one.
            box = [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1]
            # Evaluation by VOC's rules ignores difficult objects, as COCO's does with crowds.
            objects.append((item.findtext("name"), box, int(item.findtext("difficult") or 0)))
    except (OSError, ElementTree.ParseError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: expected an annotation of Pascal VOC with size and bndbox ({error})"
        ) from error
    return root.findtext("filename") or f"{stem}.jpg", width, height, objects


# YOLO ---------------------------------------------------------------------------------------------


def _read_yolo(source: Path) -> tuple[list[str], dict[str, list[Record]]]:
    settings = next(iter(sorted(source.glob("*.yaml")) + sorted(source.glob("*.yml"))), None)
    if settings is None:
        raise DataError(f"{source}: expected a data.yaml with the class names (names: [...])")
    content = read_yaml(settings)
    names = content.get("names")
    if isinstance(names, dict):
        names = [names[i] for i in sorted(names)]
    if not isinstance(names, list) or not names:
        raise DataError(f"{settings}: expected 'names', a list of classes, got {names!r}")
    root = source / str(content.get("path") or "")
    if not root.is_dir():
        root = source
    splits = {}
    for split in ("train", "val", "test"):
        if content.get(split):
            folder = root / str(content[split])
            if not folder.is_dir():
                folder = source / str(content[split]).removeprefix("../")
            if not folder.is_dir():
                raise DataError(f"{settings}: {split}: expected a folder, got {content[split]}")
            images = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES)
            splits[split] = [_read_yolo_file(source, p, names) for p in images]
    if not splits:
        raise DataError(f"{settings}: expected a folder for 'train', 'val' or 'test'")
    return [str(name) for name in names], splits


def _read_yolo_file(source: Path, image: Path, names: list) -> Record:
    with Image.open(image) as picture:
        width, height = picture.size
    parts = list(image.parts)
    places = [i for i, part in enumerate(parts) if part == "images"]
    if places:
        parts[places[-1]] = "labels"
    path = Path(*parts).with_suffix(".txt")
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    objects = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            label, *values = line.split()
            objects.append((str(names[int(label)]), _yolo_box(values, width, height), 0))
        except (ValueError, IndexError) as error:
            raise DataError(
                f"{path}, line {number}: expected class (0 to {len(names) - 1}) and relative "
                f"centre, width, height or polygon, got {line!r}"
            ) from error
    return os.path.relpath(image, source), width, height, objects


def _yolo_box(values: list[str], width: int, height: int) -> list[float]:
    numbers = [float(v) for v in values]
    if len(numbers) == 4:
        x, y, w, h = numbers
        return [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
    if len(numbers) < 6 or len(numbers) % 2:
        raise ValueError(f"{len(numbers)} numbers")
    xs, ys = numbers[0::2], numbers[1::2]  # a polygon: its extent
    x0, y0 = min(xs) * width, min(ys) * height
    return [x0, y0, max(xs) * width - x0, max(ys) * height - y0]


def lines_about(written: dict[str, Path], images: Path) -> Iterator[str]:
    """Tells how to train on what `convert` wrote."""
    for split, path in written.items():
        content = json.loads(path.read_text("utf-8"))
        yield f"{split}: {len(content['images'])} images, {len(content['annotations'])} objects"
    for flag, split in (("train", "train"), ("val", "val")):
        if split in written:
            yield f"--{flag}-annotations {written[split]} --{flag}-images {images}"
