"""Conditional attention in plain PyTorch.

    score[b,n,i,j] = scale * (q_content[b,i,n] . k_content[b,j,n]
                              + q_spatial[b,i,n] . k_spatial[b,j,n])
    out[b,i,n]     = sum_j softmax_j(score[b,n,i])[j] * value[b,j,n]

The content and the spatial halves are never concatenated: two products add up into one score.
Softmax statistics are in fp32 (fp64 for fp64 inputs). A row whose keys are all masked gives 0,
never NaN.

Source: Meng et al., "Conditional DETR for Fast Training Convergence", section 3.3.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def conditional_attention(
    q_content: Tensor,
    q_spatial: Tensor | None,
    k_content: Tensor,
    k_spatial: Tensor | None,
    value: Tensor,
    key_mask: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: int | None,
    return_attention: bool,
) -> tuple[Tensor, Tensor | None]:
    """Defines `cdetr_kernels.conditional_attention`; see there for shapes."""
    if q_spatial is None and not return_attention and seed is None:
        return _plain_attention(q_content, k_content, value, key_mask, scale, dropout_p), None

    scores = _dot(q_content * scale, k_content)
    if q_spatial is not None:
        scores = scores + _dot(q_spatial * scale, k_spatial)  # [B, N, Q, S]
    statistics_dtype = torch.promote_types(scores.dtype, torch.float32)
    if key_mask is None:
        attention = torch.softmax(scores, dim=-1, dtype=statistics_dtype)
    else:
        masked = ~key_mask[:, None, None, :]
        # A finite fill keeps softmax and its gradient free of NaN where a whole row is masked; the
        # second fill turns such a row into zeros and changes no other.
        scores = scores.masked_fill(masked, torch.finfo(scores.dtype).min)
        attention = torch.softmax(scores, dim=-1, dtype=statistics_dtype).masked_fill(masked, 0.0)
    attention = attention.to(value.dtype)
    if dropout_p > 0.0:
        attention = attention * _dropout_multiplier(attention, dropout_p, seed)
    output = (attention @ value.transpose(1, 2)).transpose(1, 2)
    return output, attention if return_attention else None


def _dot(query: Tensor, key: Tensor) -> Tensor:
    """[B, Q, N, D] x [B|1, S, N, D] -> [B, N, Q, S]."""
    return query.transpose(1, 2) @ key.permute(0, 2, 3, 1)


def _plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """Without a spatial half this is torch's fused attention (same rule for masked rows)."""
    output = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=None if key_mask is None else key_mask[:, None, None, :],
        dropout_p=dropout_p,
        scale=scale,
    )
    return output.transpose(1, 2)


def _dropout_multiplier(attention: Tensor, dropout_p: float, seed: int | None) -> Tensor:
    generator = None
    if seed is not None:
        generator = torch.Generator(device=attention.device).manual_seed(seed)
    kept = torch.rand(attention.shape, generator=generator, device=attention.device) >= dropout_p
    return kept.to(attention.dtype) / (1.0 - dropout_p)
