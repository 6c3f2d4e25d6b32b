"""Conditional attention with both halves concatenated, as the paper writes it.

    score = scale * [q_content, q_spatial] . [k_content, k_spatial]

On GPUs it is one call of torch's fused attention, which computes the sum of the products without
any score in memory. Of its backends flash wants heads of one width; the memory-efficient one takes
queries and keys of 64 with values of 32, masked, in fp32 too.

Source: Meng et al., section 3.3.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Widths of heads that the memory-efficient backend takes in half precision.
_ALIGNMENT = 8


def is_taken(query: Tensor, seed: int | None, return_attention: bool) -> bool:
    """Return whether the fused attention can do a call: without a seed and the map, off the CPU.

    On a CPU it takes the spatial scores as a bias, which is faster there.
    """
    return seed is None and not return_attention and not query.is_cpu


def conditional_attention(
    q_content: Tensor,
    q_spatial: Tensor | None,
    k_content: Tensor,
    k_spatial: Tensor | None,
    value: Tensor,
    key_mask: Tensor | None,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """Return what `cdetr_kernels.conditional_attention` returns; see there for shapes."""
    query, key = q_content, k_content
    if q_spatial is not None and k_spatial is not None:
        query, key = join(q_content, q_spatial, k_content, k_spatial)
    batch, _, _, width = value.shape
    if key.shape[0] != batch:
        key = key.expand(batch, -1, -1, -1)
    mask = any_key = None
    if key_mask is not None:
        # The backends differ in what they make of a row without keys: it gets all of them, and
        # then 0.
        any_key = key_mask.any(-1, keepdim=True)  # [B, 1]
        mask = (key_mask | ~any_key)[:, None, None, :]
        any_key = any_key[:, :, None, None]
    query, key, value = (_aligned(x).transpose(1, 2) for x in (query, key, value))
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout_p,
        scale=scale,
    ).transpose(1, 2)
    if output.shape[-1] != width:
        output = output[..., :width]
    if any_key is not None:
        output = torch.where(any_key, output, output.new_zeros(()))
    return output


def join(
    q_content: Tensor, q_spatial: Tensor, k_content: Tensor, k_spatial: Tensor
) -> tuple[Tensor, Tensor]:
    """Concatenate the halves of queries `[B, Q, N, D]` and of keys `[B|1, S, N, D]`."""
    if k_content.shape[0] != k_spatial.shape[0]:
        batch = q_content.shape[0]
        k_content, k_spatial = (x.expand(batch, -1, -1, -1) for x in (k_content, k_spatial))
    return torch.cat((q_content, q_spatial), -1), torch.cat((k_content, k_spatial), -1)


def spatial_keys(k_rows: Tensor, k_columns: Tensor) -> Tensor:
    """Add keys of rows `[B|1, h, N, D]` and columns `[B|1, w, N, D]`, to `[B|1, h*w, N, D]`."""
    return (k_rows[:, :, None] + k_columns[:, None]).flatten(1, 2)


def _aligned(x: Tensor) -> Tensor:
    """Return heads padded with zeros to a width that the backends take."""
    rest = -x.shape[-1] % _ALIGNMENT
    return F.pad(x, (0, rest)) if rest else x
