"""`conditional_attention`: public function, argument checks and implementations."""

from typing import Any

from torch import Tensor

from cdetr_kernels.checks import check_alike, check_attention_options, check_rank, check_shape
from cdetr_kernels.dispatch import Implementation, Operator
from cdetr_kernels.gpu.support import by_evidence, unsupported_attention
from cdetr_kernels.ops.conditional_attention import reference


# The extension is loaded, and triton imported, at the first call. Each import is a statement, as
# torch.compile does not follow importlib.
def _native(
    q_content: Tensor,
    q_spatial: Tensor | None,
    k_content: Tensor,
    k_spatial: Tensor | None,
    value: Tensor,
    key_mask: Tensor | None,
    scale: float,
    *_: Any,
) -> tuple[Tensor, None]:
    from cdetr_kernels.ops.conditional_attention.native import conditional_attention

    keys = (k_content, k_spatial, None)
    return conditional_attention(q_content, q_spatial, *keys, value, key_mask, scale), None


def _triton(*args: Any) -> Any:
    from cdetr_kernels.ops.conditional_attention.triton import conditional_attention

    return conditional_attention(*args)


def unsupported_by_native(q_content: Tensor, *rest: Any) -> str | None:
    """Return why the C++ path cannot run a call, of this operator or the separable one."""
    from cdetr_kernels.ops.conditional_attention.native import unsupported_reason

    if not rest:
        return unsupported_reason((q_content,))
    *tensors, _, _, dropout_p, _, return_attention = rest
    return unsupported_reason((q_content, *tensors), dropout_p, return_attention)


def _unsupported_by_triton(q_content: Tensor, *rest: Any) -> str | None:
    return unsupported_attention(q_content, rest[3] if rest else None)


def _classify(
    _q_content: Tensor,
    q_spatial: Tensor | None,
    _k_content: Tensor,
    _k_spatial: Tensor | None,
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
        q_spatial is not None,
        key_mask is not None,
        dropout_p > 0.0,
        return_attention,
    )


OPERATOR = Operator(
    "conditional_attention",
    {
        "native": Implementation(_native, unsupported_by_native),
        "triton": by_evidence(_triton, _unsupported_by_triton),
        "torch": Implementation(reference.conditional_attention),
    },
    _classify,
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
    """Compute attention whose score is the sum of a content and a spatial dot product.

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
        ValueError: A shape or device does not fit, or `scale` or `dropout_p` is out of range.
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
    width = size if q_spatial is None else 2 * size
    scale = check_attention_options(q_content, key_mask, (batch, keys), scale, dropout_p, width)
    output, attention_map = OPERATOR(
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
