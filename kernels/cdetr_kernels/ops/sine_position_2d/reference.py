"""Sine position codes in plain PyTorch.

Both codes turn a coordinate c (already times `scale`) into interleaved sines and cosines,
`[sin(c/t_0), cos(c/t_0), sin(c/t_1), ...]` with `t_i = temperature ** (2 i / features)`, and put
the y half before the x half. Angles are computed in fp32 at least, whatever the model's dtype:
bf16 angles move boxes by pixels.

Source: the authors' models/position_encoding.py and models/transformer.py
(gen_sineembed_for_position).
"""

import torch
from torch import Tensor


def sine_position_2d(
    mask: Tensor,
    channels: int,
    temperature: float,
    normalize: bool,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """Define `cdetr_kernels.sine_position_2d`; see there for shapes."""
    angle_dtype = torch.promote_types(dtype, torch.float32)
    y = mask.cumsum(1, dtype=angle_dtype)  # [B, h, w], 1 at the first unpadded row
    x = mask.cumsum(2, dtype=angle_dtype)
    if normalize:
        y = y / (y[:, -1:, :] + 1e-6) * scale
        x = x / (x[:, :, -1:] + 1e-6) * scale
    code = torch.cat([interleave(c, channels // 2, temperature) for c in (y, x)], dim=-1)
    return code.flatten(1, 2).to(dtype)  # [B, h*w, C]


def interleave(coordinate: Tensor, features: int, temperature: float) -> Tensor:
    """Code angles, [...] -> [..., features]: sines at even, cosines at odd positions."""
    step = torch.arange(features // 2, dtype=coordinate.dtype, device=coordinate.device)
    angle = coordinate[..., None] / temperature ** (2 * step / features)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)
