"""Conditional attention over a separable map as an operator of torch: launchers, front.

The kernels, and the mathematics, are in `kernels`; what both attention operators share on the host,
in `gpu.attention`.
"""

from typing import Any

import torch
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
from cdetr_kernels.ops.conditional_attention_separable import kernels

# Of the kernel of the codes: it does little, and the same for all heads.
CODES_TILE = Tile(32, 16, 4, 2, 216, 20, 10)


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
    """Launch forward, into `output` and `logsumexp` (part after part of the lines)."""
    batch, queries, heads, _ = q_content.shape
    tile = attention_tile("separable_forward", q_content, value)
    arguments = {
        **query_arguments(q_content, q_spatial, key_mask, seed, dropout_p),
        **_lines(tile, k_content, k_rows, k_columns, value, key_mask),
        **size_arguments(q_content, value),
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
    *gradients: Tensor,
) -> tuple[Launch, ...]:
    """Launch the kernels over queries, over keys, and over the codes of lines and of places."""
    batch, queries, heads, _ = q_content.shape
    dq_content, dq_spatial, dk_content, dk_rows, dk_columns, dvalue = gradients
    shared = {
        **query_arguments(q_content, q_spatial, key_mask, seed, dropout_p),
        **size_arguments(q_content, value),
        **gradient_arguments(grad_output, logsumexp, scale, dropout_p),
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
    """Launch the attention map, from the log-sum-exp of its rows."""
    batch, queries, heads, _ = q_content.shape
    tile = attention_tile("separable_attention_map", q_content, q_content)
    arguments = {
        **query_arguments(q_content, q_spatial, key_mask, seed, dropout_p),
        **_keys(k_content, k_rows, k_columns, key_mask),
        **size_arguments(q_content, None),
        "p_lse": logsumexp,
        "p_map": attention,
        "HALF": q_content.dtype != torch.float32,
        "scale_log2": scale * LOG2_E,
        "BQ": tile.queries,
        "BS": tile.keys,
    }
    tiles = triton.cdiv(queries, tile.queries) * triton.cdiv(k_content.shape[1], tile.keys)
    return _launch(kernels.attention_map_kernel, tiles * heads * batch, arguments, tile)


def _launch(kernel: Any, programs: int, arguments: dict[str, Any], tile: Tile) -> Launch:
    """Return a launch with those of the arguments that the kernel has."""
    present = {name: arguments[name] for name in kernel.arg_names if name in arguments}
    return Launch(kernel, programs, present, tile)


def _sums(q_content: Tensor, positions: int) -> Tensor:
    """Return memory for a number for each image, head, position and query."""
    batch, queries, heads, _ = q_content.shape
    return q_content.new_empty(batch, heads, positions, queries, dtype=torch.float32)


def _keys(
    k_content: Tensor, k_rows: Tensor, k_columns: Tensor, key_mask: Tensor | None
) -> dict[str, Any]:
    """Return keys one after the other, and the codes of rows (y) and columns (x)."""
    return {
        "p_kc": k_content,
        "p_ky": k_rows,
        "p_kx": k_columns,
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
) -> dict[str, Any]:
    """Return keys as lines (y) of places (x): rows of the map, or columns."""
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


def _parts(
    q_content: Tensor,
    _qs: Any,
    k_content: Tensor,
    k_rows: Tensor,
    k_columns: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    *_: Any,
) -> int:
    batch, queries, heads, _size = q_content.shape
    tile = attention_tile("separable_forward", q_content, value)
    lines = _lines(tile, k_content, k_rows, k_columns, value, key_mask)
    parts = configurations.parts(
        triton.cdiv(queries, tile.queries) * heads * batch,
        lines["Y"] * triton.cdiv(lines["X"], lines["BX"]),
        launching.multiprocessors(q_content.device),
        tile.fill,
        tile.depth,
    )
    return min(parts, lines["Y"])


def _score_gradients(
    dscore: Tensor,
    q_content: Tensor,
    q_spatial: Tensor,
    k_content: Tensor,
    k_rows: Tensor,
    k_columns: Tensor,
) -> tuple[Tensor, ...]:
    of_map = dscore.unflatten(-1, (k_rows.shape[1], k_columns.shape[1]))
    dq_content, dk_content = product_gradients(dscore, q_content, k_content)
    by_rows, dk_rows = product_gradients(of_map.sum(-1), q_spatial, k_rows)
    by_columns, dk_columns = product_gradients(of_map.sum(-2), q_spatial, k_columns)
    return dq_content, by_rows + by_columns, dk_content, dk_rows, dk_columns


ATTENTION = AttentionOperator(
    "conditional_attention_separable",
    "Tensor q_content, Tensor q_spatial, Tensor k_content, Tensor k_rows, Tensor k_columns",
    5,
    forward_launch,
    backward_launches,
    map_launch,
    _parts,
    _score_gradients,
    fp32_gradients=(3, 4),  # codes are so few that fp32 costs nothing
)
_attend, _attention_map = ATTENTION.register()


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
    """Run the implementation "triton" of `cdetr_kernels.conditional_attention_separable`.

    Dropout masks are those of `conditional_attention` there with the same seed.
    """
    drawn = seed_tensor(seed, dropout_p, q_content.device)
    queries_and_keys = (q_content, q_spatial, k_content, k_rows, k_columns)
    output, logsumexp = _attend(*queries_and_keys, value, key_mask, drawn, scale, dropout_p)
    attention = None
    if return_attention:
        attention = _attention_map(*queries_and_keys, key_mask, drawn, logsumexp, scale, dropout_p)
    return output, attention
