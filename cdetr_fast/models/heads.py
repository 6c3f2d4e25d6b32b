"""Prediction heads, and the box arithmetic that stays in fp32 under any dtype and autocast."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdetr_fast.models.projections import linear_in_fp32


class ConditionalDetrMLPPredictionHead(nn.Module):
    """Perceptron with ReLU between its layers, `[..., input_dim] -> [..., output_dim]`.

    Args:
        input_dim: Size of the input.
        hidden_dim: Size between the layers.
        output_dim: Size of the output.
        num_layers: Number of linear layers.
        fp32: Compute in fp32 (fp64 for fp64 parameters) whatever the model's dtype, and under
            autocast too: bf16 boxes are pixels off.
    """

    def __init__(
        self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int, fp32: bool = False
    ) -> None:
        super().__init__()
        sizes = [input_dim] + [hidden_dim] * (num_layers - 1) + [output_dim]
        self.layers = nn.ModuleList(
            nn.Linear(size_in, size_out) for size_in, size_out in pairwise(sizes)
        )
        self.activation_fn: nn.Module = nn.ReLU()
        self.fp32 = fp32

    def forward(self, x: Tensor) -> Tensor:
        if not self.fp32:
            for layer in self.layers[:-1]:
                x = self.activation_fn(layer(x))
            return self.layers[-1](x)
        with torch.autocast(x.device.type, enabled=False):
            for layer in self.layers[:-1]:
                x = self.activation_fn(linear_in_fp32(x, layer))
            return linear_in_fp32(x, self.layers[-1])


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Logit of probabilities, both they and their complements held above `eps`."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def box_origins(reference_points: Tensor) -> Tensor:
    """Return what a box is an offset from, before the sigmoid, `[..., 2] -> [..., 4]`.

    Args:
        reference_points: x and y in [0, 1], fp32.
    """
    # Padding with zeros, not slice assignment: nothing is changed in place behind autograd.
    return F.pad(inverse_sigmoid(reference_points), (0, 2))


def predict_boxes(
    bbox_predictor: nn.Module, hidden_states: Tensor, origins: Tensor | None
) -> Tensor:
    """Predict relative boxes, the centre as an offset from the reference point.

    Args:
        bbox_predictor: Head with four outputs.
        hidden_states: `[..., B, Q, C]`.
        origins: `box_origins` of the reference points, `[B|1, Q, 4]`; None leaves them out.

    Returns:
        Centre and size `[..., B, Q, 4]` in [0, 1], fp32.

    Source: Meng et al., equation 2.
    """
    offset = bbox_predictor(hidden_states)
    offset = offset.to(torch.promote_types(offset.dtype, torch.float32))
    return (offset if origins is None else offset + origins).sigmoid()
