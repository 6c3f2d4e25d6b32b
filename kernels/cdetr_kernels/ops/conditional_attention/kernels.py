"""Kernels of conditional attention, tile by tile: forward, both backward kernels, the map.

    score[i,j] = scale * (q_content[i] . k_content[j] + q_spatial[i] . k_spatial[j])    per b, n
    P          = softmax over the keys j that are attended to
    out[i]     = sum_j keep[i,j] P[i,j] / (1 - p) value[j]

Two dot products add up into one tile of scores that never leaves the chip; the softmax over keys
is kept up to date tile by tile (pivot, sum, output), in fp32 and to base 2. The log-sum-exp of each
row is all that backward needs to have P again:

    delta[i] = dout[i] . out[i]
    dscore   = P (keep / (1 - p) dout . value - delta)
    dq_*     = scale dscore k_*
    dk_*     = scale dscore^T q_*
    dvalue   = (keep P / (1 - p))^T dout

Queries and keys have a backward kernel each, so that every sum has one owner and one order: no
atomic additions, the same bits in every run. Masks enter as a bias of 0 or -inf, in the
multiply-add that scales the scores. The pivot starts finite, so a row without keys is 0 / 1 and
never NaN.

Names: B images, Q queries, S keys, N heads, D and DV their sizes, padded to BD and BV; tiles of BQ
queries and BS keys. `i_` an index, `o_` offsets, `m_` masks, `p_` pointers, `b_` blocks.
Source: Meng et al., section 3.3; Dao, "FlashAttention-2", 2023 (the order of the work).
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


@triton.jit
def _extent(p_mask, S, stride_s, MASKED: tl.constexpr):
    """Return one more than the last key that is attended to: tiles after it are never visited."""
    extent = S
    if MASKED:
        BLOCK: tl.constexpr = 1024
        last = tl.zeros([BLOCK], tl.int32)
        for start in range(0, S, BLOCK):
            o_s = start + tl.arange(0, BLOCK)
            attended = tl.load(p_mask + o_s.to(tl.int64) * stride_s, o_s < S, other=0) != 0
            last = tl.maximum(last, tl.where(attended, o_s + 1, 0))
        extent = tl.max(last, 0)
    return extent


_SIZES = ["N", "Q", "S", "threshold", "mask_b"]


@triton.jit(do_not_specialize=[*_SIZES, "B", "splits"])
def forward_kernel(
    p_qc,  # [B, Q, N, D]
    p_qs,  # [B, Q, N, D]
    p_kc,  # [B, S, N, D]
    p_ks,  # [B, S, N, D]
    p_v,  # [B, S, N, DV]
    p_mask,  # [B, S]
    p_seed,  # [1]
    p_out,  # [splits * B, Q, N, DV], contiguous
    p_lse,  # [splits * B, N, Q], contiguous
    qc_b, qc_q, qc_n, qc_d,
    qs_b, qs_q, qs_n, qs_d,
    kc_b, kc_s, kc_n, kc_d,
    ks_b, ks_s, ks_n, ks_d,
    v_b, v_s, v_n, v_d,
    mask_b, mask_s,
    B, N, Q, S,
    splits,
    scale,  # times log2(e)
    threshold,
    inverse_keep,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BQ: tl.constexpr, BS: tl.constexpr,
    SPATIAL: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute one tile of queries of one head and image, against one part of the keys."""
    i_q, i_n, i_out = program(Q, BQ, N)
    i_b, i_split = (i_out % B).to(tl.int64), i_out // B
    o_q = i_q * BQ + tl.arange(0, BQ)
    o_d, o_v = tl.arange(0, BD), tl.arange(0, BV)

    b_qc = load_rows(p_qc + i_b * qc_b + i_n.to(tl.int64) * qc_n, o_q, Q, qc_q, o_d, qc_d, D)
    p_kc += i_b * kc_b + i_n.to(tl.int64) * kc_n
    p_v += i_b * v_b + i_n.to(tl.int64) * v_n
    if SPATIAL:
        b_qs = load_rows(p_qs + i_b * qs_b + i_n.to(tl.int64) * qs_n, o_q, Q, qs_q, o_d, qs_d, D)
        p_ks += i_b * ks_b + i_n.to(tl.int64) * ks_n
    if MASKED:
        p_mask += i_b * mask_b
    if DROPOUT:
        start, step = row_streams(p_seed, (i_b * N + i_n).to(tl.int32), o_q)

    b_m = tl.full([BQ], LOWEST, tl.float32)
    b_l = tl.zeros([BQ], tl.float32)
    b_acc = tl.zeros([BQ, BV], tl.float32)
    extent = _extent(p_mask, S, mask_s, MASKED)
    part = tl.cdiv(tl.cdiv(extent, BS), splits) * BS
    first = i_split * part
    bias = mask_bias(p_mask, first + tl.arange(0, BS), S, mask_s, MASKED)
    # From 0: triton 3.9 does not pipeline a loop whose start comes from memory, as extent does.
    for i_s in range(0, tl.minimum(part, extent - first), BS):
        o_s = first + i_s + tl.arange(0, BS)
        # A tile ahead: bytes of a mask are too narrow for the asynchronous copies of the pipeline.
        next_bias = mask_bias(p_mask, o_s + BS, S, mask_s, MASKED)
        b_kc = load_rows(p_kc, o_s, S, kc_s, o_d, kc_d, D)
        b_s = dot(b_qc, tl.trans(b_kc), PRECISION)  # [BQ, BS]
        if SPATIAL:
            b_ks = load_rows(p_ks, o_s, S, ks_s, o_d, ks_d, D)
            b_s = dot(b_qs, tl.trans(b_ks), PRECISION, b_s)
        b_s = b_s * scale + bias[None, :]
        b_m_next = tl.maximum(b_m, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_m_next[:, None])
        shrink = tl.exp2(b_m - b_m_next)
        b_l = b_l * shrink + tl.sum(b_p, 1)
        if DROPOUT:
            b_p = tl.where(keep(start[:, None], step[:, None], o_s[None, :], threshold), b_p, 0.0)
        b_v = load_rows(p_v, o_s, S, v_s, o_v, v_d, DV)
        b_acc = dot(rounded(b_p, b_v.dtype, PRECISION), b_v, PRECISION, b_acc * shrink[:, None])
        b_m = b_m_next
        bias = next_bias

    store_output(
        p_out, p_lse, b_acc, b_l, b_m, i_out, i_n, N, o_q, Q, o_v, inverse_keep, DV, PRECISION
    )


