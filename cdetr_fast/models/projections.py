"""Linear layers read past their modules: several in one product, or in another dtype.

That is only right for a plain `nn.Linear`. Layers that are more (an adapter, a quantised weight, a
hook, a patched `forward`) are always called.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def has_nothing_attached(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of exactly this class, runs its own `forward`, and has no hooks."""
    return (
        type(module) is kind
        and "forward" not in vars(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
    )


def is_plain_linear(module: nn.Module) -> bool:
    """Whether calling `module` does no more than `F.linear` with its weight and bias."""
    return has_nothing_attached(module, nn.Linear) and type(module.weight) is nn.Parameter


def joint_linear(x: Tensor, *projections: nn.Module) -> tuple[Tensor, ...]:
    """Applies several linear layers to the same input, plain ones in one matrix product.

    Not for inference on CPUs: there the copy of the weights costs more than a joint product saves
    (3 % of the decoder), and keys with neighbours of all layers between them are slower to read.
    """
    plain = all(is_plain_linear(projection) for projection in projections)
    if not plain or _apart(x):
        return tuple(projection(x) for projection in projections)
    weight = torch.cat([projection.weight for projection in projections])
    bias = torch.cat([projection.bias for projection in projections])
    return F.linear(x, weight, bias).split([p.out_features for p in projections], dim=-1)


def _apart(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.is_grad_enabled()


def joint_linear_of_sums(
    x: Tensor, y: Tensor, *projections: nn.Module
) -> tuple[tuple[Tensor, Tensor], ...] | None:
    """Splits what linear layers make of sums x + y into a part of x and a part of y.

    Returns:
        For each layer two tensors that add up to its result; None if one of the layers is not
        plain, as what it does need not be linear.
    """
    if not all(is_plain_linear(projection) for projection in projections):
        return None
    if _apart(x):
        return tuple((p(x), F.linear(y, p.weight)) for p in projections)
    weight = torch.cat([projection.weight for projection in projections])
    bias = torch.cat([projection.bias for projection in projections])
    sizes = [p.out_features for p in projections]
    parts = F.linear(x, weight, bias).split(sizes, dim=-1), F.linear(y, weight).split(sizes, dim=-1)
    return tuple(zip(*parts, strict=True))


def linear_in_fp32(x: Tensor, projection: nn.Module) -> Tensor:
    """Applies a linear layer in fp32 (fp64 for fp64 weights), a plain one also if it is in bf16.

    Call it with autocast off. A layer that is not plain computes in its own dtype.
    """
    own_dtype = next((p.dtype for p in projection.parameters()), torch.float32)
    dtype = torch.promote_types(own_dtype, torch.float32)
    if own_dtype != dtype and is_plain_linear(projection):
        return F.linear(x.to(dtype), projection.weight.to(dtype), projection.bias.to(dtype))
    return projection(x.to(own_dtype)).to(dtype)
