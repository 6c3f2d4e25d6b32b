"""Conditional attention over a separable map, in plain PyTorch.

With k_spatial(y, x) = k_rows(y) + k_columns(x) and j = y * w + x,

    q_spatial[i] . k_spatial[j] = q_spatial[i] . k_rows[y] + q_spatial[i] . k_columns[x]

so h + w products replace h * w, and in fp32 there are no spatial keys. The rest is as in
`conditional_attention`.

Source: Meng et al., section 3.3; the authors' models/position_encoding.py.
"""

import torch
from torch import Tensor

from cdetr_kernels.ops.conditional_attention import concatenated
from cdetr_kernels.ops.conditional_attention.reference import (
    SpatialScores,
    attend,
    dot,
    joins_halves,
)


def conditional_attention_separable(
    q_content: Tensor,
    q_spatial: Tensor,
    k_content: Tensor,
    k_rows: Tensor,
    k_columns: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: int | None,
    return_attention: bool,
) -> tuple[Tensor, Tensor | None]:
    """Define `cdetr_kernels.conditional_attention_separable`; see there for shapes."""
    if concatenated.is_taken(q_content, seed, return_attention):
        halves = (q_content, q_spatial, k_content, concatenated.spatial_keys(k_rows, k_columns))
        return concatenated.conditional_attention(*halves, value, key_mask, scale, dropout_p), None
    options = (key_mask, scale, dropout_p, seed, return_attention)
    tensors = (q_content, q_spatial, k_content, k_rows, k_columns, value)
    if joins_halves(tensors, dropout_p, return_attention):
        k_spatial = concatenated.spatial_keys(k_rows, k_columns)
        query, key = concatenated.join(q_content, q_spatial, k_content, k_spatial)
        return attend(query, key, value, None, *options)
    if len(k_rows) != len(k_columns):
        k_rows, k_columns = (x.expand(len(value), -1, -1, -1) for x in (k_rows, k_columns))
    keys = torch.cat([k_rows, k_columns], dim=1)
    scores = dot(q_spatial * scale, keys)  # [B, N, Q, h + w], in one product
    rows, columns = scores.split([k_rows.shape[1], k_columns.shape[1]], dim=-1)
    parts = (rows[..., :, None], columns[..., None, :])
    spatial_scores = SpatialScores(parts, torch.add, (k_rows.shape[1], k_columns.shape[1]))
    return attend(q_content, k_content, value, spatial_scores, *options)
