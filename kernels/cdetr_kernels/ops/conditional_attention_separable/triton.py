"""Conditional attention over a separable map as an operator of torch: launchers, registration.

`torch.ops.cdetr_fast.conditional_attention_separable` gives what `conditional_attention` gives, the
output and the log-sum-exp of each row. The kernels, and the mathematics, are in
`separable_attention_kernels`.
"""

import torch
import triton
from torch import Tensor

from cdetr_kernels.gpu import configurations, launching, random
from cdetr_kernels.gpu.launching import Launch, attention_tile, shared_strides
from cdetr_kernels.gpu.registration import refuse_second_derivative, register
from cdetr_kernels.gpu.tiles import Tile
from cdetr_kernels.ops.conditional_attention.triton import LOG2_E, merge_launch, seed_tensor
from cdetr_kernels.ops.conditional_attention_separable import kernels

# Of the kernel of the codes: what it does is small, and the same for all heads.
CODES_TILE = Tile(32, 16, 4, 2, 200, 20)


def forward_launch(
    q_content: Tensor,
    q_spatial: Tensor,
    k_content: Tensor,
    k_rows: Tensor,
    k_columns: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    output: Tensor,
    logsumexp: Tensor,
) -> Launch:
    """Forward, into `output` and `logsumexp` (one after the other for each part of the lines)."""
    batch, queries, heads, _ = q_content.shape
    tile = attention_tile("separable_forward", q_content, value)
    arguments = {
        **_queries(q_content, q_spatial, key_mask, seed, dropout_p),
        **_lines(tile, k_content, k_rows, k_columns, value, key_mask),
        **_sizes(q_content, value),
        "p_out": output,
        "p_lse": logsumexp,
        "B": batch,
        "splits": len(output) // max(batch, 1),
        "scale": scale * LOG2_E,
        "BQ": tile.queries,
    }
    arguments["p_scores"] = _sums(q_content, arguments["Y"])
    programs = triton.cdiv(queries, tile.queries) * heads * len(output)
    return _launch(kernels.forward_kernel, programs, arguments, tile)


