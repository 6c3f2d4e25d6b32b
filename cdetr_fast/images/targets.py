"""Training targets from COCO annotations, resized, normalised and padded with their image.

A target is a dictionary of tensors: `image_id` [1], `class_labels` [T], `boxes` [T, 4], `area` [T],
`iscrowd` [T], `orig_size` [2] (h, w), `size` [2] (h, w), and on request `masks` bool [T, H, W] and
`keypoints`. Boxes are corners in pixels until `normalize_target`, then centre and size in [0, 1].

Source: datasets/coco.py and datasets/coco_panoptic.py of the authors' repository.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from cdetr_fast.images.boxes import clipped_corners, relative_boxes, segment_ids

Target = dict[str, Tensor]
Format = Literal["coco_detection", "coco_panoptic"]

_REQUIRED = {
    "coco_detection": ("image_id", "annotations"),
    "coco_panoptic": ("image_id", "file_name", "segments_info"),
}


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
        ValueError: A key is missing, or boxes, masks or files do not fit the image.
        ImportError: Masks of polygons or runs are asked for and pycocotools is missing.
    """
    required = _REQUIRED[format]
    if not isinstance(annotation, Mapping) or any(key not in annotation for key in required):
        got = sorted(annotation) if isinstance(annotation, Mapping) else type(annotation).__name__
        raise ValueError(f"{name}: expected a dict with {list(required)} for {format}, got {got}")
    size = torch.tensor(size_hw, dtype=torch.int64)
    target = {
        "image_id": torch.tensor([annotation["image_id"]], dtype=torch.int64),
        "size": size,
        "orig_size": size.clone(),
    }
    objects = annotation[required[-1]]
    if not isinstance(objects, list | tuple):
        raise ValueError(f"{name}: expected a list in {required[-1]!r}, got {objects!r}")
    if format == "coco_detection":
        target |= _detection_target(objects, size_hw, bool(return_masks), name)
    else:
        if masks_path is None:
            raise ValueError("masks_path: expected the folder of the panoptic PNG files, got None")
        path = Path(masks_path) / annotation["file_name"]
        target |= _panoptic_target(objects, size_hw, path, name)
        if return_masks is False:
            del target["masks"]
    return target


def _detection_target(
    objects: Sequence[Mapping[str, Any]], size_hw: tuple[int, int], return_masks: bool, name: str
) -> Target:
    """Return labels, boxes, area and masks of the objects that are neither crowds nor empty.

    transformers builds the masks of crowds too and then fails to select among them.
    """
    wanted = ("category_id", "bbox", "area") + (("segmentation",) if return_masks else ())
    for position, item in enumerate(objects):
        missing = [key for key in wanted if key not in item]
        if missing:
            raise ValueError(f"{name}['annotations'][{position}]: expected {missing}, got {item}")
    objects = [item for item in objects if not item.get("iscrowd", 0)]

    boxes_xywh = torch.tensor([item["bbox"] for item in objects], dtype=torch.float32)
    if objects and boxes_xywh.shape != (len(objects), 4):
        raise ValueError(f"{name}: expected bbox = [x, y, w, h], got {list(boxes_xywh.shape)}")
    boxes_xyxy = clipped_corners(boxes_xywh.reshape(-1, 4), size_hw)
    keep = (boxes_xyxy[:, 2:] > boxes_xyxy[:, :2]).all(dim=1)
    objects = [item for item, kept in zip(objects, keep.tolist(), strict=True) if kept]
    target = {
        "class_labels": torch.tensor([item["category_id"] for item in objects], dtype=torch.int64),
        "boxes": boxes_xyxy[keep],
        "area": torch.tensor([item["area"] for item in objects], dtype=torch.float32),
        "iscrowd": torch.zeros(len(objects), dtype=torch.int64),
    }
    keypoints = [item["keypoints"] for item in objects if "keypoints" in item]
    if keypoints:
        target["keypoints"] = torch.tensor(keypoints, dtype=torch.float32).reshape(-1, 3)
    if return_masks:
        masks = [_decode_segmentation(item["segmentation"], size_hw) for item in objects]
        target["masks"] = (
            torch.stack(masks) if masks else torch.zeros(0, *size_hw, dtype=torch.bool)
        )
    return target


def _decode_segmentation(segmentation: Any, size_hw: tuple[int, int]) -> Tensor:
    """Return the bool mask `[H, W]` of polygons, or of a plain or compressed run-length code."""
    try:
        from pycocotools import mask as coco_mask
    except ImportError as error:
        raise ImportError(
            "return_segmentation_masks=True needs pycocotools for COCO segmentations: "
            "pip install pycocotools"
        ) from error
    height, width = size_hw
    if isinstance(segmentation, Mapping):
        if list(segmentation["size"]) != [height, width]:
            raise ValueError(
                f"segmentation: expected runs of an image of {[height, width]}, "
                f"got {list(segmentation['size'])}"
            )
        runs = segmentation
        if isinstance(runs["counts"], list):
            runs = coco_mask.frPyObjects(runs, height, width)
        return torch.from_numpy(coco_mask.decode(runs)).bool()
    if len(segmentation) == 0:
        return torch.zeros(height, width, dtype=torch.bool)
    parts = coco_mask.decode(coco_mask.frPyObjects(segmentation, height, width))  # [H, W, parts]
    return torch.from_numpy(parts.any(axis=2))


def _panoptic_target(
    segments: Sequence[Mapping[str, Any]], size_hw: tuple[int, int], path: Path, name: str
) -> Target:
    """Return labels, boxes, area and masks of all segments, crowds (`iscrowd`) included."""
    for position, item in enumerate(segments):
        missing = [key for key in ("id", "category_id", "area") if key not in item]
        if missing:
            raise ValueError(f"{name}['segments_info'][{position}]: expected {missing}, got {item}")
    with Image.open(path) as file:
        segment_map = segment_ids(file)
    if segment_map.shape != size_hw:
        raise ValueError(f"{path.name}: expected {list(size_hw)}, got {list(segment_map.shape)}")

    ids = torch.tensor([item["id"] for item in segments], dtype=torch.int64)
    masks = segment_map == ids[:, None, None]  # [T, H, W]
    empty = ~masks.flatten(1).any(dim=1)
    if empty.any():
        raise ValueError(f"{name}: segments {ids[empty].tolist()} have no pixel in {path.name}")
    return {
        "masks": masks,
        "boxes": _boxes_of_masks(masks),
        "class_labels": torch.tensor([item["category_id"] for item in segments], dtype=torch.int64),
        "iscrowd": torch.tensor([item.get("iscrowd", 0) for item in segments], dtype=torch.int64),
        "area": torch.tensor([item["area"] for item in segments], dtype=torch.float32),
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
    target["size"] = torch.tensor(new_hw, dtype=torch.int64)
    target["boxes"] = target["boxes"] * torch.tensor([ratio_w, ratio_h, ratio_w, ratio_h])
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
    device = target["boxes"].device
    target["size"] = torch.tensor(new_hw, dtype=torch.int64, device=device)
    if update_boxes:
        ratio_h, ratio_w = (old / new for new, old in zip(new_hw, old_hw, strict=True))
        ratios = torch.tensor([ratio_w, ratio_h, ratio_w, ratio_h], device=device)
        target["boxes"] = target["boxes"] * ratios
    if "masks" in target:
        bottom, right = new_hw[0] - old_hw[0], new_hw[1] - old_hw[1]
        target["masks"] = torch.nn.functional.pad(target["masks"], (0, right, 0, bottom))
    return target
