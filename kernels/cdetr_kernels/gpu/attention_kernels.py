"""Device code that both attention operators share: rows, masks, gradients of keys, map, merge.

Names as in `ops.conditional_attention.kernels`.
"""

import triton
import triton.language as tl

from cdetr_kernels.gpu.arithmetic import dot, rounded
from cdetr_kernels.gpu.random import keep, row_streams

# Below every score, and finite: -inf minus -inf would be NaN.
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def load_rows(p, o_rows, rows, stride_row, o_columns, stride_column, COLUMNS: tl.constexpr):
    """Load rows `o_rows` (those below `rows`) of a matrix of COLUMNS columns; zeros around it."""
    # 64-bit offsets: a row may lie more than 2^31 elements after the first one.
    p_rows = p + o_rows.to(tl.int64)[:, None] * stride_row
    m_rows = (o_rows < rows)[:, None]
    if o_columns.shape[0] > COLUMNS:
        m_rows = m_rows & (o_columns < COLUMNS)[None, :]
    return tl.load(p_rows + o_columns.to(tl.int64)[None, :] * stride_column, m_rows, other=0.0)


@triton.jit
def store_rows(
    p, b_x, o_rows, rows, stride_row, o_columns, COLUMNS: tl.constexpr, PRECISION: tl.constexpr
):
    """Write what `load_rows` reads, columns contiguous."""
    p_rows = p + o_rows.to(tl.int64)[:, None] * stride_row
    m_rows = (o_rows < rows)[:, None]
    if o_columns.shape[0] > COLUMNS:
        m_rows = m_rows & (o_columns < COLUMNS)[None, :]
    b_x = rounded(b_x, p.dtype.element_ty, PRECISION)
    tl.store(p_rows + o_columns[None, :], b_x, m_rows)


@triton.jit
def mask_bias(p_mask, o_s, S, stride_s, MASKED: tl.constexpr):
    """Return 0 for keys that are attended to, -inf for others and beyond S."""
    m_s = o_s < S
    if MASKED:
        m_s = tl.load(p_mask + o_s.to(tl.int64) * stride_s, m_s, other=0) != 0
    return tl.where(m_s, 0.0, float("-inf"))  # [BS]


