"""Argument checks that the public operators share, cheap where everything fits."""

import math

import torch
from torch import Tensor


def describe(tensor: Tensor) -> str:
    """Return dtype and shape of a tensor, as errors name them."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def check_rank(name: str, tensor: Tensor, rank: int) -> None:
    """Raise ValueError unless a tensor has `rank` dimensions."""
    if tensor.ndim != rank:
        raise ValueError(f"{name}: expected {rank} dimensions, got {describe(tensor)}")


def check_shape(
    name: str, tensor: Tensor, shape: tuple[int, ...], may_broadcast: bool = False
) -> None:
    """Raise ValueError unless a tensor has a shape; `may_broadcast` allows a batch of 1."""
    got = tensor.shape
    if got == shape or (may_broadcast and got == (1, *shape[1:])):
        return
    or_shared = " (or 1 in the first place)" if may_broadcast else ""
    raise ValueError(f"{name}: expected {list(shape)}{or_shared}, got {list(got)}")


def check_alike(name: str, tensor: Tensor, **others: Tensor) -> None:
    """Raise TypeError or ValueError if a tensor has another dtype or device than `tensor`."""
    dtype, device = tensor.dtype, tensor.device
    for other_name, other in others.items():
        if other.dtype != dtype:
            raise TypeError(f"{other_name}: expected {dtype} as {name}, got {other.dtype}")
        if other.device != device:
            raise ValueError(f"{other_name}: expected {device} as {name}, got {other.device}")


def check_device(name: str, tensor: Tensor, **others: Tensor) -> None:
    """Raise ValueError if a tensor is on another device than `tensor`."""
    device = tensor.device
    for other_name, other in others.items():
        if other.device != device:
            raise ValueError(f"{other_name}: expected {device} as {name}, got {other.device}")


def check_attention_options(
    q_content: Tensor,
    key_mask: Tensor | None,
    mask_shape: tuple[int, int],
    scale: float | None,
    dropout_p: float,
    query_width: int,
) -> float:
    """Check the options of an attention operator and return its scale.

    Args:
        q_content: Tells the device.
        key_mask: bool of `mask_shape`, or None.
        mask_shape: Batch and number of keys.
        scale: Factor of the score; None takes `1 / sqrt(query_width)`.
        dropout_p: In [0, 1).
        query_width: Width of a query.

    Raises:
        TypeError: `key_mask` is not bool.
        ValueError: Its shape or device does not fit, or `scale` or `dropout_p` is out of range.
    """
    if key_mask is not None:
        if key_mask.dtype != torch.bool:
            raise TypeError(f"key_mask: expected bool {list(mask_shape)}, got {describe(key_mask)}")
        check_shape("key_mask", key_mask, mask_shape)
        check_device("q_content", q_content, key_mask=key_mask)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {dropout_p}")
    if scale is None:
        return 1.0 / math.sqrt(query_width)
    if not scale > 0.0:
        raise ValueError(f"scale: expected a positive number, got {scale}")
    return scale


def check_predictions(logits: Tensor, boxes_cxcywh: Tensor) -> None:
    """Raise ValueError unless predictions are `[L, B, Q, K]` and `[L, B, Q, 4]`."""
    check_rank("logits", logits, 4)
    check_shape("boxes_cxcywh", boxes_cxcywh, (*logits.shape[:3], 4))


def check_targets(batch: int, labels: Tensor, boxes_cxcywh: Tensor, counts: Tensor) -> None:
    """Raise TypeError or ValueError unless targets are `[B, T]`, `[B, T, 4]` and `[B]`."""
    check_rank("target_labels", labels, 2)
    if labels.dtype != torch.int64:
        raise TypeError(f"target_labels: expected int64 [B, T], got {describe(labels)}")
    check_shape("target_labels", labels, (batch, labels.shape[1]))
    check_shape("target_boxes_cxcywh", boxes_cxcywh, (batch, labels.shape[1], 4))
    check_shape("target_counts", counts, (batch,))
