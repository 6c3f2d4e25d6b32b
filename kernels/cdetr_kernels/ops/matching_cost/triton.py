"""The matching cost of all decoder layers and images in one launch.

    cost[q, t] = class_weight * class_cost + bbox_weight * L1(cxcywh) - giou_weight * GIoU
    focal:   class_cost = alpha n^gamma -log(p + 1e-8) - (1 - alpha) p^gamma -log(n + 1e-8)
             with p = sigmoid(logits[q, label[t]]) and n = sigmoid(-logits[q, label[t]])
    softmax: class_cost = -softmax(logits[q])[label[t]]

A program owns BQ queries of one layer and image, and BT of that image's own targets. Of the logits
it reads the targets' classes only (softmax: all, once for its maximum and sum). The result is
stored as `[L*B, T, Q]`: a warp writes neighbouring queries, and a solver that gives each target a
query walks along such rows.

There is no derivative: an assignment has none, and the losses of the pairs are computed elsewhere.
Names: L layers, B batch, Q queries, K classes, T targets. Source: the authors' models/matcher.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cdetr_kernels.gpu import launching
from cdetr_kernels.gpu.arithmetic import power
from cdetr_kernels.gpu.boxes import generalized_iou, l1_distance, load_boxes
from cdetr_kernels.gpu.launching import Launch, strides
from cdetr_kernels.gpu.registration import register
from cdetr_kernels.gpu.tiles import Tile

QUERIES = 64
_TARGETS = 16
_CLASSES = 32


@triton.jit
def _softmax_statistics(p_rows, logits_k, m_q, K, BQ: tl.constexpr, BK: tl.constexpr):
    """Return the maximum of each row of logits, and the sum of exp(logit - maximum)."""
    b_max = tl.full([BQ], -3.0e38, tl.float32)  # finite, so that -inf less it is no NaN
    b_sum = tl.zeros([BQ], tl.float32)
    for first in range(0, K, BK):
        o_k = first + tl.arange(0, BK)
        p_x = p_rows[:, None] + o_k.to(tl.int64)[None, :] * logits_k
        m_x = m_q[:, None] & (o_k < K)[None, :]
        b_x = tl.load(p_x, m_x, other=-float("inf")).to(tl.float32)  # [BQ, BK]
        b_new = tl.maximum(b_max, tl.max(b_x, 1))
        b_sum = b_sum * tl.exp(b_max - b_new) + tl.sum(tl.exp(b_x - b_new[:, None]), 1)
        b_max = b_new
    return b_max, b_sum


# Outer strides too: what they are divisible by would make a variant for each size of a batch.
@triton.jit(
    do_not_specialize=[
        *("B", "Q", "K", "T", "labels_b", "targets_b", "targets_t"),
        *(f"{name}_{axis}" for name in ("logits", "boxes") for axis in "lbq"),
    ]
)
def cost_kernel(
    p_logits,  # [L, B, Q, K]
    p_boxes,  # [L, B, Q, 4]
    p_labels,  # [B, T]
    p_targets,  # [B, T, 4]
    p_counts,  # [B]
    p_out,  # [L*B, T, Q], contiguous
    logits_l, logits_b, logits_q, logits_k,
    boxes_l, boxes_b, boxes_q, boxes_c,
    labels_b, labels_t,
    targets_b, targets_t, targets_c,
    counts_b,
    B, Q, K, T,
    class_weight, bbox_weight, giou_weight, alpha, gamma,
    BQ: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    SOFTMAX: tl.constexpr, SQUARE: tl.constexpr,
):  # fmt: skip
    """Compute the cost of BQ queries for BT targets of one layer and image."""
    blocks_t, blocks_q = tl.cdiv(T, BT), tl.cdiv(Q, BQ)
    i_t = tl.program_id(0) % blocks_t
    i_q = tl.program_id(0) // blocks_t % blocks_q
    i_lb = (tl.program_id(0) // (blocks_t * blocks_q)).to(tl.int64)
    i_l, i_b = i_lb // B, i_lb % B
    o_q = i_q * BQ + tl.arange(0, BQ)
    o_t = i_t * BT + tl.arange(0, BT)
    m_q = o_q < Q
    m_t = o_t < tl.minimum(tl.load(p_counts + i_b * counts_b), T)
    p_out += i_lb * T * Q
    p_tile = p_out + o_t.to(tl.int64)[:, None] * Q + o_q[None, :]
    m_tile = (o_t < T)[:, None] & m_q[None, :]

    p_rows = p_logits + i_l * logits_l + i_b * logits_b + o_q.to(tl.int64) * logits_q
    b_label = tl.load(p_labels + i_b * labels_b + o_t * labels_t, m_t, other=-1)
    # A label out of range is not read. It costs NaN, as what is not there cannot be compared.
    m_label = (b_label >= 0) & (b_label < K)
    b_x = tl.load(
        p_rows[None, :] + b_label[:, None] * logits_k,
        m_label[:, None] & m_q[None, :],
        other=float("nan"),
    ).to(tl.float32)  # [BT, BQ]
    if SOFTMAX:
        b_max, b_sum = _softmax_statistics(p_rows, logits_k, m_q, K, BQ, BK)
        b_cost = -tl.exp(b_x - b_max[None, :]) / b_sum[None, :]
    else:
        b_p = 1.0 / (1.0 + tl.exp(-b_x))
        b_n = 1.0 / (1.0 + tl.exp(b_x))
        b_cost = (1.0 - alpha) * power(b_p, gamma, SQUARE) * tl.log(b_n + 1e-8)
        b_cost -= alpha * power(b_n, gamma, SQUARE) * tl.log(b_p + 1e-8)

    p_boxes += i_l * boxes_l + i_b * boxes_b
    x, y, w, h = load_boxes(p_boxes + o_q.to(tl.int64) * boxes_q, boxes_c, m_q)
    x, y, w, h = x[None, :], y[None, :], w[None, :], h[None, :]
    p_targets += i_b * targets_b
    tx, ty, tw, th = load_boxes(p_targets + o_t.to(tl.int64) * targets_t, targets_c, m_t)
    tx, ty, tw, th = tx[:, None], ty[:, None], tw[:, None], th[:, None]
    b_cost = class_weight * b_cost + bbox_weight * l1_distance(x, y, w, h, tx, ty, tw, th)
    b_cost -= giou_weight * generalized_iou(x, y, w, h, tx, ty, tw, th)
    tl.store(p_tile, tl.where(m_t[:, None], b_cost, 0.0), m_tile)


def cost_launch(
    logits: Tensor,
    boxes_cxcywh: Tensor,
    target_labels: Tensor,
    target_boxes_cxcywh: Tensor,
    target_counts: Tensor,
    weights: tuple[float, float, float],
    softmax: bool,
    alpha: float,
    gamma: float,
    output: Tensor,
) -> Launch:
    """Compute the cost into `output` `[L*B, T, Q]`."""
    layers, batch, queries, classes = logits.shape
    targets = target_labels.shape[1]
    tile = _tile(targets, softmax)
    arguments = {
        "p_logits": logits,
        "p_boxes": boxes_cxcywh,
        "p_labels": target_labels,
        "p_targets": target_boxes_cxcywh,
        "p_counts": target_counts,
        "p_out": output,
        **strides("logits", "lbqk", logits),
        **strides("boxes", "lbqc", boxes_cxcywh),
        **strides("labels", "bt", target_labels),
        **strides("targets", "btc", target_boxes_cxcywh),
        **strides("counts", "b", target_counts),
        "B": batch,
        "Q": queries,
        "K": classes,
        "T": targets,
        "class_weight": float(weights[0]),
        "bbox_weight": float(weights[1]),
        "giou_weight": float(weights[2]),
        "alpha": float(alpha),
        "gamma": float(gamma),
        "BQ": tile.queries,
        "BT": tile.keys,
        "BK": _CLASSES,
        "SOFTMAX": softmax,
        "SQUARE": gamma == 2,
    }
    blocks = triton.cdiv(queries, tile.queries) * triton.cdiv(targets, tile.keys)
    return Launch(cost_kernel, layers * batch * blocks, arguments, tile)


def _tile(targets: int, softmax: bool) -> Tile:
    """Return a tile: 4 pairs per thread, 2 where there is one target; of softmax, 8 logits."""
    rows = min(_TARGETS, triton.next_power_of_2(max(targets, 1)))
    warps = QUERIES * _CLASSES // 256 if softmax else max(1, QUERIES * rows // 128)
    return Tile(QUERIES, rows, warps, 1, registers=80, shared=2)


def _forward(
    logits, boxes_cxcywh, target_labels, target_boxes_cxcywh, target_counts,
    class_weight, bbox_weight, giou_weight, softmax, alpha, gamma,
) -> Tensor:  # fmt: skip
    output = _output(logits, target_labels)
    launching.run(
        cost_launch, logits, boxes_cxcywh, target_labels, target_boxes_cxcywh, target_counts,
        (class_weight, bbox_weight, giou_weight), softmax, alpha, gamma, output,
    )  # fmt: skip
    return output.mT


def _fake(logits, boxes_cxcywh, target_labels, *_) -> Tensor:
    return _output(logits, target_labels).mT


def _output(logits: Tensor, target_labels: Tensor) -> Tensor:
    layers, batch, queries, _ = logits.shape
    return logits.new_empty(layers * batch, target_labels.shape[1], queries, dtype=torch.float32)


def _refuse_derivative(ctx, *_):
    raise NotImplementedError("matching_cost has no derivative: use backend='torch' for one")


_matching_cost = register(
    "matching_cost(Tensor logits, Tensor boxes_cxcywh, Tensor target_labels, "
    "Tensor target_boxes_cxcywh, Tensor target_counts, float class_weight, float bbox_weight, "
    "float giou_weight, bool softmax, float alpha, float gamma) -> Tensor",
    _forward,
    _fake,
    _refuse_derivative,
)


def matching_cost(
    logits: Tensor,
    boxes_cxcywh: Tensor,
    target_labels: Tensor,
    target_boxes_cxcywh: Tensor,
    target_counts: Tensor,
    class_weight: float,
    bbox_weight: float,
    giou_weight: float,
    classification: str,
    alpha: float,
    gamma: float,
) -> Tensor:
    """Run the path "triton" of `cdetr_kernels.matching_cost`; see there for shapes.

    A label out of range costs NaN.
    """
    return _matching_cost(
        logits, boxes_cxcywh, target_labels, target_boxes_cxcywh, target_counts,
        class_weight, bbox_weight, giou_weight, classification == "softmax", alpha, gamma,
    )  # fmt: skip
