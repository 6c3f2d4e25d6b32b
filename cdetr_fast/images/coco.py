"""Objects of COCO annotations: what their fields must be, and masks from their segmentations."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from cdetr_fast.common.validation import Before, Expected, checked, shortened

_POLYGON_NUMBERS = 6  # three points
_REACH = 10  # sides of the image that a polygon may be outside of it: pycocotools walks every pixel
_FORMS = (
    "polygons [[x, y, x, y, x, y, ...], ...] of three points or more, or run lengths "
    "{'size', 'counts'}"
)


def _plain(value: Any) -> Any:
    """Return numpy and torch values as Python numbers and lists."""
    return value.tolist() if hasattr(value, "tolist") else value


def _whole(value: Any) -> Any:
    value = _plain(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _flag(value: Any) -> Any:
    value = _whole(value)
    return bool(value) if type(value) is int and value in (0, 1) else value


def _numbers(value: Any) -> Any:
    value = _plain(value)
    return tuple(_plain(item) for item in value) if isinstance(value, list | tuple) else value


def _flat_numbers(value: Any) -> Any:
    return tuple(_leaves(value)) if isinstance(_plain(value), list | tuple) else value


def _leaves(value: Any) -> Iterator[Any]:
    value = _plain(value)
    if isinstance(value, list | tuple):
        yield from itertools.chain.from_iterable(map(_leaves, value))
    else:
        yield value


Whole = Annotated[int, Before(_whole), Expected("a whole number")]
_Number = Annotated[float, Before(_plain), Expected("a number")]
_Flag = Annotated[bool, Before(_flag), Expected("0 or 1")]
_Box = Annotated[
    tuple[float, float, float, float],
    Before(_numbers),
    Expected("[left, top, width, height] in pixels"),
]
_Points = Annotated[
    tuple[float, ...], Before(_flat_numbers), Expected("numbers [x, y, visibility, ...]")
]


OBJECT = {
    "category_id": Whole,
    "bbox": _Box,
    "area": _Number,
    "iscrowd": _Flag,
    "keypoints": _Points,
}
"""Fields of an object in a detection annotation; `segmentation` is read by `object_mask`."""

SEGMENT = {"id": Whole, "category_id": Whole, "area": _Number, "iscrowd": _Flag}
"""Fields of a segment in a panoptic annotation."""


def checked_fields(kinds: Mapping[str, Any], item: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return those fields of an object or segment that it has, as Python values.

    Args:
        kinds: `OBJECT` or `SEGMENT`.
        item: The object.
        name: Its name in messages.

    Raises:
        TypeError: A field has another type; the message names object and field.
        ValueError: A field is out of range.
    """
    return {
        key: checked(kind, item[key], f"{name}: {key}")
        for key, kind in kinds.items()
        if key in item
    }


def object_mask(segmentation: Any, size_hw: tuple[int, int]) -> Tensor:
    """Return the mask of an object, bool `[H, W]`.

    Args:
        segmentation: Polygons `[[x, y, ...], ...]` in pixels; or run lengths `{"size", "counts"}`,
            counts a list, or COCO's compressed text or bytes; or a list of run lengths.
        size_hw: Height and width of the image.

    Raises:
        ValueError: It has another form, a polygon is far outside the image, or runs do not add up
            to the image. (pycocotools takes two points for a box, fills memory with the outline of
            such a polygon, and leaves pixels without a run as they are in memory.)
        ImportError: Polygons, without pycocotools.
    """
    parts = segmentation_parts(segmentation, size_hw)
    if parts and isinstance(parts[0], list):
        return _filled(parts, size_hw)
    mask = torch.zeros(size_hw, dtype=torch.bool, device="cpu")
    for runs in parts:
        inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        mask |= torch.from_numpy(inside.reshape(size_hw[::-1]).T)
    return mask


def segmentation_parts(segmentation: Any, size_hw: tuple[int, int]) -> list[Any]:
    """Return polygons as lists of numbers, or run lengths as int64 arrays; see `object_mask`."""
    if isinstance(segmentation, Mapping):
        return [_run_lengths(segmentation, size_hw)]
    items = _plain(segmentation)
    if isinstance(items, list | tuple) and items:
        if all(isinstance(item, Mapping) for item in items):
            return [_run_lengths(item, size_hw) for item in items]
        polygons = [_numbers(item) for item in items]
        if all(map(_is_polygon, polygons)):
            _require_near(polygons, size_hw)
            return [[float(value) for value in polygon] for polygon in polygons]
    raise ValueError(f"segmentation: expected {_FORMS}, got {shortened(segmentation)}")


def _is_polygon(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) >= _POLYGON_NUMBERS
        and len(value) % 2 == 0
        and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)
        and bool(np.isfinite(np.array(value, dtype=np.float64)).all())
    )


def _require_near(polygons: list[Any], size_hw: tuple[int, int]) -> None:
    farthest = max((value for polygon in polygons for value in polygon), key=abs)
    if abs(farthest) > _REACH * max(size_hw):
        raise ValueError(
            f"segmentation: expected polygons in an image of {list(size_hw)} (height, width), got "
            f"a point at {farthest:g}"
        )


def _filled(polygons: Any, size_hw: tuple[int, int]) -> Tensor:
    try:
        from pycocotools import mask as coco_mask
    except ImportError as error:
        raise ImportError(
            "return_segmentation_masks=True needs pycocotools for COCO segmentations: "
            "pip install pycocotools"
        ) from error
    parts = coco_mask.decode(coco_mask.frPyObjects(polygons, *size_hw))  # [H, W, parts]
    return torch.from_numpy(parts.any(axis=2))


def _run_lengths(runs: Mapping[str, Any], size_hw: tuple[int, int]) -> np.ndarray:
    """Return the lengths of runs over the columns, of zeros first, int64 `[n]`."""
    size, counts = _numbers(runs.get("size")), _plain(runs.get("counts"))
    if size != size_hw:
        got = list(size) if isinstance(size, tuple) else size
        raise ValueError(
            f"segmentation: expected runs of an image of {list(size_hw)}, got {shortened(got)}"
        )
    lengths: Any = counts
    if isinstance(counts, str | bytes):
        lengths = _decompressed(counts)
    elif isinstance(counts, list | tuple):
        lengths = [_whole(count) for count in counts]
    height, width = size_hw
    fits = isinstance(lengths, list) and all(type(n) is int and n >= 0 for n in lengths)
    if not fits or sum(lengths) != height * width:
        raise ValueError(
            f"segmentation: counts: expected runs of {height * width} pixels in all, got "
            f"{shortened(counts)}"
        )
    return np.array(lengths, dtype=np.int64)


def _decompressed(text: str | bytes) -> list[int] | None:
    """Return the run lengths in COCO's compressed form; None if it is damaged.

    Source: rleFrString of cocoapi/common/maskApi.c: each number is a difference to the one two
    places before, in groups of five bits.
    """
    lengths: list[int] = []
    value = shift = 0
    for byte in text.encode() if isinstance(text, str) else text:
        group = byte - 48
        if not 0 <= group < 64:
            return None
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            value -= 1 << shift
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
        value = shift = 0
    return None if shift else lengths
