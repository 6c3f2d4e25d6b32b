"""Sine code of reference points, in plain PyTorch.

As in `sine_position_2d`, whose coordinates are those of a map: the y half comes before the x half,
then width and height, and angles are computed in fp32 at least.

Source: Meng et al., equations 1 and 4; the authors' models/transformer.py
(gen_sineembed_for_position).
"""

import torch
from torch import Tensor

from cdetr_kernels.ops.sine_position_2d.reference import interleave


def sine_query(
    reference_points: Tensor,
    channels: int,
    query_scale: Tensor | None,
    temperature: float,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """Define `cdetr_kernels.sine_query`; see there for shapes."""
    points = reference_points.to(torch.promote_types(reference_points.dtype, torch.float32)) * scale
    order = [1, 0, 2, 3][: points.shape[-1]]  # y, x, width, height
    points = torch.stack([points.unbind(-1)[i] for i in order], -1)
    code = interleave(points, channels // len(order), temperature).flatten(-2)
    if query_scale is not None:
        code = code * query_scale
    return code.to(dtype)
