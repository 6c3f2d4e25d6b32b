"""Kernels of conditional attention over a map whose spatial keys are a row's plus a column's code.

    score[i,(y,x)] = scale * (q_content[i] . k_content[y,x]) + A[i,y] + B[i,x]
    A[i,y]         = scale * q_spatial[i] . k_rows[y]
    B[i,x]         = scale * q_spatial[i] . k_columns[x]

The rest is as in `ops.conditional_attention.kernels`, whose names hold here too. A tile of keys is
one line of the map, or a part of one, at the places x of which B is the same block for every line:
it is computed once, and enters in the multiply-add that scales the scores. A is one number for each
query and line; `exp2(S + A - pivot)` takes it in with the pivot, so it costs nothing per key. It is
computed by matrix products beforehand, and waits for its line in the L1 (a row of `line_scores`).

In backward the sums of dscore along and across the lines are all that the position codes need:

    dA[i,y] = sum_x dscore[i,y,x]                  dB[i,x] = sum_y dscore[i,y,x]
    dq_spatial = scale (dA k_rows + dB k_columns)
    dk_rows    = scale dA^T q_spatial              dk_columns = scale dB^T q_spatial

So there is no product with spatial keys per tile in the kernel of the queries; the kernel of the
keys, in which tiles need not be lines, has one product for each of the two codes and none for
their gradients.

Names: Y lines of X places each. The launcher makes rows of the map lines, or columns, whichever
leaves less of the tiles empty; key (y, x) is number `y * step_y + x * step_x`.
Source: as in `ops.conditional_attention.kernels`; the authors' models/position_encoding.py.
"""

import triton
import triton.language as tl

from cdetr_kernels.gpu.arithmetic import dot, rounded
from cdetr_kernels.gpu.attention_kernels import (
    LOWEST,
    key_gradients,
    load_rows,
    mask_bias,
    program,
    row_gradients,
    store_map,
    store_output,
    store_rows,
    stored_streams,
)
from cdetr_kernels.gpu.random import keep, row_streams

# And the strides of the mask, which depend on the map: one variant for all maps.
_SIZES = ["N", "Q", "Y", "X", "threshold", "mask_b", "mask_y", "mask_x", "step_y", "step_x"]


@triton.jit
def _extents(p_mask, Y, X, stride_y, stride_x, MASKED: tl.constexpr):
    """Return one more than the last line, and the last place, with a key that is attended to."""
    lines, places = Y, X
    if MASKED:
        BLOCK: tl.constexpr = 1024
        last_y, last_x = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
        for start in range(0, Y * X, BLOCK):
            o_s = start + tl.arange(0, BLOCK)
            o_y, o_x = o_s // X, o_s % X
            p_keys = p_mask + o_y.to(tl.int64) * stride_y + o_x.to(tl.int64) * stride_x
            attended = tl.load(p_keys, o_y < Y, other=0) != 0
            last_y = tl.maximum(last_y, tl.where(attended, o_y + 1, 0))
            last_x = tl.maximum(last_x, tl.where(attended, o_x + 1, 0))
        lines, places = tl.max(last_y, 0), tl.max(last_x, 0)
    return lines, places


