"""Training targets from COCO annotations, resized, normalised and padded with their image.

A target is a dictionary of tensors: `image_id` [1], `class_labels` [T], `boxes` [T, 4], `area` [T],
`iscrowd` [T], `orig_size` [2] (h, w), `size` [2] (h, w), and on request `masks` bool [T, H, W] and
`keypoints`. Boxes are corners in pixels until `normalize_target`, then centre and size in [0, 1].

Source: datasets/coco.py and datasets/coco_panoptic.py of the authors' repository.
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cdetr_fast.common.validation import checked, shortened
from cdetr_fast.images.boxes import clipped_corners, relative_boxes, segment_ids
from cdetr_fast.images.coco import OBJECT, SEGMENT, Whole, checked_fields, object_mask
from cdetr_fast.images.load import read_file

Target = dict[str, Tensor]
Format = Literal["coco_detection", "coco_panoptic"]

_REQUIRED = {
    "coco_detection": ("image_id", "annotations"),
    "coco_panoptic": ("image_id", "file_name", "segments_info"),
}


def _int64(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")  # not on torch's default device


def _float32(values: Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def prepare_target(
    annotation: Mapping[str, Any],
    size_hw: tuple[int, int],
    format: Format,
    return_masks: bool | None = None,
    masks_path: str | os.PathLike[str] | None = None,
    name: str = "annotations",
) -> Target:
    """Return the target of one image, boxes as corners in pixels, on the CPU.

    Args:
        annotation: `{"image_id", "annotations": [...]}` for "coco_detection", or `{"image_id",
            "file_name", "segments_info": [...]}` for "coco_panoptic".
        size_hw: Height and width of the image.
        format: "coco_detection" or "coco_panoptic".
        return_masks: Whether to add `masks`; by default only for panoptic ones.
        masks_path: Folder of the panoptic PNG files.
        name: Name of the annotation in error messages.

    Raises:
        TypeError: A field has another type; the message has image id, annotation id and key.
        ValueError: A key is missing, or boxes, masks or files do not fit the image.
        ImportError: Masks of polygons or runs are asked for and pycocotools is missing.
    """
    required = _REQUIRED[format]
    if not isinstance(annotation, Mapping) or any(key not in annotation for key in required):
        got = sorted(annotation) if isinstance(annotation, Mapping) else type(annotation).__name__
        raise ValueError(f"{name}: expected a dict with {list(required)} for {format}, got {got}")
    size = _int64(size_hw)
    image_id = checked(Whole, annotation["image_id"], f"{name}: image_id")
    target = {
        "image_id": _int64([image_id]),
        "size": size,
        "orig_size": size.clone(),
    }
    objects = annotation[required[-1]]
    if not isinstance(objects, list | tuple):
        raise ValueError(f"{name}: expected a list in {required[-1]!r}, got {objects!r}")
    if format == "coco_detection":
        target |= _detection_target(objects, size_hw, bool(return_masks), name, image_id)
    else:
        if masks_path is None:
            raise ValueError("masks_path: expected the folder of the panoptic PNG files, got None")
        path = Path(masks_path) / annotation["file_name"]
        target |= _panoptic_target(objects, size_hw, path, name, image_id)
        if return_masks is False:
            del target["masks"]
    return target


def _detection_target(
    objects: Sequence[Mapping[str, Any]],
    size_hw: tuple[int, int],
    return_masks: bool,
    name: str,
    image_id: int,
) -> Target:
    """Return labels, boxes, area and masks of the objects that are neither crowds nor empty.

    transformers builds the masks of crowds too and then fails to select among them.
    """
    wanted = ("category_id", "bbox", "area") + (("segmentation",) if return_masks else ())
    records, segmentations, names = [], [], []
    for position, item in enumerate(objects):
        where = f"{name}['annotations'][{position}]"
        _require_keys(item, wanted, where)
        number = f", annotation id {item['id']}" if "id" in item else ""
        names.append(f"{where} (image id {image_id}{number})")
        records.append(checked_fields(OBJECT, item, names[-1]))
        segmentations.append(item.get("segmentation"))
    places = [i for i, record in enumerate(records) if not record.get("iscrowd", False)]

    boxes_xywh = _float32([records[i]["bbox"] for i in places])
    boxes_xyxy = clipped_corners(boxes_xywh.reshape(-1, 4), size_hw)
    keep = (boxes_xyxy[:, 2:] > boxes_xyxy[:, :2]).all(dim=1)
    places = [i for i, kept in zip(places, keep.tolist(), strict=True) if kept]
    kept_records = [records[i] for i in places]
    labels = [record["category_id"] for record in kept_records]
    target = {
        "class_labels": _int64(labels),
        "boxes": boxes_xyxy[keep],
        "area": _float32([record["area"] for record in kept_records]),
        "iscrowd": _int64([0] * len(places)),
    }
    points = [value for record in kept_records for value in record.get("keypoints", ())]
    if any("keypoints" in record for record in kept_records):
        if len(points) % 3:
            raise ValueError(
                f"{name} (image id {image_id}): keypoints: expected x, y and visibility of each "
                f"point, got {len(points)} numbers in all"
            )
        target["keypoints"] = _float32(points).reshape(-1, 3)
    if return_masks:
        masks = [_mask(segmentations[i], size_hw, names[i]) for i in places]
        target["masks"] = torch.stack(masks) if masks else _int64([]).new_empty(0, *size_hw).bool()
    return target


def _require_keys(item: Any, keys: Sequence[str], name: str) -> None:
    missing = [key for key in keys if not isinstance(item, Mapping) or key not in item]
    if missing:
        raise ValueError(f"{name}: expected {missing}, got {shortened(item)}")


def _mask(segmentation: Any, size_hw: tuple[int, int], name: str) -> Tensor:
    try:
        return object_mask(segmentation, size_hw)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _panoptic_target(
    segments: Sequence[Mapping[str, Any]],
    size_hw: tuple[int, int],
    path: Path,
    name: str,
    image_id: int,
) -> Target:
    """Return labels, boxes, area and masks of all segments, crowds (`iscrowd`) included.

    Of a PNG file of another size than the image, masks have the size of the file until they are
    resized, and boxes stay in its pixels, as in transformers.
    """
    records = []
    for position, item in enumerate(segments):
        where = f"{name}['segments_info'][{position}]"
        _require_keys(item, ("id", "category_id", "area"), where)
        where = f"{where} (image id {image_id}, segment id {item['id']})"
        records.append(checked_fields(SEGMENT, item, where))
    segment_map = segment_ids(read_file(path, str(path))[0])
    if segment_map.shape != size_hw:
        warnings.warn(
            f"{path.name}: expected {list(size_hw)}, the size of the image, got "
            f"{list(segment_map.shape)}; its boxes stay in its own pixels, as in transformers: "
            "resize the image or the file",
            stacklevel=5,
        )

    ids = _int64([record["id"] for record in records])
    masks = segment_map == ids[:, None, None]  # [T, H, W]
    empty = ~masks.flatten(1).any(dim=1)
    if empty.any():
        raise ValueError(f"{name}: segments {ids[empty].tolist()} have no pixel in {path.name}")
    labels = [record["category_id"] for record in records]
    crowd = [record.get("iscrowd", False) for record in records]
    return {
        "masks": masks,
        "boxes": _boxes_of_masks(masks),
        "class_labels": _int64(labels),
        "iscrowd": _int64(crowd),
        "area": _float32([record["area"] for record in records]),
    }


def _boxes_of_masks(masks: Tensor) -> Tensor:
    """Return the first and last column and row of each mask as fp32 corners `[T, 4]`.

    As in DETR the index of the last pixel is the corner: a box is one pixel smaller than its mask.
    """

    def first_and_last(occupied: Tensor) -> tuple[Tensor, Tensor]:  # [T, n]
        flags = occupied.to(torch.uint8)
        return flags.argmax(dim=1), occupied.shape[1] - 1 - flags.flip(1).argmax(dim=1)

    x_min, x_max = first_and_last(masks.any(dim=1))
    y_min, y_max = first_and_last(masks.any(dim=2))
    return torch.stack((x_min, y_min, x_max, y_max), dim=1).float()


def resize_target(target: Target, old_hw: tuple[int, int], new_hw: tuple[int, int]) -> Target:
    """Scale boxes, area and masks of a target from one image size to another."""
    ratio_h, ratio_w = (new / old for new, old in zip(new_hw, old_hw, strict=True))
    target = dict(target)
    target["size"] = _int64(new_hw)
    target["boxes"] = target["boxes"] * _float32([ratio_w, ratio_h, ratio_w, ratio_h])
    target["area"] = target["area"] * (ratio_w * ratio_h)
    if "masks" in target:
        masks = target["masks"]
        if len(masks):
            from torchvision.transforms.v2 import functional as tvF  # 15 ms, once

            nearest = tvF.InterpolationMode.NEAREST_EXACT
            masks = tvF.resize(masks.to(torch.uint8), list(new_hw), interpolation=nearest).bool()
        target["masks"] = masks.reshape(-1, *new_hw)
    return target


def normalize_target(target: Target, size_hw: tuple[int, int]) -> Target:
    """Turn box corners in pixels into centre and size relative to the image."""
    return target | {"boxes": relative_boxes(target["boxes"], size_hw)}


def pad_target(
    target: Mapping[str, Tensor],
    old_hw: tuple[int, int],
    new_hw: tuple[int, int],
    update_boxes: bool,
) -> Target:
    """Extend a target to an image padded at the bottom and on the right.

    Args:
        target: Target of the unpadded image.
        old_hw: Size before padding.
        new_hw: Size after padding.
        update_boxes: Whether boxes are relative to the image, and so have to shrink.
    """
    target = dict(target)
    if old_hw == new_hw:
        return target
    device = next((tensor.device for tensor in target.values()), None)
    target["size"] = torch.tensor(new_hw, dtype=torch.int64, device=device)
    if update_boxes and "boxes" in target:
        ratio_h, ratio_w = (old / new for new, old in zip(new_hw, old_hw, strict=True))
        ratios = torch.tensor([ratio_w, ratio_h, ratio_w, ratio_h], device=device)
        target["boxes"] = target["boxes"] * ratios
    if "masks" in target:
        bottom, right = new_hw[0] - old_hw[0], new_hw[1] - old_hw[1]
        target["masks"] = torch.nn.functional.pad(target["masks"], (0, right, 0, bottom))
    return target
