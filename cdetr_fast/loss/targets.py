"""Targets: the labels of a batch, checked and padded, on the device after at most one copy."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Labels = list[dict[str, Tensor]]

# Annotation tools round; a box may overshoot the image by this fraction of its side. transformers
# trains on boxes anywhere.
_BOX_TOLERANCE = {"paper": 1e-3, "transformers": float("inf")}


@dataclass(frozen=True)
class Targets:
    """The labels of a batch as padded tensors.

    Attributes:
        labels: int64 `[B, T]` in [0, K), padded with 0.
        boxes_cxcywh: `[B, T, 4]`, relative, padded with 0.
        counts: int64 `[B]`.
        sizes: The counts as Python integers.
        unchecked: `[B, T, 5]`, class and box of labels that were passed on the device: the host has
            not checked their range yet. None if it has.
    """

    labels: Tensor
    boxes_cxcywh: Tensor
    counts: Tensor
    sizes: list[int]
    unchecked: Tensor | None = None


def pad_targets(
    labels: Labels, device: torch.device, batch: int, classes: int, compat: str = "paper"
) -> Targets:
    """Pad the labels of a batch and move them to a device.

    Labels on the host are checked and packed there, and moved in one copy that the host does not
    wait for. Labels on a device stay there; `match` reports what is wrong with them.

    Args:
        labels: For each image `class_labels` `[T]` and `boxes` `[T, 4]`.
        device: Device of the targets.
        batch: Number of images.
        classes: Number of classes K.
        compat: With "transformers" boxes may be outside the image.

    Raises:
        TypeError: `labels` is not a list of dictionaries of tensors.
        ValueError: A shape does not fit, or (on the host) `check_range` refuses a value.
    """
    _check_structure(labels, batch)
    device = torch.device(device)
    sizes = [len(label["class_labels"]) for label in labels]
    dtype = reduce(torch.promote_types, (x["boxes"].dtype for x in labels), torch.float32)
    if _on_host(labels):
        return _pack(labels, device, sizes, classes, dtype, compat)
    own_labels = pad_sequence([x["class_labels"].to(device).long() for x in labels], True)
    boxes_cxcywh = pad_sequence([x["boxes"].to(device, dtype) for x in labels], True)
    return Targets(
        labels=own_labels.clamp(0, classes - 1),  # an index out of range would stop the device
        boxes_cxcywh=boxes_cxcywh,
        counts=to_device(np.array(sizes, np.int64), device),
        sizes=sizes,
        unchecked=torch.cat([own_labels[..., None].to(dtype), boxes_cxcywh], -1),
    )


def _on_host(labels: Labels) -> bool:
    names = ("class_labels", "boxes")
    return all(label[name].device.type == "cpu" for label in labels for name in names)


def _pack(
    labels: Labels,
    device: torch.device,
    sizes: list[int],
    classes: int,
    dtype: torch.dtype,
    compat: str,
) -> Targets:
    batch, most = len(sizes), max(sizes, default=0)
    ends = np.cumsum([8 * batch * most, 8 * batch, 4 * batch * most * dtype.itemsize])
    packed = np.zeros(ends[-1], np.uint8)
    own_labels = packed[: ends[0]].view(np.int64).reshape(batch, most)
    packed[ends[0] : ends[1]].view(np.int64)[:] = sizes
    numbers = packed[ends[1] :].view(np.float64 if dtype == torch.float64 else np.float32)
    boxes_cxcywh = numbers.reshape(batch, most, 4)
    for i, (label, count) in enumerate(zip(labels, sizes, strict=True)):
        own_labels[i, :count] = label["class_labels"].detach().numpy()
        boxes_cxcywh[i, :count] = label["boxes"].detach().to(dtype).numpy()
    check_range(own_labels, boxes_cxcywh, sizes, classes, compat)
    here = to_device(packed, device)
    return Targets(
        labels=here[: ends[0]].view(torch.int64).view(batch, most),
        boxes_cxcywh=here[ends[1] :].view(dtype).view(batch, most, 4),
        counts=here[ends[0] : ends[1]].view(torch.int64),
        sizes=sizes,
    )


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to a device, without the host waiting."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def check_range(
    labels: np.ndarray, boxes_cxcywh: np.ndarray, sizes: list[int], classes: int, compat: str
) -> None:
    """Refuse classes and boxes that are out of range.

    Args:
        labels: `[B, T]`, of any dtype.
        boxes_cxcywh: `[B, T, 4]`.
        sizes: Number of targets of each image.
        classes: Number of classes K.
        compat: With "transformers" boxes may be outside the image.

    Raises:
        ValueError: A class is not in [0, K), or a box is inverted, not finite, or (unless
            `compat="transformers"`) outside [0, 1].
    """
    low, high = -_BOX_TOLERANCE[compat], 1 + _BOX_TOLERANCE[compat]
    good_labels = (labels >= 0) & (labels < classes)
    good_boxes = np.isfinite(boxes_cxcywh).all(-1)
    good_boxes &= ((boxes_cxcywh >= low) & (boxes_cxcywh <= high)).all(-1)
    good_boxes &= (boxes_cxcywh[..., 2:] >= 0).all(-1)
    if good_labels.all() and good_boxes.all():
        return
    for name, good, values, expected in (
        ("class_labels", good_labels, labels, f"values in [0, {classes})"),
        ("boxes", good_boxes, boxes_cxcywh, "centre, width, height in [0, 1]"),
    ):
        for image, count in enumerate(sizes):
            if (where := np.flatnonzero(~good[image, :count])).size:
                got = values[image, where[0]].tolist()
                got = int(got) if name == "class_labels" else got
                raise ValueError(
                    f"labels[{image}][{name!r}][{where[0]}]: expected {expected}, got {got}"
                )


def _check_structure(labels: Labels, batch: int) -> None:
    if not isinstance(labels, (list, tuple)):
        raise TypeError(f"labels: expected a list of dictionaries, got {type(labels).__name__}")
    if len(labels) != batch:
        raise ValueError(f"labels: expected {batch} dictionaries, one per image, got {len(labels)}")
    for i, label in enumerate(labels):
        if not isinstance(label, Mapping):
            raise TypeError(f"labels[{i}]: expected a dictionary, got {type(label).__name__}")
        for name in ("class_labels", "boxes"):
            if name not in label:
                raise ValueError(f"labels[{i}]: expected the key {name!r}, got {sorted(label)}")
            if not isinstance(label[name], Tensor):
                got = type(label[name]).__name__
                raise TypeError(f"labels[{i}][{name!r}]: expected a tensor, got {got}")
        classes, boxes = label["class_labels"], label["boxes"]
        if classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
            raise TypeError(f"labels[{i}]['class_labels']: expected integers, got {classes.dtype}")
        if not boxes.is_floating_point():
            raise TypeError(f"labels[{i}]['boxes']: expected floating point, got {boxes.dtype}")
        if classes.ndim != 1:
            shape = list(classes.shape)
            raise ValueError(f"labels[{i}]['class_labels']: expected [T], got {shape}")
        if tuple(boxes.shape) != (len(classes), 4):
            expected, shape = [len(classes), 4], list(boxes.shape)
            raise ValueError(f"labels[{i}]['boxes']: expected {expected}, got {shape}")
