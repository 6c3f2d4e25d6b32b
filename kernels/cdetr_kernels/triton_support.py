"""Where triton's kernels can run, without importing triton."""

import importlib.util
import os
from collections.abc import Callable

import torch
from torch import Tensor

from cdetr_kernels.dispatch import Path

HAS_TRITON = importlib.util.find_spec("triton") is not None


def reason_against_device(tensor: Tensor) -> str | None:
    """Says why kernels cannot run where a tensor is."""
    if not HAS_TRITON:
        return "triton is not installed"
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            f"the tensors are on {tensor.device}, and triton kernels run on GPUs "
            "(on CPUs only under TRITON_INTERPRET=1)"
        )
    if torch.onnx.is_in_onnx_export():
        return "ONNX has no operator for the kernel; it gets PyTorch's own ones"
    return None


def reason_against_dtype(dtype: torch.dtype) -> str | None:
    """Says why kernels cannot compute in a dtype."""
    if dtype in (torch.float16, torch.bfloat16, torch.float32):
        return None
    return f"the kernels are for float16, bfloat16 and float32, not {dtype}"


def held_back(run: Callable, reason_against: Callable[..., str | None]) -> Path:
    """Returns a path that "auto" does not take until a GPU has run it."""
    reason = "not run on a GPU yet; ask for it by name, or by CDETR_FAST_BACKEND=triton"
    return Path(run, reason_against, reason)
