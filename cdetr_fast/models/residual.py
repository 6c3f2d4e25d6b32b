"""Residual connections: the state after a block is the norm of the state and the block's update.

The models use plain linear layers and norms. Inference may replace the pair by one whose addition
costs no pass over memory: a linear layer before it (`ResidualLinear`), or the norm after it
(`ResidualLayerNorm`), does it in the same operator.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdetr_kernels import residual_layer_norm


class ResidualLinear(nn.Linear):
    """Linear layer that also adds a state, `x W^T + b + state`."""

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        return y if state is None else y + state


class ResidualLayerNorm(nn.LayerNorm):
    """Layer norm of a sum in one operator; for inference."""

    def forward(self, update: Tensor, state: Tensor | None = None) -> Tensor:
        if state is None or torch.is_autocast_enabled(update.device.type):
            return super().forward(update if state is None else update + state)
        return residual_layer_norm(update, state, self.weight, self.bias, self.eps)


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Apply dropout; no operator is dispatched where there is none."""
    return F.dropout(x, p) if training else x


class UpdateBlock(nn.Module):
    """Base of the blocks whose last linear layer leaves an update of the state they read."""

    output_layer: str

    @property
    def adds_state(self) -> bool:
        """Whether the block returns the sum of the state and the update."""
        return isinstance(getattr(self, self.output_layer), ResidualLinear)

    def project_output(self, x: Tensor, state: Tensor) -> Tensor:
        """Apply the last linear layer; `state` is what the block has read, `[B|1, S, C]`."""
        layer = getattr(self, self.output_layer)
        return layer(x, state) if isinstance(layer, ResidualLinear) else layer(x)


def add_and_norm(norm: nn.Module, state: Tensor, block: nn.Module, update: Tensor) -> Tensor:
    """Return the new state, `norm(state + update)`.

    Args:
        norm: Layer norm.
        state: What the block has read, `[B|1, S, C]`.
        block: The block that the update comes from.
        update: `[B, S, C]`.
    """
    if isinstance(block, UpdateBlock) and block.adds_state:
        return norm(update)
    if isinstance(norm, ResidualLayerNorm):
        return norm(update, state)
    return norm(state + update)
