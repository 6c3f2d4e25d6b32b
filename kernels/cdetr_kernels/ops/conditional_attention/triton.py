"""Conditional attention as an operator of torch: launchers, registration, front.

The kernels, and the mathematics, are in `kernels`; what both attention operators share on the host,
in `gpu.attention`.
"""

from typing import Any

import triton
from torch import Tensor

from cdetr_kernels.gpu import configurations, launching
from cdetr_kernels.gpu.attention import (
    LOG2_E,
    AttentionOperator,
    gradient_arguments,
    product_gradients,
    query_arguments,
    seed_tensor,
    size_arguments,
)
from cdetr_kernels.gpu.launching import Launch, attention_tile, shared_strides
from cdetr_kernels.gpu.tiles import Tile
from cdetr_kernels.ops.conditional_attention import kernels


def forward_launch(
    q_content: Tensor,
    q_spatial: Tensor | None,
    k_content: Tensor,
    k_spatial: Tensor | None,
    value: Tensor,
    key_mask: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    output: Tensor,
    logsumexp: Tensor,
) -> Launch:
    """Launch forward, into `output` and `logsumexp` (part after part of the keys)."""
    batch, queries, heads, _ = q_content.shape
    tile = attention_tile("forward", q_content, value)
    arguments = {
        **query_arguments(q_content, q_spatial, key_mask, seed, dropout_p),
        **_keys(k_content, k_spatial, value, key_mask),
        "p_out": output,
        "p_lse": logsumexp,
        "B": batch,
        "splits": len(output) // max(batch, 1),
        "scale": scale * LOG2_E,
        **_tiling(tile, q_content, value),
    }
    programs = triton.cdiv(queries, tile.queries) * heads * len(output)
    return Launch(kernels.forward_kernel, programs, arguments, tile)


def backward_launches(
    grad_output: Tensor,
    q_content: Tensor,
    q_spatial: Tensor | None,
    k_content: Tensor,
    k_spatial: Tensor | None,
    value: Tensor,
    key_mask: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    output: Tensor,
    logsumexp: Tensor,
    *gradients: Tensor,
) -> tuple[Launch, Launch]:
    """Launch the kernel over queries, which leaves delta for the other, and that over keys."""
    batch, queries, heads, _ = q_content.shape
    dq_content, *others, dvalue = gradients
    dq_spatial, dk_content, dk_spatial = others if q_spatial is not None else (None, *others, None)
    shared = {
        **query_arguments(q_content, q_spatial, key_mask, seed, dropout_p),
        **_keys(k_content, k_spatial, value, key_mask),
        **gradient_arguments(grad_output, logsumexp, scale, dropout_p),
    }
    tile = attention_tile("backward_queries", q_content, value)
    over_queries = Launch(
        kernels.backward_queries_kernel,
        triton.cdiv(queries, tile.queries) * heads * batch,
        {
            **shared,
            "p_out": output,
            "p_dqc": dq_content,
            "p_dqs": dq_spatial,
            **_tiling(tile, q_content, value),
        },
        tile,
    )
    tile = attention_tile("backward_keys", q_content, value)
    del shared["p_seed"]
    over_keys = Launch(
        kernels.backward_keys_kernel,
        triton.cdiv(value.shape[1], tile.keys) * heads * batch,
        {
            **shared,
            "p_dkc": dk_content,
            "p_dks": dk_spatial,
            "p_dv": dvalue,
            **_tiling(tile, q_content, value),
        },
        tile,
    )
    return over_queries, over_keys


def map_launch(
    q_content: Tensor,
    q_spatial: Tensor | None,
    k_content: Tensor,
    k_spatial: Tensor | None,
    key_mask: Tensor | None,
    seed: Tensor | None,
    logsumexp: Tensor,
    scale: float,
    dropout_p: float,
    attention: Tensor,
) -> Launch:
    """Launch the attention map, from the log-sum-exp of its rows."""
    batch, queries, heads, _ = q_content.shape
    tile = attention_tile("attention_map", q_content, q_content)
    arguments = {
        **query_arguments(q_content, q_spatial, key_mask, seed, dropout_p),
        **_keys(k_content, k_spatial, None, key_mask),
        "p_lse": logsumexp,
        "p_map": attention,
        "scale_log2": scale * LOG2_E,
        **_tiling(tile, q_content, None),
    }
    tiles = triton.cdiv(queries, tile.queries) * triton.cdiv(k_content.shape[1], tile.keys)
    return Launch(kernels.attention_map_kernel, tiles * heads * batch, arguments, tile)


def _keys(
    k_content: Tensor, k_spatial: Tensor | None, value: Tensor | None, key_mask: Tensor | None
) -> dict[str, Any]:
    return {
        "p_kc": k_content,
        "p_ks": k_spatial,
        **({} if value is None else {"p_v": value, **shared_strides("v", "bsnd", value)}),
        **shared_strides("kc", "bsnd", k_content),
        **shared_strides("ks", "bsnd", k_spatial),
        **shared_strides("mask", "bs", key_mask),
        "S": k_content.shape[1],
        "SPATIAL": k_spatial is not None,
    }


def _tiling(tile: Tile, q_content: Tensor, value: Tensor | None) -> dict[str, int]:
    return {**size_arguments(q_content, value), "BQ": tile.queries, "BS": tile.keys}


def _parts(q_content: Tensor, _qs: Any, _kc: Any, _ks: Any, value: Tensor, *_: Any) -> int:
    batch, queries, heads, _ = q_content.shape
    tile = attention_tile("forward", q_content, value)
    return configurations.parts(
        triton.cdiv(queries, tile.queries) * heads * batch,
        triton.cdiv(value.shape[1], tile.keys),
        launching.multiprocessors(q_content.device),
        tile.fill,
        tile.depth,
    )


def _score_gradients(
    dscore: Tensor,
    q_content: Tensor,
    q_spatial: Tensor | None,
    k_content: Tensor,
    k_spatial: Tensor | None,
) -> tuple[Tensor | None, ...]:
    dq_content, dk_content = product_gradients(dscore, q_content, k_content)
    if q_spatial is None:
        return dq_content, None, dk_content, None
    dq_spatial, dk_spatial = product_gradients(dscore, q_spatial, k_spatial)
    return dq_content, dq_spatial, dk_content, dk_spatial


ATTENTION = AttentionOperator(
    "conditional_attention",
    "Tensor q_content, Tensor? q_spatial, Tensor k_content, Tensor? k_spatial",
    4,
    forward_launch,
    backward_launches,
    map_launch,
    _parts,
    _score_gradients,
)
_attend, _attention_map = ATTENTION.register()


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
    """Run the implementation "triton" of `cdetr_kernels.conditional_attention`; see there.

    Dropout masks differ from those of "torch" with the same seed.
    """
    drawn = seed_tensor(seed, dropout_p, q_content.device)
    queries_and_keys = (q_content, q_spatial, k_content, k_spatial)
    output, logsumexp = _attend(*queries_and_keys, value, key_mask, drawn, scale, dropout_p)
    attention = None
    if return_attention:
        attention = _attention_map(*queries_and_keys, key_mask, drawn, logsumexp, scale, dropout_p)
    return output, attention
