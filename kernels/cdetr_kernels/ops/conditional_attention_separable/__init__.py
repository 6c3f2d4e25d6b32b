"""`conditional_attention_separable`: public function, argument checks and implementations."""

from typing import Any

from torch import Tensor

from cdetr_kernels.checks import check_alike, check_attention_options, check_rank, check_shape
from cdetr_kernels.dispatch import Implementation, Operator
from cdetr_kernels.gpu.support import by_evidence, unsupported_attention
from cdetr_kernels.ops.conditional_attention import unsupported_by_native
from cdetr_kernels.ops.conditional_attention_separable import reference


# The extension is loaded, and triton imported, at the first call. Each import is a statement, as
# torch.compile does not follow importlib.
def _native(*args: Any) -> tuple[Tensor, None]:
    from cdetr_kernels.ops.conditional_attention.native import conditional_attention

    *arguments, _, _, _ = args
    return conditional_attention(*arguments), None


def _triton(*args: Any) -> Any:
    from cdetr_kernels.ops.conditional_attention_separable.triton import (
        conditional_attention_separable,
    )

    return conditional_attention_separable(*args)


def _unsupported_by_triton(q_content: Tensor, *rest: Any) -> str | None:
    return unsupported_attention(q_content, rest[4] if rest else None)


def _classify(
    _q_content: Tensor,
    _q_spatial: Tensor,
    _k_content: Tensor,
    _k_rows: Tensor,
    _k_columns: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    _scale: float,
    dropout_p: float,
    _seed: int | None,
    return_attention: bool,
) -> tuple[int | bool, ...]:
    """Return the class of a call: batch, keys, width of a head, and what is there."""
    # Without a call of a function: it runs in every call of the operator.
    batch, keys, _, size = value.shape
    return (
        1 if batch == 1 else 16 if batch <= 16 else 0,
        512 if keys <= 512 else 2048 if keys <= 2048 else 0,
        32 if size <= 32 else 64 if size <= 64 else 128 if size <= 128 else 0,
        key_mask is not None,
        dropout_p > 0.0,
        return_attention,
    )


OPERATOR = Operator(
    "conditional_attention_separable",
    {
        "native": Implementation(_native, unsupported_by_native),
        "triton": by_evidence(_triton, _unsupported_by_triton),
        "torch": Implementation(reference.conditional_attention_separable),
    },
    _classify,
)


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
    """Compute `conditional_attention` whose spatial keys are a row's plus a column's code.

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
        ValueError: A shape or device does not fit, or `scale` or `dropout_p` is out of range.
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
    scale = check_attention_options(q_content, key_mask, (batch, keys), scale, dropout_p, 2 * size)
    output, attention_map = OPERATOR(
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
