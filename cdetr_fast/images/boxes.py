"""Conversion of COCO's boxes and panoptic PNG files into the boxes and masks of the model."""

import torch
from torch import Tensor
from torchvision.ops import box_convert


def clipped_corners(boxes_xywh: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Return boxes as corners, clipped to the image.

    Args:
        boxes_xywh: `[T, 4]`, left, top, width, height in pixels.
        size_hw: Height and width of the image.
    """
    height, width = size_hw
    limit = boxes_xywh.new_tensor([width, height, width, height])
    return box_convert(boxes_xywh, "xywh", "xyxy").clamp(min=0).minimum(limit)


def relative_boxes(boxes_xyxy: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Return boxes as centre, width and height relative to the image.

    Args:
        boxes_xyxy: `[T, 4]`, corners in pixels.
        size_hw: Height and width of the image.
    """
    height, width = size_hw
    limit = boxes_xyxy.new_tensor([width, height, width, height])
    return box_convert(boxes_xyxy, "xyxy", "cxcywh") / limit


def segment_ids(pixels: Tensor) -> Tensor:
    """Return the segment that each pixel of a panoptic PNG file belongs to, int32 `[H, W]`.

    Args:
        pixels: uint8 `[3, H, W]`.
    """
    red, green, blue = pixels.to(torch.int32)
    return red + 256 * green + 256**2 * blue
