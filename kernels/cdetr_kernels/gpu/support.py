"""Support of triton's kernels by devices, found without importing triton."""

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.jit import is_tracing  # type: ignore[attr-defined]  # public, but not in its __all__

from cdetr_kernels.dispatch import Implementation

_WIDEST_HEAD = 128
# Older chips have no bf16, no asynchronous copies, and less shared memory than the tiles take.
_OLDEST_CAPABILITY = (8, 0)
HAS_TRITON = importlib.util.find_spec("triton") is not None


def unsupported_device(tensor: Tensor) -> str | None:
    """Return why kernels cannot run where a tensor is, None if they can."""
    if not HAS_TRITON:
        return "triton is not installed"
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            f"the tensors are on {tensor.device}, and triton kernels run on GPUs "
            "(on CPUs only under TRITON_INTERPRET=1)"
        )
    if tensor.is_cuda and (reason := unsupported_capability(tensor.get_device())) is not None:
        return reason
    # An export traces; asking outside of one takes a microsecond, and imports the exporters.
    if (torch.compiler.is_compiling() or is_tracing()) and torch.onnx.is_in_onnx_export():
        return "ONNX has no operator for the kernel; it gets PyTorch's own ones"
    return None


@functools.cache
def unsupported_capability(index: int) -> str | None:
    """Return why a GPU is too old for the kernels, None if it is not."""
    if torch.version.hip or not torch.cuda.is_available():  # tensors without memory: traced
        return None
    capability = torch.cuda.get_device_capability(index)
    if capability >= _OLDEST_CAPABILITY:
        return None
    name = torch.cuda.get_device_name(index)
    found, oldest = (".".join(map(str, x)) for x in (capability, _OLDEST_CAPABILITY))
    return f"the kernels need compute capability {oldest}, {name} has {found}"


def unsupported_dtype(dtype: torch.dtype) -> str | None:
    """Return why kernels cannot compute in a dtype, None if they can."""
    if dtype in (torch.float16, torch.bfloat16, torch.float32):
        return None
    return f"the kernels are for float16, bfloat16 and float32, not {dtype}"


def by_evidence(
    run: Callable[..., Any], unsupported_reason: Callable[..., str | None]
) -> Implementation:
    """Return an implementation that "auto" takes where a record says that it is right and faster.

    On CPUs too: there its kernels run in triton's interpreter.
    """
    return Implementation(run, unsupported_reason, ("cuda", "cpu"))


def unsupported_attention(q_content: Tensor, value: Tensor | None) -> str | None:
    """Return why the attention kernels cannot run on these tensors, None if they can."""
    reason = unsupported_device(q_content) or unsupported_dtype(q_content.dtype)
    if reason is None and value is not None:
        width = max(q_content.shape[-1], value.shape[-1])
        if width > _WIDEST_HEAD:
            reason = f"the kernels take heads of up to {_WIDEST_HEAD}, not {width}"
    return reason


def unsupported_criterion(logits: Tensor, *rest: Any) -> str | None:
    """Return why the kernels of matching and loss cannot run on these arguments."""
    reason = unsupported_device(logits) or unsupported_dtype(logits.dtype)
    if reason is None and rest:
        boxes_cxcywh, target_boxes_cxcywh = rest[0], rest[2]
        reason = unsupported_dtype(boxes_cxcywh.dtype) or unsupported_dtype(
            target_boxes_cxcywh.dtype
        )
    return reason