@triton.jit
def _line_scores(
    p_scores, p_qs, p_ky, o_q, Q, qs_q, qs_d, first, last, ky_y, o_d, ky_d, scale,
    D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Leave A of the lines from `first` to `last` in memory, a row of Q for each line."""
    BY: tl.constexpr = 16
    b_qs = load_rows(p_qs, o_q, Q, qs_q, o_d, qs_d, D)
    for i_y in range(0, last - first, BY):
        o_y = first + i_y + tl.arange(0, BY)
        b_ky = load_rows(p_ky, o_y, last, ky_y, o_d, ky_d, D)
        b_a = dot(b_qs, tl.trans(b_ky), PRECISION) * scale  # [BQ, BY]
        p_tile = p_scores + o_y.to(tl.int64)[None, :] * Q + o_q[:, None]
        tl.store(p_tile, b_a, (o_q < Q)[:, None] & (o_y < last)[None, :])
    # Other threads of this program read it.
    tl.debug_barrier()


@triton.jit
def _place_scores(
    p_qs, p_kx, o_q, Q, qs_q, qs_d, o_x, places, kx_x, o_d, kx_d, scale,
    D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return B of a tile of places, -inf beyond the last one.

    Loads the spatial queries again for each tile: they would occupy registers through all lines.
    """
    b_qs = load_rows(p_qs, o_q, Q, qs_q, o_d, qs_d, D)
    b_kx = load_rows(p_kx, o_x, places, kx_x, o_d, kx_d, D)
    b_b = dot(b_qs, tl.trans(b_kx), PRECISION) * scale
    return tl.where((o_x < places)[None, :], b_b, float("-inf"))  # [BQ, BX]


@triton.jit
def _code_products(
    b_acc, p_sums, p_codes, o_q, Q, positions, stride, o_d, stride_d,
    D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return b_acc plus the sums of dscore (dA or dB) times the codes of their positions."""
    BP: tl.constexpr = 16
    for i_p in range(0, positions, BP):
        o_p = i_p + tl.arange(0, BP)
        p_tile = p_sums + o_p.to(tl.int64)[None, :] * Q + o_q[:, None]
        b_sums = tl.load(p_tile, (o_q < Q)[:, None] & (o_p < positions)[None, :], other=0.0)
        b_codes = load_rows(p_codes, o_p, positions, stride, o_d, stride_d, D)
        b_acc = dot(b_sums, b_codes.to(tl.float32), PRECISION, b_acc)  # [BQ, BD]
    return b_acc


@triton.jit(do_not_specialize=[*_SIZES, "B", "splits"])
def forward_kernel(
    p_qc,  # [B, Q, N, D]
    p_qs,  # [B, Q, N, D]
    p_kc,  # [B, Y, X, N, D]
    p_ky,  # [B, Y, N, D]
    p_kx,  # [B, X, N, D]
    p_v,  # [B, Y, X, N, DV]
    p_mask,  # [B, Y, X]
    p_seed,  # [1]
    p_scores,  # [B, N, Y, Q], contiguous; scratch
    p_out,  # [splits * B, Q, N, DV], contiguous
    p_lse,  # [splits * B, N, Q], contiguous
    qc_b, qc_q, qc_n, qc_d,
    qs_b, qs_q, qs_n, qs_d,
    kc_b, kc_y, kc_x, kc_n, kc_d,
    ky_b, ky_y, ky_n, ky_d,
    kx_b, kx_x, kx_n, kx_d,
    v_b, v_y, v_x, v_n, v_d,
    mask_b, mask_y, mask_x,
    B, N, Q, Y, X, step_y, step_x,
    splits,
    scale,  # times log2(e)
    threshold,
    inverse_keep,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BQ: tl.constexpr, BX: tl.constexpr,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute one tile of queries of one head and image, against one part of the lines."""
    i_q, i_n, i_out = program(Q, BQ, N)
    i_b, i_split = (i_out % B).to(tl.int64), i_out // B
    i_head = i_n.to(tl.int64)
    o_q = i_q * BQ + tl.arange(0, BQ)
    o_d, o_v = tl.arange(0, BD), tl.arange(0, BV)
    m_q = o_q < Q

    b_qc = load_rows(p_qc + i_b * qc_b + i_head * qc_n, o_q, Q, qc_q, o_d, qc_d, D)
    p_qs += i_b * qs_b + i_head * qs_n
    p_kc += i_b * kc_b + i_head * kc_n
    p_ky += i_b * ky_b + i_head * ky_n
    p_kx += i_b * kx_b + i_head * kx_n
    p_v += i_b * v_b + i_head * v_n
    p_scores += (i_b * N + i_head) * Y * Q
    if MASKED:
        p_mask += i_b * mask_b
    if DROPOUT:
        start, step = row_streams(p_seed, (i_b * N + i_n).to(tl.int32), o_q)

    lines, places = _extents(p_mask, Y, X, mask_y, mask_x, MASKED)
    part = tl.cdiv(lines, splits)
    first = i_split * part
    count = tl.minimum(part, lines - first)
    _line_scores(
        p_scores, p_qs, p_ky, o_q, Q, qs_q, qs_d, first, first + count, ky_y, o_d, ky_d, scale,
        D, PRECISION,
    )  # fmt: skip
    b_m = tl.full([BQ], LOWEST, tl.float32)
    b_l = tl.zeros([BQ], tl.float32)
    b_acc = tl.zeros([BQ, BV], tl.float32)
    for i_x in range(0, places, BX):
        o_x = i_x + tl.arange(0, BX)
        b_b = _place_scores(
            p_qs, p_kx, o_q, Q, qs_q, qs_d, o_x, places, kx_x, o_d, kx_d, scale, D, PRECISION
        )
        if MASKED:
            # A part may begin behind the last line, where there is no mask to read.
            present = tl.where(count > 0, places, 0)
            bias = mask_bias(p_mask + first.to(tl.int64) * mask_y, o_x, present, mask_x, True)
        # From 0: triton 3.9 does not pipeline a loop whose start comes from memory.
        for i_y in range(count):
            y = (first + i_y).to(tl.int64)
            b_a = tl.load(p_scores + y * Q + o_q, m_q, other=0.0)
            b_kc = load_rows(p_kc + y * kc_y, o_x, places, kc_x, o_d, kc_d, D)
            b_s = dot(b_qc, tl.trans(b_kc), PRECISION)  # [BQ, BX]
            if MASKED:
                b_s = b_s * scale + (b_b + bias[None, :])
                # A line ahead: a mask's bytes are too narrow for the pipeline's copies.
                rest = tl.where(i_y + 1 < count, places, 0)
                bias = mask_bias(p_mask + (y + 1) * mask_y, o_x, rest, mask_x, True)
            else:
                b_s = b_s * scale + b_b
            b_m_next = tl.maximum(b_m, tl.max(b_s, 1) + b_a)
            b_p = tl.exp2(b_s - (b_m_next - b_a)[:, None])
            shrink = tl.exp2(b_m - b_m_next)
            b_l = b_l * shrink + tl.sum(b_p, 1)
            if DROPOUT:
                o_s = (y * step_y).to(tl.int32) + o_x * step_x
                kept = keep(start[:, None], step[:, None], o_s[None, :], threshold)
                b_p = tl.where(kept, b_p, 0.0)
            b_v = load_rows(p_v + y * v_y, o_x, places, v_x, o_v, v_d, DV)
            b_acc = dot(rounded(b_p, b_v.dtype, PRECISION), b_v, PRECISION, b_acc * shrink[:, None])
            b_m = b_m_next

    store_output(
        p_out, p_lse, b_acc, b_l, b_m, i_out, i_n, N, o_q, Q, o_v, inverse_keep, DV, PRECISION
    )


@triton.jit(do_not_specialize=_SIZES)
def backward_queries_kernel(
    p_qc, p_qs, p_kc, p_ky, p_kx, p_v, p_mask, p_seed, p_scores,  # as in forward
    p_out,  # [B, Q, N, DV], contiguous
    p_lse,  # [B, N, Q], contiguous
    p_do,  # [B, Q, N, DV]
    p_delta,  # [B, N, Q], contiguous; written for the kernel of the keys, as is
    p_streams,  # [B, N, Q, 2], contiguous: start and step of each row's dropout
    p_da,  # [B, N, Y, Q], contiguous
    p_db,  # [B, N, X, Q], contiguous
    p_dqc,  # [B, Q, N, D], contiguous
    p_dqs,  # [B, Q, N, D], contiguous
    qc_b, qc_q, qc_n, qc_d,
    qs_b, qs_q, qs_n, qs_d,
    kc_b, kc_y, kc_x, kc_n, kc_d,
    ky_b, ky_y, ky_n, ky_d,
    kx_b, kx_x, kx_n, kx_d,
    v_b, v_y, v_x, v_n, v_d,
    mask_b, mask_y, mask_x,
    do_b, do_q, do_n, do_d,
    N, Q, Y, X, step_y, step_x,
    scale, scale_log2, threshold, inverse_keep,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BQ: tl.constexpr, BX: tl.constexpr,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, SEVERAL: tl.constexpr,
    PRECISION: tl.constexpr, SUM_PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute one tile of queries against all keys: dq_content, dq_spatial; dA, dB and delta.

    SEVERAL is True where a line has more than one tile.
    """
    i_q, i_n, i_b = program(Q, BQ, N)
    i_b, i_n = i_b.to(tl.int64), i_n.to(tl.int64)
    o_q = i_q * BQ + tl.arange(0, BQ)
    o_d, o_v = tl.arange(0, BD), tl.arange(0, BV)
    m_q = o_q < Q
    i_head = i_b * N + i_n

    b_qc = load_rows(p_qc + i_b * qc_b + i_n * qc_n, o_q, Q, qc_q, o_d, qc_d, D)
    p_do += i_b * do_b + i_n * do_n
    b_do, b_delta, b_lse = row_gradients(
        p_out, p_lse, p_do, p_delta, i_b, i_n, N, o_q, Q, o_v, do_q, do_d, DV
    )
    p_qs += i_b * qs_b + i_n * qs_n
    p_kc += i_b * kc_b + i_n * kc_n
    p_ky += i_b * ky_b + i_n * ky_n
    p_kx += i_b * kx_b + i_n * kx_n
    p_v += i_b * v_b + i_n * v_n
    p_scores += i_head * Y * Q
    p_da += i_head * Y * Q
    p_db += i_head * X * Q
    if MASKED:
        p_mask += i_b * mask_b
    if DROPOUT:
        start, step = stored_streams(p_seed, p_streams, i_head, o_q, Q)

    lines, places = _extents(p_mask, Y, X, mask_y, mask_x, MASKED)
    _line_scores(
        p_scores, p_qs, p_ky, o_q, Q, qs_q, qs_d, 0, lines, ky_y, o_d, ky_d, scale_log2,
        D, PRECISION,
    )  # fmt: skip
    b_dqc = tl.zeros([BQ, BD], tl.float32)
    for i_x in range(0, places, BX):
        o_x = i_x + tl.arange(0, BX)
        b_b = _place_scores(
            p_qs, p_kx, o_q, Q, qs_q, qs_d, o_x, places, kx_x, o_d, kx_d, scale_log2, D, PRECISION
        )
        b_db = tl.zeros([BQ, BX], tl.float32)
        if MASKED:
            bias = mask_bias(p_mask, o_x, places, mask_x, True)
        for i_y in range(lines):
            y = tl.cast(i_y, tl.int64)
            b_a = tl.load(p_scores + y * Q + o_q, m_q, other=0.0)
            b_kc = load_rows(p_kc + y * kc_y, o_x, places, kc_x, o_d, kc_d, D)
            b_s = dot(b_qc, tl.trans(b_kc), PRECISION)  # [BQ, BX]
            if MASKED:
                b_s = b_s * scale_log2 + (b_b + bias[None, :])
                rest = tl.where(i_y + 1 < lines, places, 0)
                bias = mask_bias(p_mask + (y + 1) * mask_y, o_x, rest, mask_x, True)
            else:
                b_s = b_s * scale_log2 + b_b
            b_p = tl.exp2(b_s - (b_lse - b_a)[:, None])
            b_v = load_rows(p_v + y * v_y, o_x, places, v_x, o_v, v_d, DV)
            b_dp = dot(b_do, tl.trans(b_v), PRECISION)
            if DROPOUT:
                o_s = i_y * step_y + o_x * step_x
                kept = keep(start[:, None], step[:, None], o_s[None, :], threshold)
                b_dp = tl.where(kept, b_dp * inverse_keep, 0.0)
            b_ds = b_p * (b_dp - b_delta[:, None])
            b_da = tl.sum(b_ds, 1)
            if SEVERAL:
                b_da += tl.load(p_da + y * Q + o_q, m_q & (i_x > 0), other=0.0)
            tl.store(p_da + y * Q + o_q, b_da, m_q)
            b_db += b_ds
            b_dqc = dot(rounded(b_ds, b_kc.dtype, PRECISION), b_kc, PRECISION, b_dqc)
        p_tile = p_db + o_x.to(tl.int64)[None, :] * Q + o_q[:, None]
        tl.store(p_tile, b_db, m_q[:, None] & (o_x < places)[None, :])
        # The sums of this tile are read with the next one's, and then with the codes.
        tl.debug_barrier()
    offset = i_b * Q * N * D + i_n * D
    store_rows(p_dqc + offset, b_dqc * scale, o_q, Q, N * D, o_d, D, PRECISION)
    b_dqs = tl.zeros([BQ, BD], tl.float32)
    b_dqs = _code_products(b_dqs, p_da, p_ky, o_q, Q, lines, ky_y, o_d, ky_d, D, SUM_PRECISION)
    b_dqs = _code_products(b_dqs, p_db, p_kx, o_q, Q, places, kx_x, o_d, kx_d, D, SUM_PRECISION)
    store_rows(p_dqs + offset, b_dqs * scale, o_q, Q, N * D, o_d, D, PRECISION)


@triton.jit(do_not_specialize=_SIZES)
def backward_codes_kernel(
    p_qs,  # [B, Q, N, D]
    p_mask,  # [B, Y, X]
    p_dscores,  # [B, N, P, Q], contiguous: dA, or dB
    p_dcodes,  # [B, P, N, D], contiguous
    qs_b, qs_q, qs_n, qs_d,
    mask_b, mask_y, mask_x,
    N, Q, Y, X,
    scale,
    D: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr, BP: tl.constexpr,
    LINES: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, SUM_PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of the codes of P lines (if LINES), or of P places."""
    P = Y if LINES else X
    i_p, i_n, i_b = program(P, BP, N)
    i_b, i_n = i_b.to(tl.int64), i_n.to(tl.int64)
    o_p = i_p * BP + tl.arange(0, BP)
    o_d = tl.arange(0, BD)
    if MASKED:
        p_mask += i_b * mask_b
    lines, places = _extents(p_mask, Y, X, mask_y, mask_x, MASKED)
    # Those beyond the last key were never written: their gradient is zero.
    written = lines if LINES else places
    p_qs += i_b * qs_b + i_n * qs_n
    p_dscores += (i_b * N + i_n) * P * Q
    b_dcodes = tl.zeros([BP, BD], tl.float32)
    for i_q in range(0, Q, BQ):
        o_q = i_q + tl.arange(0, BQ)
        b_qs = load_rows(p_qs, o_q, Q, qs_q, o_d, qs_d, D).to(tl.float32)
        p_tile = p_dscores + o_p.to(tl.int64)[:, None] * Q + o_q[None, :]
        b_dscores = tl.load(p_tile, (o_p < written)[:, None] & (o_q < Q)[None, :], other=0.0)
        b_dcodes = dot(b_dscores, b_qs, SUM_PRECISION, b_dcodes)
    p_dcodes += i_b * P * N * D + i_n * D
    store_rows(p_dcodes, b_dcodes * scale, o_p, P, N * D, o_d, D, PRECISION)


@triton.jit(do_not_specialize=_SIZES)
def backward_keys_kernel(
    p_qc, p_qs, p_kc, p_ky, p_kx, p_v, p_mask,  # as in forward
    p_lse,  # [B, N, Q], contiguous
    p_do,  # [B, Q, N, DV]
    p_delta,  # [B, N, Q], contiguous
    p_streams,  # [B, N, Q, 2], contiguous
    p_dkc,  # [B, S, N, D], contiguous
    p_dv,  # [B, S, N, DV], contiguous
    qc_b, qc_q, qc_n, qc_d,
    qs_b, qs_q, qs_n, qs_d,
    kc_b, kc_s, kc_n, kc_d,
    ky_b, ky_y, ky_n, ky_d,
    kx_b, kx_x, kx_n, kx_d,
    v_b, v_s, v_n, v_d,
    mask_b, mask_s,
    do_b, do_q, do_n, do_d,
    N, Q, Y, X,
    scale, scale_log2, threshold, inverse_keep,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BQ: tl.constexpr, BS: tl.constexpr, HALF: tl.constexpr,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute one tile of keys against all queries: dk_content, dvalue. Y and X: rows and columns.

    A tile's codes are gathered once. They are added up where that loses nothing (fp32); in half
    precision each has a product, so that the scores are those of forward to the last bits.
    """
    S = Y * X
    i_s, i_n, i_b = program(S, BS, N)
    i_b, i_n = i_b.to(tl.int64), i_n.to(tl.int64)
    o_s = i_s * BS + tl.arange(0, BS)
    o_d, o_v = tl.arange(0, BD), tl.arange(0, BV)

    b_kc = load_rows(p_kc + i_b * kc_b + i_n * kc_n, o_s, S, kc_s, o_d, kc_d, D)
    b_v = load_rows(p_v + i_b * v_b + i_n * v_n, o_s, S, v_s, o_v, v_d, DV)
    b_ky = load_rows(p_ky + i_b * ky_b + i_n * ky_n, o_s // X, Y, ky_y, o_d, ky_d, D)
    b_kx = load_rows(p_kx + i_b * kx_b + i_n * kx_n, o_s % X, X, kx_x, o_d, kx_d, D)
    if not HALF:
        b_ky += b_kx
    if MASKED:
        p_mask += i_b * mask_b
    bias = mask_bias(p_mask, o_s, S, mask_s, MASKED)
    p_qc += i_b * qc_b + i_n * qc_n
    p_qs += i_b * qs_b + i_n * qs_n
    p_do += i_b * do_b + i_n * do_n
    b_dkc, _, b_dv = key_gradients(
        b_kc, b_ky, b_kx, b_v, bias, o_s, p_qc, p_qs, p_do, (i_b * N + i_n) * Q,
        p_lse, p_delta, p_streams, qc_q, qc_d, qs_q, qs_d, do_q, do_d,
        Q, scale_log2, threshold, inverse_keep,
        D, DV, BD, BV, BQ, True, HALF, False, DROPOUT, PRECISION,
    )  # fmt: skip
    store_rows(p_dkc + i_b * S * N * D + i_n * D, b_dkc * scale, o_s, S, N * D, o_d, D, PRECISION)
    store_rows(p_dv + i_b * S * N * DV + i_n * DV, b_dv, o_s, S, N * DV, o_v, DV, PRECISION)


@triton.jit(do_not_specialize=_SIZES)
def attention_map_kernel(
    p_qc, p_qs, p_kc, p_ky, p_kx, p_mask, p_seed,  # as in forward
    p_lse,  # [B, N, Q], contiguous
    p_map,  # [B, N, Q, S], contiguous
    qc_b, qc_q, qc_n, qc_d,
    qs_b, qs_q, qs_n, qs_d,
    kc_b, kc_s, kc_n, kc_d,
    ky_b, ky_y, ky_n, ky_d,
    kx_b, kx_x, kx_n, kx_d,
    mask_b, mask_s,
    N, Q, Y, X,
    scale_log2, threshold, inverse_keep,
    D: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr, BS: tl.constexpr, HALF: tl.constexpr,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute one tile of queries and keys: P, after dropout. Y, X and HALF as for the keys."""
    S = Y * X
    i_tile, i_n, i_b = program(tl.cdiv(Q, BQ) * tl.cdiv(S, BS), 1, N)
    i_b, i_n = i_b.to(tl.int64), i_n.to(tl.int64)
    o_s = (i_tile % tl.cdiv(S, BS)) * BS + tl.arange(0, BS)
    o_q = (i_tile // tl.cdiv(S, BS)) * BQ + tl.arange(0, BQ)
    o_d = tl.arange(0, BD)
    if MASKED:
        p_mask += i_b * mask_b

    b_qc = load_rows(p_qc + i_b * qc_b + i_n * qc_n, o_q, Q, qc_q, o_d, qc_d, D)
    b_kc = load_rows(p_kc + i_b * kc_b + i_n * kc_n, o_s, S, kc_s, o_d, kc_d, D)
    b_s = dot(b_qc, tl.trans(b_kc), PRECISION)  # [BQ, BS]
    b_qs = load_rows(p_qs + i_b * qs_b + i_n * qs_n, o_q, Q, qs_q, o_d, qs_d, D)
    b_ky = load_rows(p_ky + i_b * ky_b + i_n * ky_n, o_s // X, Y, ky_y, o_d, ky_d, D)
    p_kx += i_b * kx_b + i_n * kx_n
    if HALF:
        b_s = dot(b_qs, tl.trans(b_ky), PRECISION, b_s)
        b_ks = load_rows(p_kx, o_s % X, X, kx_x, o_d, kx_d, D)
    else:
        b_ks = b_ky + load_rows(p_kx, o_s % X, X, kx_x, o_d, kx_d, D)
    b_s = dot(b_qs, tl.trans(b_ks), PRECISION, b_s)
    bias = mask_bias(p_mask, o_s, S, mask_s, MASKED)
    store_map(
        p_map, p_lse, p_seed, b_s * scale_log2 + bias[None, :], i_b * N + i_n, o_q, Q, o_s, S,
        threshold, inverse_keep, DROPOUT, PRECISION,
    )  # fmt: skip