def backward_launches(
    grad_output: Tensor,
    q_content: Tensor,
    q_spatial: Tensor,
    k_content: Tensor,
    k_rows: Tensor,
    k_columns: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    output: Tensor,
    logsumexp: Tensor,
    gradients: list[Tensor],
) -> tuple[Launch, ...]:
    """The kernels over queries, over keys, and over the codes of lines and of places, in order."""
    batch, queries, heads, _ = q_content.shape
    dq_content, dq_spatial, dk_content, dk_rows, dk_columns, dvalue = gradients
    shared = {
        **_queries(q_content, q_spatial, key_mask, seed, dropout_p),
        **_sizes(q_content, value),
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
    tile = attention_tile("separable_backward_queries", q_content, value)
    lines = _lines(tile, k_content, k_rows, k_columns, value, key_mask)
    sums = {name: _sums(q_content, lines[size]) for name, size in (("p_da", "Y"), ("p_db", "X"))}
    sum_precision = launching.sum_precision(q_content.dtype, q_content.device)
    over_queries = _launch(
        kernels.backward_queries_kernel,
        triton.cdiv(queries, tile.queries) * heads * batch,
        {
            **shared,
            **lines,
            **sums,
            "p_scores": _sums(q_content, lines["Y"]),
            "p_out": output,
            "p_dqc": dq_content,
            "p_dqs": dq_spatial,
            "BQ": tile.queries,
            "SEVERAL": lines["X"] > lines["BX"],
            "SUM_PRECISION": sum_precision,
        },
        tile,
    )
    tile = attention_tile("separable_backward_keys", q_content, value)
    over_keys = _launch(
        kernels.backward_keys_kernel,
        triton.cdiv(value.shape[1], tile.keys) * heads * batch,
        {
            **shared,
            **_keys(k_content, k_rows, k_columns, key_mask),
            **shared_strides("v", "bsnd", value),
            "p_v": value,
            "p_dkc": dk_content,
            "p_dv": dvalue,
            "BQ": tile.queries,
            "BS": tile.keys,
            "HALF": q_content.dtype != torch.float32,
        },
        tile,
    )
    by_lines = lines["p_ky"] is k_rows
    codes = {"p_da": dk_rows, "p_db": dk_columns} if by_lines else {
        "p_da": dk_columns, "p_db": dk_rows
    }  # fmt: skip
    over_codes = (
        _launch(
            kernels.backward_codes_kernel,
            triton.cdiv(gradient.shape[1], CODES_TILE.keys) * heads * batch,
            {
                **shared,
                **lines,
                "p_dscores": sums[name],
                "p_dcodes": gradient,
                "BQ": CODES_TILE.queries,
                "BP": CODES_TILE.keys,
                "LINES": name == "p_da",
                "SUM_PRECISION": sum_precision,
            },
            CODES_TILE,
        )
        for name, gradient in codes.items()
    )
    return over_queries, over_keys, *over_codes


def map_launch(
    q_content: Tensor,
    q_spatial: Tensor,
    k_content: Tensor,
    k_rows: Tensor,
    k_columns: Tensor,
    key_mask: Tensor | None,
    seed: Tensor | None,
    logsumexp: Tensor,
    scale: float,
    dropout_p: float,
    attention: Tensor,
) -> Launch:
    """The attention map, from the log-sum-exp of its rows."""
    batch, queries, heads, _ = q_content.shape
    tile = attention_tile("separable_attention_map", q_content, q_content)
    arguments = {
        **_queries(q_content, q_spatial, key_mask, seed, dropout_p),
        **_keys(k_content, k_rows, k_columns, key_mask),
        **_sizes(q_content, q_content),
        "p_lse": logsumexp,
        "p_map": attention,
        "HALF": q_content.dtype != torch.float32,
        "scale_log2": scale * LOG2_E,
        "BQ": tile.queries,
        "BS": tile.keys,
    }
    tiles = triton.cdiv(queries, tile.queries) * triton.cdiv(k_content.shape[1], tile.keys)
    return _launch(kernels.attention_map_kernel, tiles * heads * batch, arguments, tile)


def _launch(kernel, programs: int, arguments: dict, tile: Tile) -> Launch:
    """A launch with those of the arguments that the kernel has."""
    present = {name: arguments[name] for name in kernel.arg_names if name in arguments}
    return Launch(kernel, programs, present, tile)


def _sums(q_content: Tensor, positions: int) -> Tensor:
    """Memory for a number for each image, head, position and query."""
    batch, queries, heads, _ = q_content.shape
    return q_content.new_empty(batch, heads, positions, queries, dtype=torch.float32)


def _queries(
    q_content: Tensor,
    q_spatial: Tensor,
    key_mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
) -> dict:
    return {
        "p_qc": q_content,
        "p_qs": q_spatial,
        "p_seed": seed,
        **shared_strides("qc", "bqnd", q_content),
        **shared_strides("qs", "bqnd", q_spatial),
        "N": q_content.shape[2],
        "Q": q_content.shape[1],
        "threshold": random.threshold(dropout_p),
        "inverse_keep": 1.0 / (1.0 - dropout_p),
        "MASKED": key_mask is not None,
        "DROPOUT": dropout_p > 0.0,
        "PRECISION": launching.dot_precision(q_content.dtype),
    }


def _keys(k_content: Tensor, k_rows: Tensor, k_columns: Tensor, key_mask: Tensor | None) -> dict:
    """Keys one after the other, and the codes of rows (y) and columns (x)."""
    return {
        "p_kc": k_content,
        "p_ky": k_rows,
        "p_kx": k_columns,
        "p_mask": key_mask,
        **shared_strides("kc", "bsnd", k_content),
        **shared_strides("ky", "bynd", k_rows),
        **shared_strides("kx", "bxnd", k_columns),
        **shared_strides("mask", "bs", key_mask),
        "Y": k_rows.shape[1],
        "X": k_columns.shape[1],
    }


def _lines(
    tile: Tile,
    k_content: Tensor,
    k_rows: Tensor,
    k_columns: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
) -> dict:
    """Keys as lines (y) of places (x): rows of the map, or columns."""
    height, width = k_rows.shape[1], k_columns.shape[1]
    codes, steps = (k_rows, k_columns), (width, 1)
    if not configurations.rows_are_lines(height, width, tile.keys):
        codes, steps = codes[::-1], steps[::-1]
    arguments = _keys(k_content, *codes, key_mask) | {"p_v": value}
    arguments |= shared_strides("v", "bsnd", value)
    for name in ("kc", "v", "mask"):
        step = arguments.pop(f"{name}_s")
        arguments |= {f"{name}_y": steps[0] * step, f"{name}_x": steps[1] * step}
    arguments |= {"step_y": steps[0], "step_x": steps[1]}
    return arguments | {"BX": configurations.places(tile.keys, arguments["X"])}


def _sizes(q_content: Tensor, value: Tensor) -> dict[str, int]:
    sizes = {"D": q_content.shape[-1], "DV": value.shape[-1]}
    padded = (configurations.padded(size) for size in sizes.values())
    return sizes | dict(zip(("BD", "BV"), padded, strict=True))


def _forward(q_content, q_spatial, k_content, k_rows, k_columns, value, *options):
    device = q_content.device
    batch, queries, heads, _ = q_content.shape
    inputs = (q_content, q_spatial, k_content, k_rows, k_columns, value, *options)
    output, logsumexp = _forward_outputs(*inputs)
    tile = attention_tile("separable_forward", q_content, value)
    lines = _lines(tile, k_content, k_rows, k_columns, value, options[0])
    parts = configurations.parts(
        triton.cdiv(queries, tile.queries) * heads * batch,
        lines["Y"] * triton.cdiv(lines["X"], lines["BX"]),
        launching.multiprocessors(device),
    )
    parts = min(parts, lines["Y"])
    if parts == 1:
        forward_launch(*inputs, output, logsumexp).run(device)
        return output, logsumexp
    part = output.new_empty(parts * batch, *output.shape[1:], dtype=torch.float32)
    part_logsumexp = logsumexp.new_empty(parts * batch, heads, queries)
    forward_launch(*inputs, part, part_logsumexp).run(device)
    merge_launch(part, part_logsumexp, output, logsumexp).run(device)
    return output, logsumexp


def _forward_outputs(q_content, q_spatial, k_content, k_rows, k_columns, value, *_):
    batch, queries, heads, _ = q_content.shape
    output = q_content.new_empty(batch, queries, heads, value.shape[-1])
    return output, q_content.new_empty(batch, heads, queries, dtype=torch.float32)


def _backward(grad_output, *inputs):
    tensors = inputs[:6]
    batch = len(inputs[0])
    # What the batch shares has a gradient per image first, so that none is added atomically; codes
    # are so few that fp32 costs nothing.
    gradients = [
        x.new_empty(batch, *x.shape[1:], dtype=torch.float32 if i in (3, 4) else x.dtype)
        for i, x in enumerate(tensors)
    ]
    for launch in backward_launches(grad_output, *inputs, gradients):
        launch.run(grad_output.device)
    return tuple(
        (gradient if len(x) == batch else gradient.sum(0, keepdim=True)).to(x.dtype)
        for gradient, x in zip(gradients, tensors, strict=True)
    )


def _backward_outputs(grad_output, *inputs):
    return tuple(x.new_empty(x.shape) for x in inputs[:6])


def _map(*inputs):
    attention = _map_output(*inputs)
    map_launch(*inputs, attention).run(attention.device)
    return attention


def _map_output(q_content, q_spatial, k_content, *_):
    batch, queries, heads, _ = q_content.shape
    return q_content.new_empty(batch, heads, queries, k_content.shape[1])


def _save_for_backward(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.dropout_p = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_output, _):
    if grad_output is None:
        return (None,) * 10
    *tensors, output, logsumexp = ctx.saved_tensors
    gradients = torch.ops.cdetr_fast.conditional_attention_separable_backward(
        grad_output, *tensors, ctx.scale, ctx.dropout_p, output, logsumexp
    )
    return (*gradients, None, None, None, None)


def _save_for_map_backward(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.dropout_p = inputs
    ctx.save_for_backward(*tensors, output)


def _map_gradients(ctx, grad_attention):
    """In plain torch: a gradient that comes in through the map is as large as the map anyway."""
    *tensors, lse, attention = ctx.saved_tensors
    q_content, q_spatial, k_content, k_rows, k_columns, key_mask, _ = tensors
    undropped = attention
    if ctx.dropout_p > 0.0:
        undropped = torch.ops.cdetr_fast.conditional_attention_separable_map(
            *tensors[:5], key_mask, None, lse, ctx.scale, 0.0
        )
    weighted = attention.float() * grad_attention.float()  # [B, N, Q, S]
    dscore = (weighted - undropped.float() * weighted.sum(-1, keepdim=True)) * ctx.scale
    of_map = dscore.unflatten(-1, (k_rows.shape[1], k_columns.shape[1]))

    def products(dscore, query, key):
        dscore = dscore.to(query.dtype)
        dquery = (dscore @ key.transpose(1, 2)).transpose(1, 2)
        dkey = (dscore.mT @ query.transpose(1, 2)).transpose(1, 2)
        return dquery, dkey if len(key) == len(dkey) else dkey.sum(0, keepdim=True)

    dq_content, dk_content = products(dscore, q_content, k_content)
    by_rows, dk_rows = products(of_map.sum(-1), q_spatial, k_rows)
    by_columns, dk_columns = products(of_map.sum(-2), q_spatial, k_columns)
    gradients = (dq_content, by_rows + by_columns, dk_content, dk_rows, dk_columns)
    return (*gradients, None, None, None, None, None)


_INPUTS = "Tensor q_content, Tensor q_spatial, Tensor k_content, Tensor k_rows, Tensor k_columns"
register(
    f"conditional_attention_separable({_INPUTS}, Tensor value, Tensor? key_mask, Tensor? seed, "
    "float scale, float dropout_p) -> (Tensor, Tensor)",
    _forward,
    _forward_outputs,
    _gradients,
    _save_for_backward,
)
register(
    f"conditional_attention_separable_backward(Tensor grad_output, {_INPUTS}, Tensor value, "
    "Tensor? key_mask, Tensor? seed, float scale, float dropout_p, Tensor output, "
    "Tensor logsumexp) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_outputs,
    refuse_second_derivative("conditional_attention_separable_backward"),
)
register(
    f"conditional_attention_separable_map({_INPUTS}, Tensor? key_mask, Tensor? seed, "
    "Tensor logsumexp, float scale, float dropout_p) -> Tensor",
    _map,
    _map_output,
    _map_gradients,
    _save_for_map_backward,
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
    """The path "triton" of `cdetr_kernels.conditional_attention_separable`; see there for shapes.

    Dropout masks are those of `conditional_attention` on the same path with the same seed.
    """
    drawn = seed_tensor(seed, dropout_p, q_content.device)
    queries_and_keys = (q_content, q_spatial, k_content, k_rows, k_columns)
    output, logsumexp = torch.ops.cdetr_fast.conditional_attention_separable(
        *queries_and_keys, value, key_mask, drawn, scale, dropout_p
    )
    attention = None
    if return_attention:
        attention = torch.ops.cdetr_fast.conditional_attention_separable_map(
            *queries_and_keys, key_mask, drawn, logsumexp, scale, dropout_p
        )
    return output, attention
