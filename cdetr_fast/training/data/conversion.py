"""Conversion of Pascal VOC and YOLO folders to COCO files, and division of sets; images stay."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cdetr_fast.common.files import write_text
from cdetr_fast.training.data.coco import Exif, find_images, load_json
from cdetr_fast.training.data.exports import COCO_NAME
from cdetr_fast.training.data.labelled import coco_dictionary
from cdetr_fast.training.data.splitting import split_coco
from cdetr_fast.training.data.voc import read_voc, voc_image_folder
from cdetr_fast.training.data.yolo import read_yolo
from cdetr_fast.training.errors import DataError

KINDS = ("voc", "yolo", "coco")


def convert(
    kind: str,
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    split: Sequence[float] = (),
    seed: int = 0,
    exif: Exif = "auto",
) -> dict[str, Path]:
    """Write `instances_<split>.json` for every split of a data set.

    Args:
        kind: "voc" (Annotations, JPEGImages and ImageSets/Main; or XML files beside the images, in
            one folder or in train, valid and test), "yolo" (data.yaml, images and labels: boxes,
            polygons, or poses, whose points are left out) or "coco" (a JSON file, to be divided by
            `split`).
        source: The folder, or the JSON file.
        output: Folder for the JSON files; created if it does not exist.
        split: Fractions of the images for train, val and test, if the set has no splits; see
            `split_coco`.
        seed: Of the division.
        exif: Picture that YOLO's labels are on: "stored", or else the one that is turned upright by
            its EXIF orientation.

    Returns:
        The file of each split. File names in them are relative to `image_folder(kind, source)`.

    Raises:
        DataError: The folder has another structure, or a file is broken.
    """
    source, output = Path(source), Path(output)
    if kind not in KINDS:
        raise DataError(f"kind: expected 'voc', 'yolo' or 'coco', got {kind!r}")
    if kind == "coco":
        source = coco_file(source)
        if not split:
            raise DataError("split: expected fractions for a COCO file, such as 0.8 0.1 0.1")
        contents = {"all": load_json(source)}
    elif source.is_dir():
        contents = _read(kind, source, exif)
    else:
        raise DataError(f"source: expected a folder, got {source}")
    if split:
        if len(contents) > 1:
            raise DataError(f"split: {source} is divided already, into {', '.join(contents)}")
        (content,) = contents.values()
        contents = split_coco(content, split, seed, source)
    paths = {name: output / f"instances_{name}.json" for name in contents}
    for path in paths.values():
        if path.exists() and path.resolve() == source.resolve():
            raise DataError(f"output: {path} is the file to divide; name another folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"output: {output} cannot be made ({error.strerror})") from error
    try:
        for name, content in contents.items():
            write_text(paths[name], json.dumps(content))
    except OSError as error:
        raise DataError(f"output: {output} cannot be written ({error})") from error
    return paths


def _read(kind: str, source: Path, exif: Exif) -> dict[str, dict[str, Any]]:
    """Return the content of a COCO file for each split of a folder."""
    classes, splits = read_voc(source) if kind == "voc" else read_yolo(source, exif=exif)
    if not classes:
        raise DataError(f"{source}: expected annotations with objects, got none")
    for split, images in splits.items():
        if not images:
            raise DataError(f"{source}: expected images in split {split!r}, got none")
    return {split: coco_dictionary(images, classes) for split, images in splits.items()}


def coco_file(source: Path) -> Path:
    """Return a JSON file, or the one in a folder that Roboflow exported."""
    return source / COCO_NAME if source.is_dir() else source


def image_folder(
    kind: str, source: str | os.PathLike[str], images: str | os.PathLike[str] | None = None
) -> Path:
    """Return the folder that the file names of a converted data set are relative to.

    Args:
        kind: As in `convert`.
        source: As in `convert`.
        images: Folder of the images of a COCO file, if they are not found beside it.
    """
    source = Path(source)
    if kind == "coco":
        path = coco_file(source)
        names = [str(image.get("file_name")) for image in load_json(path)["images"]]
        return find_images(path, images, names)
    return voc_image_folder(source) if kind == "voc" else source


def summary_lines(written: dict[str, Path], images: Path, exif: Exif = "auto") -> Iterator[str]:
    """Yield what `convert` wrote, and the flags to train and evaluate on it."""
    for split, path in written.items():
        content = json.loads(path.read_text("utf-8"))
        yield f"{split}: {len(content['images'])} images, {len(content['annotations'])} objects"
    for split in ("train", "val"):
        if split in written:
            yield f"--{split}-annotations {written[split]} --{split}-images {images}"
    if "test" in written:
        yield f"evaluate with --annotations {written['test']} --images {images}"
    if list(written) == ["all"]:
        yield "not divided: --split 0.8 0.2 writes a file to train on and one to validate on"
    elif exif != "auto":
        yield f"--exif {exif}"
