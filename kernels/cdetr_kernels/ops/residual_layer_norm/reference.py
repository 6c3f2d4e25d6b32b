"""Layer norm of a state and its update, in plain PyTorch.

    y = (x + residual - mean) / sqrt(variance + eps) * weight + bias

Mean and variance are those of a row of `x + residual`, in fp32 at least.

Source: Ba et al., "Layer Normalization".
"""

import torch.nn.functional as F
from torch import Tensor


def residual_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """Define `cdetr_kernels.residual_layer_norm`; see there for shapes."""
    return F.layer_norm(x + residual, weight.shape, weight, bias, eps)
