"""Prediction heads, and the box arithmetic that stays in fp32 under any dtype and autocast."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConditionalDetrMLPPredictionHead(nn.Module):
    """Perceptron with ReLU between its layers, `[..., input_dim] -> [..., output_dim]`."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int) -> None:
        super().__init__()
        sizes = [input_dim] + [hidden_dim] * (num_layers - 1) + [output_dim]
        self.layers = nn.ModuleList(
            nn.Linear(size_in, size_out) for size_in, size_out in pairwise(sizes)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)

    def forward_fp32(self, x: Tensor) -> Tensor:
        """As `forward`, in fp32 (fp64 for fp64 parameters): bf16 boxes are pixels off."""
        with torch.autocast(x.device.type, enabled=False):
            for i, layer in enumerate(self.layers):
                dtype = torch.promote_types(layer.weight.dtype, torch.float32)
                x = x.to(dtype)
                if layer.weight.dtype == dtype:
                    x = layer(x)
                else:
                    x = F.linear(x, layer.weight.to(dtype), layer.bias.to(dtype))
                if i < len(self.layers) - 1:
                    x = x.relu()
        return x


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Logit of probabilities, both they and their complements held above `eps`."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def predict_boxes(
    bbox_predictor: ConditionalDetrMLPPredictionHead,
    hidden_states: Tensor,
    reference_points: Tensor | None,
) -> Tensor:
    """Predicts relative boxes, the centre as an offset from the reference point.

    Args:
        bbox_predictor: Head with four outputs.
        hidden_states: `[..., B, Q, C]`.
        reference_points: x and y `[B, Q, 2]` in [0, 1], fp32; None leaves them out.

    Returns:
        Centre and size `[..., B, Q, 4]` in [0, 1], fp32.

    Source: Meng et al., equation 2.
    """
    offset = bbox_predictor.forward_fp32(hidden_states)
    if reference_points is not None:
        # Padding with zeros, not slice assignment: nothing is changed in place behind autograd.
        offset = offset + F.pad(inverse_sigmoid(reference_points), (0, 2))
    return offset.sigmoid()
