"""Division of a COCO set into train, validation and test by image, stratified by class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cdetr_fast.training.data.coco import read_content
from cdetr_fast.training.data.records import (
    Annotation,
    ImageRecord,
    PanopticAnnotation,
    Segment,
    parsed,
)
from cdetr_fast.training.errors import DataError

SPLITS = ("train", "val", "test")
_TOLERANCE = 1e-6


def split_coco(
    content: dict[str, Any], fractions: Sequence[float], seed: int, source: Path
) -> dict[str, dict[str, Any]]:
    """Divide the content of a COCO file, detection or panoptic, by image.

    Args:
        content: The file's content; all else in it goes into every split.
        fractions: Of the images, for train, val and, if there are three, test.
        seed: Equal seeds divide equal sets equally, in whatever order the file has them.
        source: The file, for messages.

    Returns:
        The content of each split whose fraction is not 0.

    Raises:
        DataError: Fractions are no division, images are too few, or a record is broken.
    """
    _require_division(fractions)
    read_content(content, source)
    images = list(parsed(ImageRecord, content["images"], str(source), "image"))
    position = {image.id: i for i, image in enumerate(images)}
    classes = _classes_of_images(content["annotations"], position, source)
    order = sorted(range(len(images)), key=lambda i: images[i].file_name)
    assigned = np.empty(len(images), dtype=np.int64)
    assigned[order] = stratified([classes[i] for i in order], fractions, seed)
    splits = {}
    for k, name in enumerate(SPLITS[: len(fractions)]):
        if fractions[k] > 0:
            kept = {image.id for image, split in zip(images, assigned, strict=True) if split == k}
            splits[name] = content | {
                "images": [item for item in content["images"] if int(item["id"]) in kept],
                "annotations": [
                    item for item in content["annotations"] if int(item["image_id"]) in kept
                ],
            }
    return splits


def _require_division(fractions: Sequence[float]) -> None:
    is_division = (
        len(fractions) in (2, 3)
        and all(0 <= fraction < 1 for fraction in fractions)
        and fractions[0] > 0
        and abs(sum(fractions) - 1) < _TOLERANCE
    )
    if not is_division:
        raise DataError(
            "split: expected two or three fractions, for train, val and test, that add up to 1, "
            f"got {' '.join(map(str, fractions))}"
        )


def _classes_of_images(
    annotations: list[Any], position: dict[int, int], source: Path
) -> list[set[int]]:
    """Return the category ids in each image."""
    found: list[set[int]] = [set() for _ in position]
    panoptic = any(isinstance(item, dict) and "segments_info" in item for item in annotations)
    kind: Any = PanopticAnnotation if panoptic else Annotation
    for record in parsed(kind, annotations, str(source), "annotation"):
        if record.image_id not in position:
            raise DataError(
                f"{source}: image {record.image_id} of an annotation is not in the file; correct it"
            )
        objects = [record]
        if panoptic:
            where = f"{source}: image {record.image_id}"
            objects = list(parsed(Segment, record.segments_info, where, "segment"))
        found[position[record.image_id]] |= {item.category_id for item in objects}
    return found


def stratified(classes: Sequence[set[int]], fractions: Sequence[float], seed: int) -> np.ndarray:
    """Assign images to parts so that each class is divided as the images are.

    Rare classes go first, each image to the part that lacks most of the class. Source: Sechidis et
    al., "On the Stratification of Multi-Label Data" (2011), with parts of exact size and classes
    in the order of their whole numbers of images.

    Args:
        classes: Of each image the classes in it.
        fractions: Of the images, for each part.
        seed: Of the order among equals.

    Returns:
        The part of each image, int64 `[N]`.
    """
    shares = np.asarray(fractions, dtype=np.float64)
    room = _part_sizes(len(classes), shares)
    members: dict[int, list[int]] = {}
    order = np.random.default_rng(seed).permutation(len(classes)).tolist()
    for image in order:
        for label in classes[image]:
            members.setdefault(label, []).append(image)
    wanted = {label: shares * len(images) for label, images in members.items()}
    assigned = np.full(len(classes), -1, dtype=np.int64)
    for label in sorted(members, key=lambda label: (len(members[label]), label)):
        for image in members[label]:
            if assigned[image] >= 0:
                continue
            lack = np.where(room > 0, wanted[label], -np.inf)
            part = max(range(len(shares)), key=lambda k: (lack[k], room[k]))
            assigned[image] = part
            room[part] -= 1
            for other in classes[image]:
                wanted[other][part] -= 1
    rest = [image for image in order if assigned[image] < 0]
    assigned[rest] = np.repeat(np.arange(len(shares)), room)
    return assigned


def _part_sizes(count: int, shares: np.ndarray) -> np.ndarray:
    """Return whole numbers in proportion, at least 1 where a share is not 0, int64."""
    if count < np.count_nonzero(shares):
        raise DataError(f"split: expected at least one image for each part, got {count} images")
    sizes = np.floor(shares * count + _TOLERANCE).astype(np.int64)
    for part in np.argsort(sizes - shares * count, kind="stable")[: count - sizes.sum()]:
        sizes[part] += 1
    for part in np.flatnonzero((shares > 0) & (sizes == 0)):
        sizes[sizes.argmax()] -= 1
        sizes[part] += 1
    return sizes
