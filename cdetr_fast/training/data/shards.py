"""Shards: a COCO set as tar files in WebDataset's format, for sets too large for one disk.

A shard holds for each image its file as it was (`000000042.jpg`) and its objects
(`000000042.json`); `shards.json` beside the shards has the categories and counts. Images are
shuffled when they are written, so that a few consecutive shards are a fair sample of the set.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cdetr_fast.common import progress
from cdetr_fast.common.files import write_json
from cdetr_fast.training.data.coco import Exif, read_coco, sorted_categories
from cdetr_fast.training.data.index import CocoIndex
from cdetr_fast.training.data.label_checks import LabelReport, check_labels
from cdetr_fast.training.data.records import ShardIndex, parsed_whole
from cdetr_fast.training.errors import DataError

logger = logging.getLogger(__name__)

_INDEX = "shards.json"
_SHUFFLE_SEED = 0


def is_shards(annotations: str) -> bool:
    """Return whether `train_annotations` names shards: an index, a tar file or a pattern."""
    return annotations.endswith((_INDEX, ".tar"))


def webdataset() -> Any:
    """Return the library; DataError if it is not installed."""
    try:
        return importlib.import_module("webdataset")
    except ImportError as error:
        raise DataError("shards need webdataset: pip install 'cdetr-fast[train]'") from error


@dataclass(frozen=True)
class ShardSet:
    """A set of shards, as its index describes it; training takes it like a `CocoIndex`.

    Attributes:
        path: The index, for messages.
        place: Folder or URL that the names are relative to, with its last slash.
        names: File names of the shards.
        images: Number of images in each of them.
        num_objects: Number of objects in all shards of the index.
        classes: K names, in the order of category ids.
        label_of: Category id -> label.
        exif: Which picture labels are on; see `read_coco`.
        stuff: Empty: shards hold boxes, not segments.
    """

    path: Path
    place: str
    names: list[str]
    images: list[int]
    num_objects: int
    classes: tuple[str, ...]
    label_of: dict[int, int]
    exif: Literal["upright", "stored"] = "upright"
    stuff: frozenset[str] = field(default=frozenset())

    def __len__(self) -> int:
        return sum(self.images)

    def report(self) -> LabelReport:
        """Return the counts; labels were checked when the shards were written."""
        counts = {"images": len(self), "shards": len(self.names), "objects": self.num_objects}
        return LabelReport(self.path, counts)


def read_shards(annotations: str) -> ShardSet:
    """Read the index of shards.

    Args:
        annotations: `.../shards.json`, or a tar file or pattern (`.../train-{000000..000099}.tar`),
            which selects among the shards of the index beside them. In a folder, or at any URL
            that webdataset opens (`https://`, `pipe:`, ...).

    Raises:
        DataError: The index or a shard is missing or broken, or webdataset is not installed.
    """
    library = webdataset()
    head, slash, tail = annotations.partition("{")
    folder, _, name = head.rpartition("/")
    place = f"{folder}/" if "/" in head else ""
    where = place + _INDEX
    try:
        with progress.task("reading the index of the shards"), library.gopen(where, "rb") as stream:
            content = json.loads(stream.read())
        index = parsed_whole(ShardIndex, content, where, "write the shards again")
        categories = sorted_categories(index.categories, where)
    except (OSError, ValueError, RecursionError) as error:  # DataError is a ValueError
        raise DataError(
            f"{where}: expected the index that `cdetr-fast convert shards` writes beside its "
            f"shards ({type(error).__name__}: {error})"
        ) from error
    counts = {shard.name: shard.images for shard in index.shards}
    wanted = list(counts)
    if not annotations.endswith(_INDEX):
        from braceexpand import braceexpand  # comes with webdataset

        try:
            wanted = list(braceexpand(name + slash + tail))
        except ValueError as error:
            raise DataError(
                f"{annotations}: expected a pattern as train-{{000000..000099}}.tar ({error})"
            ) from error
    for shard in wanted:
        # The index is data: a name in it must not be a path elsewhere, nor a command.
        if shard not in counts or "/" in shard or ":" in shard:
            raise DataError(
                f"{place}{shard}: expected one of the {len(counts)} shards of {where}, plain names "
                "of files beside it"
            )
    if not sum(counts[shard] for shard in wanted):
        raise DataError(f"{where}: expected at least one image, got none")
    missing = [s for s in wanted if _is_local(place) and not (Path(place) / s).is_file()]
    if missing:
        raise DataError(
            f"{place}{missing[0]}: {len(missing)} of {len(wanted)} shards of {where} are missing; "
            "put them there, or name those to train on by a pattern (train-{000000..000099}.tar)"
        )
    return ShardSet(
        path=Path(where),
        place=place,
        names=wanted,
        images=[counts[shard] for shard in wanted],
        num_objects=sum(shard.objects for shard in index.shards),
        classes=tuple(category.name for category in categories),
        label_of={category.id: label for label, category in enumerate(categories)},
        exif=index.exif,
    )


def _is_local(place: str) -> bool:
    return ":" not in place


def read_shard(url: str) -> Iterator[dict[str, Any]]:
    """Yield the samples of a shard: `__key__`, and the bytes of each file by its suffix."""
    library = webdataset()
    with library.gopen(url, "rb") as stream:
        files = library.tariterators.tar_file_iterator(stream)
        yield from library.tariterators.group_by_keys(
            file | {"__url__": url} for file in files if "__" not in file["fname"]
        )


def write_shards(
    annotations: str | os.PathLike[str],
    output: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
    images_per_shard: int = 1000,
    bad_labels: str = "stop",
    exif: Exif = "auto",
) -> Path:
    """Write a COCO detection set as shards.

    Args:
        annotations: COCO JSON file.
        output: Folder for `train-000000.tar`, ... (by the split's name) and `shards.json`.
        images: Folder of the images, if not found beside the file.
        images_per_shard: Number of images in each shard but the last.
        bad_labels: "stop" or "drop", as in training.
        exif: As in `read_coco`.

    Returns:
        The path of the index.

    Raises:
        DataError: A file is missing or broken, or cannot be written.
    """
    library = webdataset()
    if images_per_shard < 1:
        raise DataError(f"images_per_shard: expected at least 1, got {images_per_shard}")
    index, report = check_labels(read_coco(annotations, images, exif=exif), bad_labels)
    folder, split = Path(output), Path(annotations).stem.split("_")[-1]
    path = folder / _INDEX
    order = np.random.default_rng(_SHUFFLE_SEED).permutation(len(index)).tolist()
    shards: list[dict[str, Any]] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # until all is there
        with progress.task("writing images", len(order)) as task:
            for start in range(0, len(order), images_per_shard):
                part = order[start : start + images_per_shard]
                name = f"{split}-{len(shards):06d}.tar"
                # mtime: equal sets make equal files
                with library.TarWriter(str(folder / name), encoder=False, mtime=0) as shard:
                    for place, image in enumerate(part, start):
                        shard.write(_sample(index, image, f"{place:09d}"))
                        task.advance()
                objects = sum(len(index.object_ids[index.objects(i)]) for i in part)
                shards.append({"name": name, "images": len(part), "objects": objects})
        ids = index.category_ids.tolist()
        content = {
            "source": Path(annotations).name,
            "categories": [{"id": i, "name": n} for i, n in zip(ids, index.classes, strict=True)],
            "shards": shards,
            "exif": index.exif,
        }
        write_json(path, content, indent=1, sort_keys=False)
    except OSError as error:
        raise DataError(f"{folder}: the shards could not be written ({error})") from error
    logger.info("\n".join(report.lines()))
    return path


def _sample(index: CocoIndex, image: int, key: str) -> dict[str, Any]:
    where = index.objects(image)
    height, width = index.sizes_hw[image].tolist()
    rows = zip(
        index.category_ids[index.labels[where]].tolist(),
        index.boxes_xywh[where].tolist(),
        index.crowd[where].tolist(),
        strict=True,
    )
    content = {
        "image_id": int(index.image_ids[image]),
        "file_name": index.file_names[image],
        "height": height,
        "width": width,
        "annotations": [
            {"category_id": category, "bbox": box, "iscrowd": int(crowd)}
            for category, box, crowd in rows
        ],
    }
    file = index.image_path(image)
    suffix = file.suffix.lower().lstrip(".") or "img"
    try:
        pixels = file.read_bytes()
    except OSError as error:
        raise DataError(
            f"{file} (image id {content['image_id']}): cannot be read ({error.strerror})"
        ) from error
    return {"__key__": key, suffix: pixels, "json": json.dumps(content).encode()}
