"""Linear layers applied by their weights: several in one product, or in another dtype.

That is only right for a plain `nn.Linear`. Layers that do more (an adapter, a quantised weight, a
hook, a patched `forward`) are always called.
"""

from typing import TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_tracing  # type: ignore[attr-defined]  # public, but not in its __all__

PLAIN_TENSORS = (nn.Parameter, nn.Buffer, Tensor)
"""Exact types of the parameters and buffers of a plain module."""

Plain = TypeVar("Plain", bound=nn.Module)


def is_plain(module: nn.Module, *classes: type[Plain]) -> TypeGuard[Plain]:
    """Return whether calling `module` does what its class says, with its tensors, and nothing else.

    It is of exactly one of the classes, runs the class's own `forward`, has no hooks, and its
    parameters and buffers are ordinary tensors (not quantised ones, for instance).
    """
    return (
        type(module) in classes
        and not has_attachments(module)
        and all(
            tensor is None or type(tensor) in PLAIN_TENSORS
            for tensor in (*module._parameters.values(), *module._buffers.values())
        )
    )


def has_attachments(module: nn.Module) -> bool:
    """Return whether a module has hooks or a `forward` of its own."""
    return bool(
        "forward" in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether calling `module` does no more than `F.linear` with its weight and bias."""
    return is_plain(module, nn.Linear)


def joint_linear(x: Tensor, *projections: nn.Module) -> tuple[Tensor, ...]:
    """Apply several linear layers to the same input, plain ones in one matrix product.

    Not for inference on CPUs: there the copy of the weights costs more than a joint product saves
    (3 % of the decoder), and keys with neighbours of all layers between them are slower to read.
    """
    plain = [projection for projection in projections if is_plain_linear(projection)]
    if len(plain) < len(projections) or _apart(x):
        return tuple(projection(x) for projection in projections)
    weight, bias = joint_weights(*plain)
    return F.linear(x, weight, bias).split([len(p.weight) for p in plain], dim=-1)


def joint_weights(*projections: nn.Linear) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the one linear layer that several plain ones with biases make."""
    weight = torch.cat([projection.weight for projection in projections])
    return weight, torch.cat([projection.bias for projection in projections])


def _apart(x: Tensor) -> bool:
    return x.device.type == "cpu" and not records_gradients()


def records_gradients() -> bool:
    """Return whether results may be differentiated.

    A graph of `torch.jit.trace` serves with gradients and without, so it is the same in both modes.
    """
    return torch.is_grad_enabled() or is_tracing()


def joint_linear_of_sums(
    x: Tensor, y: Tensor, *projections: nn.Module
) -> tuple[tuple[Tensor, Tensor], ...] | None:
    """Split what linear layers make of sums x + y into a part of x and a part of y.

    Returns:
        For each layer two tensors that add up to its result; None if one of the layers is not
        plain, as what it does need not be linear.
    """
    plain = [projection for projection in projections if is_plain_linear(projection)]
    if len(plain) < len(projections):
        return None
    if _apart(x):
        return tuple((p(x), F.linear(y, p.weight)) for p in plain)
    weight, bias = joint_weights(*plain)
    sizes = [len(p.weight) for p in plain]
    parts = F.linear(x, weight, bias).split(sizes, dim=-1), F.linear(y, weight).split(sizes, dim=-1)
    return tuple(zip(*parts, strict=True))


def linear_in_fp32(x: Tensor, projection: nn.Module) -> Tensor:
    """Apply a linear layer in fp32 (fp64 for fp64 weights), a plain one also if it is in bf16.

    Call it with autocast off. A layer that is not plain computes in its own dtype.
    """
    own_dtype = next((p.dtype for p in projection.parameters()), torch.float32)
    dtype = torch.promote_types(own_dtype, torch.float32)
    if own_dtype != dtype and is_plain_linear(projection):
        return F.linear(x.to(dtype), projection.weight.to(dtype), projection.bias.to(dtype))
    if own_dtype == dtype == x.dtype:
        return projection(x)
    return projection(x.to(own_dtype)).to(dtype)