@triton.jit(do_not_specialize=_SIZES)
def backward_queries_kernel(
    p_qc, p_qs, p_kc, p_ks, p_v, p_mask, p_seed,  # as in forward
    p_out,  # [B, Q, N, DV], contiguous
    p_lse,  # [B, N, Q], contiguous
    p_do,  # [B, Q, N, DV]
    p_delta,  # [B, N, Q], contiguous; written for the other kernel, as is
    p_streams,  # [B, N, Q, 2], contiguous: start and step of each row's dropout
    p_dqc,  # [B, Q, N, D], contiguous
    p_dqs,  # [B, Q, N, D], contiguous
    qc_b, qc_q, qc_n, qc_d,
    qs_b, qs_q, qs_n, qs_d,
    kc_b, kc_s, kc_n, kc_d,
    ks_b, ks_s, ks_n, ks_d,
    v_b, v_s, v_n, v_d,
    mask_b, mask_s,
    do_b, do_q, do_n, do_d,
    N, Q, S,
    scale, scale_log2, threshold, inverse_keep,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BQ: tl.constexpr, BS: tl.constexpr,
    SPATIAL: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute one tile of queries against all keys: dq_content, dq_spatial, and delta."""
    i_q, i_n, i_b = program(Q, BQ, N)
    i_b, i_n = i_b.to(tl.int64), i_n.to(tl.int64)
    o_q = i_q * BQ + tl.arange(0, BQ)
    o_d, o_v = tl.arange(0, BD), tl.arange(0, BV)

    b_qc = load_rows(p_qc + i_b * qc_b + i_n * qc_n, o_q, Q, qc_q, o_d, qc_d, D)
    p_do += i_b * do_b + i_n * do_n
    b_do, b_delta, b_lse = row_gradients(
        p_out, p_lse, p_do, p_delta, i_b, i_n, N, o_q, Q, o_v, do_q, do_d, DV
    )
    p_kc += i_b * kc_b + i_n * kc_n
    p_v += i_b * v_b + i_n * v_n
    if SPATIAL:
        b_qs = load_rows(p_qs + i_b * qs_b + i_n * qs_n, o_q, Q, qs_q, o_d, qs_d, D)
        p_ks += i_b * ks_b + i_n * ks_n
        b_dqs = tl.zeros([BQ, BD], tl.float32)
    if MASKED:
        p_mask += i_b * mask_b
    if DROPOUT:
        start, step = stored_streams(p_seed, p_streams, i_b * N + i_n, o_q, Q)

    b_dqc = tl.zeros([BQ, BD], tl.float32)
    bias = mask_bias(p_mask, tl.arange(0, BS), S, mask_s, MASKED)
    for i_s in range(0, _extent(p_mask, S, mask_s, MASKED), BS):
        o_s = i_s + tl.arange(0, BS)
        next_bias = mask_bias(p_mask, o_s + BS, S, mask_s, MASKED)
        b_kc = load_rows(p_kc, o_s, S, kc_s, o_d, kc_d, D)
        b_s = dot(b_qc, tl.trans(b_kc), PRECISION)  # [BQ, BS]
        if SPATIAL:
            b_ks = load_rows(p_ks, o_s, S, ks_s, o_d, ks_d, D)
            b_s = dot(b_qs, tl.trans(b_ks), PRECISION, b_s)
        b_p = tl.exp2(b_s * scale_log2 + bias[None, :] - b_lse[:, None])
        b_v = load_rows(p_v, o_s, S, v_s, o_v, v_d, DV)
        b_dp = dot(b_do, tl.trans(b_v), PRECISION)
        if DROPOUT:
            kept = keep(start[:, None], step[:, None], o_s[None, :], threshold)
            b_dp = tl.where(kept, b_dp * inverse_keep, 0.0)
        b_ds = rounded(b_p * (b_dp - b_delta[:, None]), b_kc.dtype, PRECISION)
        b_dqc = dot(b_ds, b_kc, PRECISION, b_dqc)
        if SPATIAL:
            b_dqs = dot(b_ds, b_ks, PRECISION, b_dqs)
        bias = next_bias

    offset = i_b * Q * N * D + i_n * D
    store_rows(p_dqc + offset, b_dqc * scale, o_q, Q, N * D, o_d, D, PRECISION)
    if SPATIAL:
        store_rows(p_dqs + offset, b_dqs * scale, o_q, Q, N * D, o_d, D, PRECISION)


@triton.jit(do_not_specialize=_SIZES)
def backward_keys_kernel(
    p_qc, p_qs, p_kc, p_ks, p_v, p_mask,  # as in forward
    p_lse,  # [B, N, Q], contiguous
    p_do,  # [B, Q, N, DV]
    p_delta,  # [B, N, Q], contiguous
    p_streams,  # [B, N, Q, 2], contiguous
    p_dkc,  # [B, S, N, D], contiguous
    p_dks,  # [B, S, N, D], contiguous
    p_dv,  # [B, S, N, DV], contiguous
    qc_b, qc_q, qc_n, qc_d,
    qs_b, qs_q, qs_n, qs_d,
    kc_b, kc_s, kc_n, kc_d,
    ks_b, ks_s, ks_n, ks_d,
    v_b, v_s, v_n, v_d,
    mask_b, mask_s,
    do_b, do_q, do_n, do_d,
    N, Q, S,
    scale, scale_log2, threshold, inverse_keep,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BQ: tl.constexpr, BS: tl.constexpr,
    SPATIAL: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute one tile of keys against all queries: dk_content, dk_spatial, dvalue."""
    i_s, i_n, i_b = program(S, BS, N)
    i_b, i_n = i_b.to(tl.int64), i_n.to(tl.int64)
    o_s = i_s * BS + tl.arange(0, BS)
    o_d, o_v = tl.arange(0, BD), tl.arange(0, BV)
    o_row = (i_b * N + i_n) * Q

    b_kc = load_rows(p_kc + i_b * kc_b + i_n * kc_n, o_s, S, kc_s, o_d, kc_d, D)
    b_v = load_rows(p_v + i_b * v_b + i_n * v_n, o_s, S, v_s, o_v, v_d, DV)
    p_qc += i_b * qc_b + i_n * qc_n
    p_do += i_b * do_b + i_n * do_n
    if SPATIAL:
        b_ks = load_rows(p_ks + i_b * ks_b + i_n * ks_n, o_s, S, ks_s, o_d, ks_d, D)
        p_qs += i_b * qs_b + i_n * qs_n
    else:
        b_ks = b_kc  # not used
    if MASKED:
        p_mask += i_b * mask_b

    bias = mask_bias(p_mask, o_s, S, mask_s, MASKED)
    b_dkc, b_dks, b_dv = key_gradients(
        b_kc, b_ks, b_ks, b_v, bias, o_s, p_qc, p_qs, p_do, o_row, p_lse, p_delta, p_streams,
        qc_q, qc_d, qs_q, qs_d, do_q, do_d, Q, scale_log2, threshold, inverse_keep,
        D, DV, BD, BV, BQ, SPATIAL, False, SPATIAL, DROPOUT, PRECISION,
    )  # fmt: skip

    offset = i_b * S * N * D + i_n * D
    store_rows(p_dkc + offset, b_dkc * scale, o_s, S, N * D, o_d, D, PRECISION)
    if SPATIAL:
        store_rows(p_dks + offset, b_dks * scale, o_s, S, N * D, o_d, D, PRECISION)
    store_rows(p_dv + i_b * S * N * DV + i_n * DV, b_dv, o_s, S, N * DV, o_v, DV, PRECISION)


@triton.jit(do_not_specialize=_SIZES)
def attention_map_kernel(
    p_qc, p_qs, p_kc, p_ks, p_mask, p_seed,  # as in forward
    p_lse,  # [B, N, Q], contiguous
    p_map,  # [B, N, Q, S], contiguous
    qc_b, qc_q, qc_n, qc_d,
    qs_b, qs_q, qs_n, qs_d,
    kc_b, kc_s, kc_n, kc_d,
    ks_b, ks_s, ks_n, ks_d,
    mask_b, mask_s,
    N, Q, S,
    scale_log2, threshold, inverse_keep,
    D: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr, BS: tl.constexpr,
    SPATIAL: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute one tile of queries against one tile of keys: P, after dropout."""
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
    if SPATIAL:
        b_qs = load_rows(p_qs + i_b * qs_b + i_n * qs_n, o_q, Q, qs_q, o_d, qs_d, D)
        b_ks = load_rows(p_ks + i_b * ks_b + i_n * ks_n, o_s, S, ks_s, o_d, ks_d, D)
        b_s = dot(b_qs, tl.trans(b_ks), PRECISION, b_s)
    bias = mask_bias(p_mask, o_s, S, mask_s, MASKED)
    store_map(
        p_map, p_lse, p_seed, b_s * scale_log2 + bias[None, :], i_b * N + i_n, o_q, Q, o_s, S,
        threshold, inverse_keep, DROPOUT, PRECISION,
    )  # fmt: skip
