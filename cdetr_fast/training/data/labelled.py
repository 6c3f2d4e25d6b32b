"""Images with labels, as they are read from folders that are not COCO's, and their COCO form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cdetr_fast.training.errors import DataError

_SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


class LabelledObject(NamedTuple):
    """An object of an image.

    Attributes:
        label: Name of its class.
        box_xywh: Left, top, width and height in pixels.
        crowd: Whether it is not trained on, and ignored in evaluation.
        polygon: Its outline `[x, y, x, y, ...]` in pixels, if there is one.
    """

    label: str
    box_xywh: list[float]
    crowd: bool = False
    polygon: list[float] | None = None


class LabelledImage(NamedTuple):
    """An image with its objects; the size is that of the picture that labels are on."""

    file_name: str
    width: int
    height: int
    objects: list[LabelledObject]


def coco_dictionary(images: Iterable[LabelledImage], classes: Sequence[str]) -> dict[str, Any]:
    """Return images and objects as the content of a COCO file; ids count from 1."""
    ids = {name: i for i, name in enumerate(classes, 1)}
    records: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, image in enumerate(images, 1):
        size = {"width": image.width, "height": image.height}
        records.append({"id": image_id, "file_name": image.file_name} | size)
        for item in image.objects:
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": ids[item.label],
                "bbox": [round(v, 3) for v in item.box_xywh],
                "area": round(item.box_xywh[2] * item.box_xywh[3], 3),
                "iscrowd": int(item.crowd),
            }
            if item.polygon is not None:
                annotation["segmentation"] = [[round(v, 3) for v in item.polygon]]
            annotations.append(annotation)
    categories = [{"id": i, "name": name} for name, i in ids.items()]
    return {"images": records, "annotations": annotations, "categories": categories}


def split_folders(source: Path) -> dict[str, Path]:
    """Return the folders of a data set that are named after splits: train, val and test."""
    found = {}
    for split, names in _SPLITS.items():
        folder = next((source / name for name in names if (source / name).is_dir()), None)
        if folder is not None:
            found[split] = folder
    return found


def split_of_folder(folder: Path) -> str | None:
    """Return the split that a folder is named after."""
    return next((split for split, names in _SPLITS.items() if folder.name in names), None)


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file; DataError if it is none."""
    try:
        return path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected a text file ({error})") from error
