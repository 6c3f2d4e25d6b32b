"""`residual_layer_norm`: public function, argument checks and implementations."""

from typing import Any

import torch
from torch import Tensor

from cdetr_kernels.checks import check_alike, check_shape, describe
from cdetr_kernels.dispatch import Implementation, Operator, bucket
from cdetr_kernels.gpu.support import by_evidence, unsupported_device, unsupported_dtype
from cdetr_kernels.ops.residual_layer_norm import reference

_MOST_CHANNELS = 4096  # a row is held in registers


# Imported at the first call: triton is slow to import and not installed everywhere. The import is a
# statement, as torch.compile does not follow importlib.
def _triton(*args: Any) -> Any:
    from cdetr_kernels.ops.residual_layer_norm.triton import residual_layer_norm

    return residual_layer_norm(*args)


def _unsupported_by_triton(x: Tensor, *rest: Any) -> str | None:
    reason = unsupported_device(x) or unsupported_dtype(x.dtype)
    if reason is not None or not rest:
        return reason
    if x.shape[-1] > _MOST_CHANNELS:
        return f"the kernel takes up to {_MOST_CHANNELS} channels"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *rest[:3])):
        return "the kernel has no gradient"
    return None


def _classify(x: Tensor, *_: Any) -> tuple[int, ...]:
    """Return the class of a call: the size of the state."""
    return (bucket(x.numel(), 2**19, 2**22),)


OPERATOR = Operator(
    "residual_layer_norm",
    {
        "triton": by_evidence(_triton, _unsupported_by_triton),
        "torch": Implementation(reference.residual_layer_norm),
    },
    _classify,
)


def residual_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """Compute the layer norm of `x + residual`, the end of each part of a transformer layer.

    Args:
        x: `[..., C]`.
        residual: Of the shape of `x`, or with 1 in the first place: shared by the batch.
        weight: `[C]`.
        bias: `[C]`.
        eps: Added to the variance.
        backend: "auto", "torch", "triton" or "native". The triton kernel is for inference: it has
            no gradient.

    Returns:
        Of the shape of `x`; mean and variance in fp32 at least.

    Raises:
        TypeError: The inputs are of different dtypes.
        ValueError: A shape or device does not fit.
        RuntimeError: `backend` was named and cannot run.
    """
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected [..., C], got {describe(x)}")
    check_shape("residual", residual, tuple(x.shape), may_broadcast=True)
    for name, tensor in (("weight", weight), ("bias", bias)):
        check_shape(name, tensor, (x.shape[-1],))
    check_alike("x", x, residual=residual, weight=weight, bias=bias)
    return OPERATOR(backend, x, residual, weight, bias, eps)
