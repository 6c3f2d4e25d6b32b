"""The two attention operators: argument checks, then dispatch to an implementation."""

import math

import torch
from torch import Tensor

from cdetr_kernels.checks import check_alike, check_rank, check_shape, describe
from cdetr_kernels.dispatch import Operator, Path
from cdetr_kernels.reference import attention
from cdetr_kernels.triton_support import (
    held_back,
    reason_against_device,
    reason_against_dtype,
)

_WIDEST_HEAD = 128


# Triton is imported at the first call only: it is slow to import, and not everywhere. Each import
# is a statement, as torch.compile does not follow importlib.
def _conditional_attention_triton(*args):
    from cdetr_kernels.fused.conditional_attention import conditional_attention

    return conditional_attention(*args)


def _separable_triton(*args):
    from cdetr_kernels.fused.separable_attention import conditional_attention_separable

    return conditional_attention_separable(*args)


def _no_triton(q_content: Tensor, *rest) -> str | None:
    return _no_triton_for(q_content, rest[3] if rest else None)


def _no_triton_separable(q_content: Tensor, *rest) -> str | None:
    return _no_triton_for(q_content, rest[4] if rest else None)


def _no_triton_for(q_content: Tensor, value: Tensor | None) -> str | None:
    reason = reason_against_device(q_content) or reason_against_dtype(q_content.dtype)
    if reason is None and value is not None:
        width = max(q_content.shape[-1], value.shape[-1])
        if width > _WIDEST_HEAD:
            reason = f"the kernels take heads of up to {_WIDEST_HEAD}, not {width}"
    return reason


CONDITIONAL_ATTENTION = Operator(
    "conditional_attention",
    {
        "triton": held_back(_conditional_attention_triton, _no_triton),
        "torch": Path(attention.conditional_attention),
    },
)
CONDITIONAL_ATTENTION_SEPARABLE = Operator(
    "conditional_attention_separable",
    {
        "triton": held_back(_separable_triton, _no_triton_separable),
        "torch": Path(attention.conditional_attention_separable),
    },
)


