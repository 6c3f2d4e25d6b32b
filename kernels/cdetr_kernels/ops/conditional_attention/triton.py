"""Conditional attention as an operator of torch: launchers, registration, autograd, front.

`torch.ops.cdetr_fast.conditional_attention` gives the output `[B, Q, N, Dv]` and the log-sum-exp of
each row, to base 2 and +inf for a row without keys, `[B, N, Q]` fp32. `conditional_attention_map`
makes the attention map from that. The kernels, and the mathematics, are in
`conditional_attention_kernels`.
"""

import math

import torch
import triton
from torch import Tensor

from cdetr_kernels.gpu import configurations, launching, random
from cdetr_kernels.gpu.launching import Launch, attention_tile, shared_strides
from cdetr_kernels.gpu.registration import refuse_second_derivative, register
from cdetr_kernels.gpu.tiles import Tile
from cdetr_kernels.ops.conditional_attention import kernels

LOG2_E = 1.0 / math.log(2.0)
MERGED_ROWS = 32


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
    """Forward, into `output` and `logsumexp` (one after the other for each part of the keys)."""
    batch, queries, heads, _ = q_content.shape
    tile = attention_tile("forward", q_content, value)
    arguments = {
        **_inputs(q_content, q_spatial, k_content, k_spatial, value, key_mask, seed, dropout_p),
        "p_out": output,
        "p_lse": logsumexp,
        "B": batch,
        "splits": len(output) // max(batch, 1),
        "scale": scale * LOG2_E,
        **_tiling(tile, q_content, value),
    }
    programs = triton.cdiv(queries, tile.queries) * heads * len(output)
    return Launch(kernels.forward_kernel, programs, arguments, tile)


