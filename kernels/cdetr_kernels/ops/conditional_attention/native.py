"""Conditional attention in C++, on CPUs with AVX2 or AVX-512: schema and fake.

One operator for general and separable maps; the kernel is in csrc/. It has no gradient, no dropout
and no map: calls that want one of these take the PyTorch path.
"""

import platform
from typing import Any

import torch
from torch import Tensor
from torch.jit import is_tracing  # type: ignore[attr-defined]  # public, but not in its __all__

from cdetr_kernels import native as _extension

_LIBRARY = torch.library.Library("cdetr_fast", "FRAGMENT")
_LIBRARY.define(
    "conditional_attention_cpu(Tensor q_content, Tensor? q_spatial, Tensor k_content, "
    "Tensor? k_rows, Tensor? k_columns, Tensor value, Tensor? key_mask, float scale) -> Tensor"
)
_ATTENTION = torch.ops.cdetr_fast.conditional_attention_cpu.default
_NAME = "cdetr_fast::conditional_attention_cpu"
_DTYPES = (torch.float32, torch.bfloat16)


def _unsupported_cpu() -> str | None:
    """Return why the kernel does not run on this CPU, None if it does."""
    if platform.machine() not in ("x86_64", "AMD64") or platform.system() != "Linux":
        return "the attention kernel is built for x86-64 and Linux"
    capability = torch.backends.cpu.get_cpu_capability()  # as ATEN_CPU_CAPABILITY limits it
    if not capability.startswith("AVX"):
        return f"the attention kernel needs AVX2, this CPU runs torch's {capability} code"
    return _extension.UNAVAILABLE["cpu"] or _extension.missing_kernel(_NAME)


_UNSUPPORTED_CPU = _unsupported_cpu()


def _fake(
    q_content: Tensor, _qs: Any, _kc: Any, _kr: Any, _kx: Any, value: Tensor, *_: Any
) -> Tensor:
    return q_content.new_empty(*q_content.shape[:3], value.shape[3])


torch.library.register_fake(_NAME, _fake, lib=_LIBRARY)


def unsupported_reason(
    tensors: tuple[Tensor | None, ...], dropout_p: float = 0.0, return_attention: bool = False
) -> str | None:
    """Return why the kernel cannot run a call, None if it can.

    Args:
        tensors: Queries, keys and values of the call; the first may stand for all.
        dropout_p: As in `cdetr_kernels.conditional_attention`.
        return_attention: Likewise.
    """
    first = tensors[0]
    assert first is not None
    if first.is_cuda:
        return "the extension attends on CPUs only"
    if not first.is_cpu:
        return _extension.unsupported_device(first)
    if _UNSUPPORTED_CPU is not None:
        return _UNSUPPORTED_CPU
    if first.dtype not in _DTYPES:
        return f"the kernel takes {_DTYPES}, not {first.dtype}"
    if dropout_p > 0.0 or return_attention:
        return "the kernel has no dropout and returns no attention map"
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return "the kernel has no gradient"
    # Not `is_exporting()`, which torch 2.11 has say True in graphs of torch.compile, too.
    if is_tracing() or torch.compiler._is_exporting_flag:
        return "exported graphs are made of PyTorch's own operators"
    return None


def conditional_attention(*arguments: Any) -> Tensor:
    """Run the path "native" of the two attention operators; see them for shapes.

    The spatial key of a position is that of its row plus that of its column; without `k_columns`
    there is a "row" for each position.

    Args:
        arguments: Those of the schema.
    """
    *tensors, key_mask, scale = arguments
    dense = (x if x is None or x.stride(3) == 1 else x.contiguous() for x in tensors)
    return _ATTENTION(*dense, key_mask, scale)