def conditional_attention(
    q_content: Tensor,
    q_spatial: Tensor | None,
    k_content: Tensor,
    k_spatial: Tensor | None,
    value: Tensor,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    backend: str = "auto",
    *,
    return_attention: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Multi-head attention whose score is the sum of a content and a spatial dot product.

    Args:
        q_content: Content queries `[B, Q, N, D]`.
        q_spatial: Spatial queries `[B, Q, N, D]`; None makes this plain attention.
        k_content: Content keys `[B, S, N, D]` (or `[1, S, N, D]`, shared by the batch).
        k_spatial: Spatial keys `[B, S, N, D]` or `[1, S, N, D]`; None exactly if `q_spatial` is.
        value: Values `[B, S, N, Dv]`.
        key_mask: bool `[B, S]`, True = attend. A row without any such key gives 0.
        scale: Factor of the score; `1 / sqrt(2 D)`, or `1 / sqrt(D)` without a spatial half.
        dropout_p: Probability with which an attention weight is dropped.
        seed: Makes dropout repeatable; None draws from torch's generator.
        backend: "auto", "torch", "triton" or "native".
        return_attention: Also return the attention map (after dropout).

    Returns:
        `[B, Q, N, Dv]` in the dtype of `value`, with `return_attention` also the map `[B, N, Q,
        S]`.

    Raises:
        TypeError: A dtype differs from that of `q_content`, or `key_mask` is not bool.
        ValueError: A shape, `scale` or `dropout_p` is out of range.
        RuntimeError: `backend` was named and cannot run.

    Source: Meng et al., section 3.3.
    """
    check_rank("q_content", q_content, 4)
    check_rank("value", value, 4)
    batch, _, heads, size = q_content.shape
    _, keys, _, value_size = value.shape
    key_shape = (batch, keys, heads, size)
    check_shape("k_content", k_content, key_shape, True)
    check_shape("value", value, (batch, keys, heads, value_size))
    if q_spatial is not None and k_spatial is not None:
        check_shape("q_spatial", q_spatial, q_content.shape)
        check_shape("k_spatial", k_spatial, key_shape, True)
        check_alike("q_content", q_content, q_spatial=q_spatial, k_spatial=k_spatial)
    elif q_spatial is not k_spatial:
        missing = "q_spatial" if q_spatial is None else "k_spatial"
        raise ValueError(f"{missing}: expected a tensor, as its counterpart is given, got None")
    check_alike("q_content", q_content, k_content=k_content, value=value)
    if key_mask is not None:
        _check_mask(key_mask, batch, keys)
    scale = _checked_scale(scale, dropout_p, size if q_spatial is None else 2 * size)
    output, attention_map = CONDITIONAL_ATTENTION(
        backend,
        q_content,
        q_spatial,
        k_content,
        k_spatial,
        value,
        key_mask,
        scale,
        dropout_p,
        seed,
        return_attention,
    )
    return (output, attention_map) if return_attention else output


def conditional_attention_separable(
    q_content: Tensor,
    q_spatial: Tensor,
    k_content: Tensor,
    k_rows: Tensor,
    k_columns: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    backend: str = "auto",
    *,
    return_attention: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`conditional_attention` over a map whose spatial keys are a row's plus a column's code.

    With `k_spatial[:, y * w + x] = k_rows[:, y] + k_columns[:, x]` both give the same, dropout
    included; here no spatial keys are made, and a query has h + w spatial products, not h * w.

    Args:
        q_content: Content queries `[B, Q, N, D]`.
        q_spatial: Spatial queries `[B, Q, N, D]`.
        k_content: Content keys `[B, h*w, N, D]` (or `[1, h*w, N, D]`), row by row of the map.
        k_rows: Spatial key of each row, `[B, h, N, D]` or `[1, h, N, D]`.
        k_columns: Spatial key of each column, `[B, w, N, D]` or `[1, w, N, D]`.
        value: Values `[B, h*w, N, Dv]`.
        key_mask: bool `[B, h*w]`, True = attend. A row without any such key gives 0.
        scale: Factor of the score; None is `1 / sqrt(2 D)`.
        dropout_p: Probability with which an attention weight is dropped.
        seed: Makes dropout repeatable; None draws from torch's generator.
        backend: "auto", "torch", "triton" or "native".
        return_attention: Also return the attention map (after dropout).

    Returns:
        `[B, Q, N, Dv]` in the dtype of `value`, with `return_attention` also the map `[B, N, Q,
        h*w]`.

    Raises:
        TypeError: A dtype differs from that of `q_content`, or `key_mask` is not bool.
        ValueError: A shape, `scale` or `dropout_p` is out of range.
        RuntimeError: `backend` was named and cannot run.

    Source: Meng et al., section 3.3; the authors' models/position_encoding.py, whose code of a
    position is its row's next to its column's.
    """
    check_rank("q_content", q_content, 4)
    check_rank("k_rows", k_rows, 4)
    check_rank("k_columns", k_columns, 4)
    check_rank("value", value, 4)
    batch, _, heads, size = q_content.shape
    height, width, value_size = k_rows.shape[1], k_columns.shape[1], value.shape[3]
    keys = height * width
    check_shape("k_rows", k_rows, (batch, height, heads, size), True)
    check_shape("k_columns", k_columns, (batch, width, heads, size), True)
    check_shape("q_spatial", q_spatial, q_content.shape)
    check_shape("k_content", k_content, (batch, keys, heads, size), True)
    check_shape("value", value, (batch, keys, heads, value_size))
    check_alike(
        "q_content",
        q_content,
        q_spatial=q_spatial,
        k_content=k_content,
        k_rows=k_rows,
        k_columns=k_columns,
        value=value,
    )
    if key_mask is not None:
        _check_mask(key_mask, batch, keys)
    scale = _checked_scale(scale, dropout_p, 2 * size)
    output, attention_map = CONDITIONAL_ATTENTION_SEPARABLE(
        backend,
        q_content,
        q_spatial,
        k_content,
        k_rows,
        k_columns,
        value,
        key_mask,
        scale,
        dropout_p,
        seed,
        return_attention,
    )
    return (output, attention_map) if return_attention else output


def _check_mask(key_mask: Tensor, batch: int, keys: int) -> None:
    if key_mask.dtype != torch.bool:
        raise TypeError(f"key_mask: expected bool [{batch}, {keys}], got {describe(key_mask)}")
    check_shape("key_mask", key_mask, (batch, keys))


def _checked_scale(scale: float | None, dropout_p: float, width: int) -> float:
    """Returns the scale, that of the width of a query if it is None."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {dropout_p}")
    if scale is None:
        return 1.0 / math.sqrt(width)
    if not scale > 0.0:
        raise ValueError(f"scale: expected a positive number, got {scale}")
    return scale