@triton.jit
def program(rows, BLOCK: tl.constexpr, N):
    """Return tile, head and image of this program; neighbours share the head's keys in the L2."""
    tiles = tl.cdiv(rows, BLOCK)
    i = tl.program_id(0)
    return i % tiles, (i // tiles) % N, i // tiles // N


@triton.jit
def store_output(
    p_out, p_lse,
    b_acc, b_l, b_m,  # output before the division, sum and pivot of each row
    i_out,  # part times images plus image
    i_n, N, o_q, Q, o_v, inverse_keep,
    DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write output and log-sum-exp of a tile of queries; of a row without keys, 0 and +inf."""
    empty = b_l == 0.0
    b_l = tl.where(empty, 1.0, b_l)
    b_out = b_acc * (inverse_keep / b_l)[:, None]
    p_out += i_out.to(tl.int64) * Q * N * DV + i_n * DV
    store_rows(p_out, b_out, o_q, Q, N * DV, o_v, DV, PRECISION)
    # +inf: exp2(score - inf) is 0 for any score.
    b_lse = tl.where(empty, float("inf"), b_m + tl.log2(b_l))
    tl.store(p_lse + (i_out.to(tl.int64) * N + i_n) * Q + o_q, b_lse, o_q < Q)


@triton.jit
def row_gradients(
    p_out, p_lse, p_do, p_delta, i_b, i_n, N, o_q, Q, o_v, do_q, do_d, DV: tl.constexpr
):
    """Return output gradient, delta (also written) and log-sum-exp of a tile of queries.

    `p_do` is that of this image and head.
    """
    o_row = (i_b * N + i_n) * Q + o_q
    b_do = load_rows(p_do, o_q, Q, do_q, o_v, do_d, DV)
    b_out = load_rows(p_out + i_b * Q * N * DV + i_n * DV, o_q, Q, N * DV, o_v, 1, DV)
    b_delta = tl.sum(b_out.to(tl.float32) * b_do.to(tl.float32), 1)
    tl.store(p_delta + o_row, b_delta, o_q < Q)
    return b_do, b_delta, tl.load(p_lse + o_row, o_q < Q, other=float("inf"))


@triton.jit
def stored_streams(p_seed, p_streams, i_head, o_q, Q):
    """Start and step of each row's dropout, also written for the kernel of the keys."""
    start, step = row_streams(p_seed, i_head.to(tl.int32), o_q)
    p_stream = p_streams + (i_head * Q + o_q) * 2
    tl.store(p_stream, start.to(tl.int32, bitcast=True), o_q < Q)
    tl.store(p_stream + 1, step.to(tl.int32, bitcast=True), o_q < Q)
    return start, step


@triton.jit
def key_gradients(
    b_kc, b_ks, b_ks2, b_v,  # a tile of keys; b_ks + b_ks2 are the spatial ones if TWO
    bias, o_s,
    p_qc, p_qs, p_do,  # of this image and head
    o_row,  # number of the first row of this image and head
    p_lse, p_delta, p_streams,
    qc_q, qc_d, qs_q, qs_d, do_q, do_d,
    Q, scale_log2, threshold, inverse_keep,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BQ: tl.constexpr,
    SPATIAL: tl.constexpr, TWO: tl.constexpr, DKS: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return dk_content, dk_spatial (if DKS) and dvalue of a tile of keys, before the scale."""
    BS: tl.constexpr = b_kc.shape[0]
    o_d, o_v = tl.arange(0, BD), tl.arange(0, BV)
    b_dkc = tl.zeros([BS, BD], tl.float32)
    b_dv = tl.zeros([BS, BV], tl.float32)
    if DKS:
        b_dks = tl.zeros([BS, BD], tl.float32)
    # A tile of padding has gradients of zero: nothing to visit.
    queries = tl.where(tl.max(bias, 0) == 0.0, Q, 0)
    for i_q in range(0, queries, BQ):
        o_q = i_q + tl.arange(0, BQ)
        b_qc = load_rows(p_qc, o_q, Q, qc_q, o_d, qc_d, D)
        b_s = dot(b_kc, tl.trans(b_qc), PRECISION)  # [BS, BQ]
        if SPATIAL:
            b_qs = load_rows(p_qs, o_q, Q, qs_q, o_d, qs_d, D)
            b_s = dot(b_ks, tl.trans(b_qs), PRECISION, b_s)
            if TWO:
                b_s = dot(b_ks2, tl.trans(b_qs), PRECISION, b_s)
        b_lse = tl.load(p_lse + o_row + o_q, o_q < Q, other=float("inf"))
        b_p = tl.exp2(b_s * scale_log2 + bias[:, None] - b_lse[None, :])
        b_do = load_rows(p_do, o_q, Q, do_q, o_v, do_d, DV)
        b_dp = dot(b_v, tl.trans(b_do), PRECISION)
        b_weight = b_p
        if DROPOUT:
            p_stream = p_streams + (o_row + o_q) * 2
            start = tl.load(p_stream, o_q < Q, other=0).to(tl.uint32, bitcast=True)
            step = tl.load(p_stream + 1, o_q < Q, other=0).to(tl.uint32, bitcast=True)
            kept = keep(start[None, :], step[None, :], o_s[:, None], threshold)
            b_weight = tl.where(kept, b_p * inverse_keep, 0.0)
            b_dp = tl.where(kept, b_dp * inverse_keep, 0.0)
        b_dv = dot(rounded(b_weight, b_do.dtype, PRECISION), b_do, PRECISION, b_dv)
        b_delta = tl.load(p_delta + o_row + o_q, o_q < Q, other=0.0)
        b_ds = rounded(b_p * (b_dp - b_delta[None, :]), b_qc.dtype, PRECISION)
        b_dkc = dot(b_ds, b_qc, PRECISION, b_dkc)
        if DKS:
            b_dks = dot(b_ds, b_qs, PRECISION, b_dks)
    if not DKS:
        b_dks = b_dkc
    return b_dkc, b_dks, b_dv


@triton.jit
def store_map(
    p_map, p_lse, p_seed,
    b_s,  # scores to base 2, with the bias
    i_head,  # image times heads plus head
    o_q, Q, o_s, S, threshold, inverse_keep,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write a tile of the attention map, after dropout, from the scores and the log-sum-exp."""
    b_lse = tl.load(p_lse + i_head * Q + o_q, o_q < Q, other=float("inf"))
    b_p = tl.exp2(b_s - b_lse[:, None])
    if DROPOUT:
        start, step = row_streams(p_seed, i_head.to(tl.int32), o_q)
        kept = keep(start[:, None], step[:, None], o_s[None, :], threshold)
        b_p = tl.where(kept, b_p * inverse_keep, 0.0)
    p_map += i_head * Q * S
    p_tile = p_map + o_q.to(tl.int64)[:, None] * S + o_s[None, :]
    tl.store(
        p_tile,
        rounded(b_p, p_map.dtype.element_ty, PRECISION),
        (o_q < Q)[:, None] & (o_s < S)[None, :],
    )


@triton.jit(do_not_specialize=["rows", "N", "Q", "splits"])
def merge_kernel(
    p_part,  # [splits, B, Q, N, DV]
    p_part_lse,  # [splits, B, N, Q]
    p_out,  # [B, Q, N, DV]
    p_lse,  # [B, N, Q]
    rows,  # B * Q * N
    N, Q, splits,
    DV: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Merge the results of the parts of the keys, weighted by their log-sum-exp."""
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    o_v = tl.arange(0, BV)
    m_r = o_r < rows
    o_lse = (o_r // (Q * N)) * (Q * N) + (o_r % N) * Q + (o_r // N) % Q
    b_m = tl.full([BR], LOWEST, tl.float32)
    b_l = tl.zeros([BR], tl.float32)
    b_acc = tl.zeros([BR, BV], tl.float32)
    for _ in range(splits):
        b_lse = tl.load(p_part_lse + o_lse, m_r, other=float("inf"))
        b_lse = tl.where(b_lse == float("inf"), float("-inf"), b_lse)
        b_m_next = tl.maximum(b_m, b_lse)
        shrink, weight = tl.exp2(b_m - b_m_next), tl.exp2(b_lse - b_m_next)
        b_part = load_rows(p_part, o_r, rows, DV, o_v, 1, DV)
        b_acc = b_acc * shrink[:, None] + b_part * weight[:, None]
        b_l = b_l * shrink + weight
        b_m = b_m_next
        p_part_lse += rows
        p_part += rows.to(tl.int64) * DV
    empty = b_l == 0.0
    b_l = tl.where(empty, 1.0, b_l)
    store_rows(p_out, b_acc / b_l[:, None], o_r, rows, DV, o_v, DV, PRECISION)
    tl.store(p_lse + o_lse, tl.where(empty, float("inf"), b_m + tl.log2(b_l)), m_r)
