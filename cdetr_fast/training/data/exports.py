"""Data sets as folders with train, valid and test, as Roboflow exports them: COCO, YOLO and VOC."""

from __future__ import annotations

import os
from pathlib import Path

from cdetr_fast.training.config import read_yaml
from cdetr_fast.training.data.coco import Exif, index_of, read_coco
from cdetr_fast.training.data.index import CocoIndex
from cdetr_fast.training.data.labelled import coco_dictionary, split_folders, split_of_folder
from cdetr_fast.training.data.voc import is_voc, read_voc, voc_image_folder
from cdetr_fast.training.data.yolo import read_yolo, yolo_settings
from cdetr_fast.training.errors import DataError

COCO_NAME = "_annotations.coco.json"
"""Annotation file that Roboflow writes beside the images of each split."""


def read_set(
    annotations: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
    masks: str | os.PathLike[str] | None = None,
    exif: Exif = "auto",
    segments: bool = False,
    split: str | None = None,
) -> CocoIndex:
    """Read a COCO file, or a split of a folder in a layout of Roboflow's exports.

    Args:
        annotations: The JSON file; the folder of a split, such as `export/train`; or the folder
            above it, whose split `split` is read.
        images: As in `read_coco`; for a JSON file only.
        masks: As in `read_coco`.
        exif: As in `read_coco`; labels of YOLO are on the upright picture unless it is "stored".
        segments: As in `read_coco`.
        split: "train", "val" or "test".

    Raises:
        DataError: The folder has another structure, or a file is missing or broken.
    """
    path = Path(annotations)
    if not path.is_dir():
        return read_coco(path, images, masks, exif, segments)
    own_split = split_of_folder(path)
    if not is_export(path) and own_split is not None and is_export(path.parent):
        path, split = path.parent, own_split
    if (path / COCO_NAME).is_file():
        return read_coco(path / COCO_NAME, path, masks, exif, segments)
    if not is_export(path):
        if is_voc(path):
            raise DataError(
                f"{path}: a set of Pascal VOC without splits; run cdetr-fast convert voc {path} "
                "--output annotations --split 0.8 0.2, which prints the flags to train with"
            )
        raise DataError(
            f"{path}: expected a COCO JSON file, or a folder of Roboflow's exports: train, valid "
            f"and test with {COCO_NAME} (COCO) or XML files (VOC) beside the images, or data.yaml "
            "(YOLO)"
        )
    if split is None:
        raise DataError(f"{path}: expected the folder of one split, such as {path / 'test'}")
    folder = split_folders(path).get(split)
    if folder is not None and (folder / COCO_NAME).is_file():
        return read_coco(folder / COCO_NAME, folder, masks, exif, segments)
    if yolo_settings(path) is not None:
        classes, splits = read_yolo(path, [split], exif)
        root = path
    elif folder is None:
        raise DataError(f"{path}: expected a folder for split {split!r}, as there is for others")
    else:
        classes, splits = read_voc(path)
        root = voc_image_folder(path)
    if not splits.get(split):
        raise DataError(f"{path}: expected images in split {split!r}, got none")
    content = coco_dictionary(splits[split], classes)
    return index_of(content, folder or path / split, root, masks, exif, segments)


def is_export(folder: Path) -> bool:
    """Return whether a folder has splits in one of the layouts."""
    return yolo_settings(folder) is not None or any(
        (split / COCO_NAME).is_file() or any(split.glob("*.xml"))
        for split in split_folders(folder).values()
    )


def has_validation(annotations: str | os.PathLike[str]) -> bool:
    """Return whether a training set is a folder that has a validation split as well."""
    folder = Path(annotations)
    if not folder.is_dir() or not is_export(folder):
        return False
    settings = yolo_settings(folder)  # which may name other folders
    return "val" in split_folders(folder) or bool(settings and read_yaml(settings).get("val"))