def merge_launch(part: Tensor, part_logsumexp: Tensor, output: Tensor, logsumexp: Tensor) -> Launch:
    """Puts together what `forward_launch` made of each part of the keys."""
    batch, queries, heads, value_size = output.shape
    rows = batch * queries * heads
    arguments = {
        "p_part": part,
        "p_part_lse": part_logsumexp,
        "p_out": output,
        "p_lse": logsumexp,
        "rows": rows,
        "N": heads,
        "Q": queries,
        "splits": len(part) // max(batch, 1),
        "DV": value_size,
        "BV": configurations.padded(value_size),
        "BR": MERGED_ROWS,
        "PRECISION": launching.dot_precision(output.dtype),
    }
    tile = Tile(MERGED_ROWS, 1, stages=1)
    return Launch(kernels.merge_kernel, triton.cdiv(rows, MERGED_ROWS), arguments, tile)


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
    gradients: list[Tensor],
) -> tuple[Launch, Launch]:
    """The kernel over queries, which leaves delta for the other, and the kernel over keys."""
    batch, queries, heads, _ = q_content.shape
    keys = value.shape[1]
    dq_content, dq_spatial, dk_content, dk_spatial, dvalue = _by_name(gradients, q_spatial)
    shared = {
        **_inputs(q_content, q_spatial, k_content, k_spatial, value, key_mask, seed, dropout_p),
        **shared_strides("do", "bqnd", grad_output),
        "p_do": grad_output,
        "p_lse": logsumexp,
        "p_delta": torch.empty_like(logsumexp),
        "p_streams": (
            logsumexp.new_empty(*logsumexp.shape, 2, dtype=torch.int32) if dropout_p > 0.0 else None
        ),
        "scale": scale,
        "scale_log2": scale * LOG2_E,
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
    over_keys = Launch(
        kernels.backward_keys_kernel,
        triton.cdiv(keys, tile.keys) * heads * batch,
        {
            **{name: x for name, x in shared.items() if name != "p_seed"},
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
    """The attention map, from the log-sum-exp of its rows."""
    batch, queries, heads, _ = q_content.shape
    keys = k_content.shape[1]
    tile = attention_tile("attention_map", q_content, q_content)
    arguments = {
        **_inputs(q_content, q_spatial, k_content, k_spatial, None, key_mask, seed, dropout_p),
        "p_lse": logsumexp,
        "p_map": attention,
        "scale_log2": scale * LOG2_E,
        **_tiling(tile, q_content, None),
    }
    tiles = triton.cdiv(queries, tile.queries) * triton.cdiv(keys, tile.keys)
    return Launch(kernels.attention_map_kernel, tiles * heads * batch, arguments, tile)


def _inputs(
    q_content: Tensor,
    q_spatial: Tensor | None,
    k_content: Tensor,
    k_spatial: Tensor | None,
    value: Tensor | None,
    key_mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
) -> dict:
    """Arguments that all kernels share: inputs, their strides, sizes, dropout, what is absent."""
    arguments = {
        "p_qc": q_content,
        "p_qs": q_spatial,
        "p_kc": k_content,
        "p_ks": k_spatial,
        **({} if value is None else {"p_v": value}),
        "p_mask": key_mask,
        "p_seed": seed,
        **shared_strides("qc", "bqnd", q_content),
        **shared_strides("qs", "bqnd", q_spatial),
        **shared_strides("kc", "bsnd", k_content),
        **shared_strides("ks", "bsnd", k_spatial),
        **({} if value is None else shared_strides("v", "bsnd", value)),
        **shared_strides("mask", "bs", key_mask),
        "N": q_content.shape[2],
        "Q": q_content.shape[1],
        "S": k_content.shape[1],
        "threshold": random.threshold(dropout_p),
        "inverse_keep": 1.0 / (1.0 - dropout_p),
        "SPATIAL": q_spatial is not None,
        "MASKED": key_mask is not None,
        "DROPOUT": dropout_p > 0.0,
        "PRECISION": launching.dot_precision(q_content.dtype),
    }
    return arguments


def _tiling(tile: Tile, q_content: Tensor, value: Tensor | None) -> dict[str, int]:
    size = q_content.shape[-1]
    sizes = {"D": size, "BD": configurations.padded(size)}
    if value is not None:
        sizes |= {"DV": value.shape[-1], "BV": configurations.padded(value.shape[-1])}
    return {**sizes, "BQ": tile.queries, "BS": tile.keys}


def _by_name(gradients: list[Tensor], q_spatial: Tensor | None) -> list[Tensor | None]:
    if q_spatial is not None:
        return gradients
    dq_content, dk_content, dvalue = gradients
    return [dq_content, None, dk_content, None, dvalue]


def _forward(
    q_content, q_spatial, k_content, k_spatial, value, key_mask, seed, scale, dropout_p
) -> tuple[Tensor, Tensor]:
    device = q_content.device
    batch, queries, heads, _ = q_content.shape
    inputs = (q_content, q_spatial, k_content, k_spatial, value, key_mask, seed, scale, dropout_p)
    output, logsumexp = _forward_outputs(*inputs)
    tile = attention_tile("forward", q_content, value)
    parts = configurations.parts(
        triton.cdiv(queries, tile.queries) * heads * batch,
        triton.cdiv(value.shape[1], tile.keys),
        launching.multiprocessors(device),
    )
    if parts == 1:
        forward_launch(*inputs, output, logsumexp).run(device)
        return output, logsumexp
    part = output.new_empty(parts * batch, *output.shape[1:], dtype=torch.float32)
    part_logsumexp = logsumexp.new_empty(parts * batch, heads, queries)
    forward_launch(*inputs, part, part_logsumexp).run(device)
    merge_launch(part, part_logsumexp, output, logsumexp).run(device)
    return output, logsumexp


def _forward_outputs(
    q_content, q_spatial, k_content, k_spatial, value, key_mask, seed, scale, dropout_p
) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q_content.shape
    output = q_content.new_empty(batch, queries, heads, value.shape[-1])
    return output, q_content.new_empty(batch, heads, queries, dtype=torch.float32)


def _backward(
    grad_output, q_content, q_spatial, k_content, k_spatial, value, key_mask, seed, scale,
    dropout_p, output, logsumexp,
) -> list[Tensor]:  # fmt: skip
    tensors = (q_content, q_spatial, k_content, k_spatial, value)
    batch = len(q_content)
    # Keys that the batch shares have a gradient per image first, so that none is added atomically.
    gradients = [x.new_empty(batch, *x.shape[1:]) for x in tensors if x is not None]
    inputs = (*tensors, key_mask, seed, scale, dropout_p, output, logsumexp)
    for launch in backward_launches(grad_output, *inputs, gradients):
        launch.run(q_content.device)
    present = [x for x in tensors if x is not None]
    return [
        gradient if len(x) == batch else gradient.sum(0, keepdim=True)
        for gradient, x in zip(gradients, present, strict=True)
    ]


def _backward_outputs(
    grad_output, q_content, q_spatial, k_content, k_spatial, value, key_mask, seed, scale,
    dropout_p, output, logsumexp,
) -> list[Tensor]:  # fmt: skip
    tensors = (q_content, q_spatial, k_content, k_spatial, value)
    return [x.new_empty(x.shape) for x in tensors if x is not None]


def _map(
    q_content, q_spatial, k_content, k_spatial, key_mask, seed, logsumexp, scale, dropout_p
) -> Tensor:
    inputs = (q_content, q_spatial, k_content, k_spatial, key_mask, seed, logsumexp)
    attention = _map_output(*inputs, scale, dropout_p)
    map_launch(*inputs, scale, dropout_p, attention).run(q_content.device)
    return attention


def _map_output(
    q_content, q_spatial, k_content, k_spatial, key_mask, seed, logsumexp, scale, dropout_p
) -> Tensor:
    batch, queries, heads, _ = q_content.shape
    return q_content.new_empty(batch, heads, queries, k_content.shape[1])


def _save_for_backward(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.dropout_p = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_output, _):
    if grad_output is None:
        return (None,) * 9
    *tensors, output, logsumexp = ctx.saved_tensors
    gradients = torch.ops.cdetr_fast.conditional_attention_backward(
        grad_output, *tensors, ctx.scale, ctx.dropout_p, output, logsumexp
    )
    return (*_by_name(gradients, tensors[1]), None, None, None, None)


def _save_for_map_backward(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.dropout_p = inputs
    ctx.save_for_backward(*tensors, output)


def _map_gradients(ctx, grad_attention):
    """In plain torch: a gradient that comes in through the map is as large as the map anyway."""
    q_content, q_spatial, k_content, k_spatial, key_mask, _, lse, attention = ctx.saved_tensors
    undropped = attention
    if ctx.dropout_p > 0.0:
        undropped = torch.ops.cdetr_fast.conditional_attention_map(
            q_content, q_spatial, k_content, k_spatial, key_mask, None, lse, ctx.scale, 0.0
        )
    weighted = attention.float() * grad_attention.float()  # [B, N, Q, S]
    dscore = weighted - undropped.float() * weighted.sum(-1, keepdim=True)
    dscore = (dscore * ctx.scale).to(q_content.dtype)

    def products(query, key):
        if query is None:
            return None, None
        dquery = (dscore @ key.transpose(1, 2)).transpose(1, 2)
        dkey = (dscore.mT @ query.transpose(1, 2)).transpose(1, 2)
        return dquery, dkey if len(key) == len(dkey) else dkey.sum(0, keepdim=True)

    dq_content, dk_content = products(q_content, k_content)
    dq_spatial, dk_spatial = products(q_spatial, k_spatial)
    return dq_content, dq_spatial, dk_content, dk_spatial, None, None, None, None, None


_INPUTS = "Tensor q_content, Tensor? q_spatial, Tensor k_content, Tensor? k_spatial"
register(
    f"conditional_attention({_INPUTS}, Tensor value, Tensor? key_mask, Tensor? seed, "
    "float scale, float dropout_p) -> (Tensor, Tensor)",
    _forward,
    _forward_outputs,
    _gradients,
    _save_for_backward,
)
# Gradients of the tensors that are present, in their order.
register(
    f"conditional_attention_backward(Tensor grad_output, {_INPUTS}, Tensor value, "
    "Tensor? key_mask, Tensor? seed, float scale, float dropout_p, Tensor output, "
    "Tensor logsumexp) -> Tensor[]",
    _backward,
    _backward_outputs,
    refuse_second_derivative("conditional_attention_backward"),
)
register(
    f"conditional_attention_map({_INPUTS}, Tensor? key_mask, Tensor? seed, Tensor logsumexp, "
    "float scale, float dropout_p) -> Tensor",
    _map,
    _map_output,
    _map_gradients,
    _save_for_map_backward,
)


def seed_tensor(seed: int | None, dropout_p: float, device: torch.device) -> Tensor | None:
    """Returns the seed of dropout, drawn from torch's generator if it is None."""
    if dropout_p == 0.0:
        return None
    # On the device: a captured graph then draws anew at each replay, and nothing waits.
    if seed is None:
        return torch.randint(2**63 - 1, (1,), device=device)
    return torch.full((1,), seed, dtype=torch.int64, device=device)


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
    """The path "triton" of `cdetr_kernels.conditional_attention`; see there for shapes.

    Dropout masks differ from those of the path "torch" with the same seed.
    """
    drawn = seed_tensor(seed, dropout_p, q_content.device)
    queries_and_keys = (q_content, q_spatial, k_content, k_spatial)
    output, logsumexp = torch.ops.cdetr_fast.conditional_attention(
        *queries_and_keys, value, key_mask, drawn, scale, dropout_p
    )
    attention = None
    if return_attention:
        attention = torch.ops.cdetr_fast.conditional_attention_map(
            *queries_and_keys, key_mask, drawn, logsumexp, scale, dropout_p
        )
    return output, attention
