"""The losses of all decoder layers and images, and their gradients, in one pass over the logits.

    y       = -logit where query and class are a matched pair, logit elsewhere
    focal   = w p^gamma softplus(y)                     w = alpha for pairs, 1 - alpha elsewhere
    dfocal  = w p^gamma (gamma n softplus(y) + p)       by y; p = sigmoid(y), n = sigmoid(-y)
    L1, 1 - GIoU of the matched pairs of boxes, and their gradients (`boxes.py`)
    cardinality = mean over the images of |queries with a logit above 0 - targets|

A program owns BQ queries of one layer and image. It finds their targets by comparing their numbers
with the matches, so there is no scatter, and no list of pairs whose length the host must know. It
writes the gradients and four partial sums; a second kernel adds those in a fixed order. Nothing is
added atomically: every run gives the same bits.

Backward multiplies the gradients by those of the sums. They are kept in fp32 whatever the logits
are: in fp16 the gradient of a confident prediction (below 6e-8) would be lost before it is scaled.

Names: L layers, B batch, Q queries, K classes, T targets. Source: Lin et al., "Focal Loss for Dense
Object Detection"; the authors' SetCriterion in models/conditional_detr.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cdetr_kernels.gpu import launching
from cdetr_kernels.gpu.arithmetic import log1p, power, rounded
from cdetr_kernels.gpu.boxes import (
    generalized_iou,
    generalized_iou_gradient,
    l1_distance,
    load_boxes,
    sign,
)
from cdetr_kernels.gpu.launching import Launch, strides
from cdetr_kernels.gpu.registration import refuse_second_derivative, register
from cdetr_kernels.gpu.tiles import Tile

QUERIES = 16
_CLASSES = 32  # 91 classes are 3 tiles with 5 idle lanes
_TARGETS = 32
_SUMMED = Tile(16, 32, 4, 1, registers=96, shared=2)
_SCALED = Tile(1024, 1, 4, 1, registers=48, shared=5)


@triton.jit
def _targets_of(p_matches, matches_t, o_q, T, BQ: tl.constexpr, BT: tl.constexpr):
    """Return the target of each query, -1 if it has none."""
    b_target = tl.full([BQ], -1, tl.int32)
    for first in range(0, T, BT):
        o_t = first + tl.arange(0, BT)
        b_query = tl.load(p_matches + o_t.to(tl.int64) * matches_t, o_t < T, other=-1)
        b_equal = o_q[:, None] == b_query.to(tl.int32)[None, :]  # [BQ, BT]
        b_target = tl.maximum(b_target, tl.max(tl.where(b_equal, o_t[None, :], -1), 1))
    return b_target


# Outer strides too: what they are divisible by would make a variant for each size of a batch.
@triton.jit(
    do_not_specialize=[
        *("B", "Q", "K", "T", "rows", "labels_b", "targets_b", "targets_t"),
        *("matches_l", "matches_b"),
        *(f"{name}_{axis}" for name in ("logits", "boxes") for axis in "lbq"),
    ]
)
def forward_kernel(
    p_logits,  # [L, B, Q, K]
    p_boxes,  # [L, B, Q, 4]
    p_labels,  # [B, T]
    p_targets,  # [B, T, 4]
    p_matches,  # [L, B, T]
    p_dlogits,  # [L, B, Q, K], contiguous
    p_dboxes,  # [2, L, B, Q, 4], contiguous: of L1, of GIoU
    p_partial,  # [L*B, blocks, 4], contiguous: focal, L1, GIoU, queries that see an object
    logits_l, logits_b, logits_q, logits_k,
    boxes_l, boxes_b, boxes_q, boxes_c,
    labels_b, labels_t,
    targets_b, targets_t, targets_c,
    matches_l, matches_b, matches_t,
    B, Q, K, T, rows,
    alpha, gamma,
    BQ: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr,
    SQUARE: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Compute partial sums and gradients of BQ queries of one layer and image."""
    blocks = tl.cdiv(Q, BQ)
    o_q = (tl.program_id(0) % blocks) * BQ + tl.arange(0, BQ)
    i_lb = (tl.program_id(0) // blocks).to(tl.int64)
    i_l, i_b = i_lb // B, i_lb % B
    m_q = o_q < Q
    o_row = i_lb * Q + o_q  # among the rows of all layers and images
    p_matches += i_l * matches_l + i_b * matches_b
    b_target = _targets_of(p_matches, matches_t, o_q, T, BQ, BT).to(tl.int64)
    m_pair = m_q & (b_target >= 0)
    b_label = tl.load(p_labels + i_b * labels_b + b_target * labels_t, m_pair, other=-1)

    p_rows = p_logits + i_l * logits_l + i_b * logits_b + o_q.to(tl.int64) * logits_q
    b_loss = tl.zeros([BQ, BK], tl.float32)
    b_top = tl.full([BQ], -float("inf"), tl.float32)
    for first in range(0, K, BK):
        o_k = first + tl.arange(0, BK)
        m_x = m_q[:, None] & (o_k < K)[None, :]
        p_x = p_rows[:, None] + o_k.to(tl.int64)[None, :] * logits_k
        # Where there is no logit it is -inf: no loss.
        b_x = tl.load(p_x, m_x, other=-float("inf")).to(tl.float32)  # [BQ, BK]
        b_top = tl.maximum(b_top, tl.max(b_x, 1))
        m_own = b_label[:, None] == o_k[None, :]
        b_y = tl.where(m_own, -b_x, b_x)
        b_small = tl.exp(-tl.abs(b_y))
        b_high = 1.0 / (1.0 + b_small)
        b_p = tl.where(b_y >= 0.0, b_high, b_small * b_high)
        b_n = tl.where(b_y >= 0.0, b_small * b_high, b_high)
        b_softplus = tl.maximum(b_y, 0.0) + log1p(b_small)
        b_weight = tl.where(m_own, alpha, 1.0 - alpha) * power(b_p, gamma, SQUARE)
        b_loss += b_weight * b_softplus
        if GRADIENT:
            b_gradient = b_weight * (gamma * b_n * b_softplus + b_p)
            b_gradient = tl.where(m_own, -b_gradient, b_gradient)
            tl.store(p_dlogits + o_row[:, None] * K + o_k[None, :], b_gradient, m_x)

    p_own = p_boxes + i_l * boxes_l + i_b * boxes_b + o_q.to(tl.int64) * boxes_q
    x, y, w, h = load_boxes(p_own, boxes_c, m_pair)
    tx, ty, tw, th = load_boxes(
        p_targets + i_b * targets_b + b_target * targets_t, targets_c, m_pair
    )
    b_l1 = l1_distance(x, y, w, h, tx, ty, tw, th)
    b_giou = 1.0 - generalized_iou(x, y, w, h, tx, ty, tw, th)
    if GRADIENT:
        dx, dy, dw, dh = generalized_iou_gradient(x, y, w, h, tx, ty, tw, th)
        p_l1 = p_dboxes + o_row * 4
        tl.store(p_l1, tl.where(m_pair, sign(x - tx), 0.0), m_q)
        tl.store(p_l1 + 1, tl.where(m_pair, sign(y - ty), 0.0), m_q)
        tl.store(p_l1 + 2, tl.where(m_pair, sign(w - tw), 0.0), m_q)
        tl.store(p_l1 + 3, tl.where(m_pair, sign(h - th), 0.0), m_q)
        p_giou = p_l1 + rows.to(tl.int64) * 4
        tl.store(p_giou, tl.where(m_pair, -dx, 0.0), m_q)
        tl.store(p_giou + 1, tl.where(m_pair, -dy, 0.0), m_q)
        tl.store(p_giou + 2, tl.where(m_pair, -dw, 0.0), m_q)
        tl.store(p_giou + 3, tl.where(m_pair, -dh, 0.0), m_q)

    p_partial += tl.program_id(0).to(tl.int64) * 4
    tl.store(p_partial, tl.sum(tl.sum(b_loss, 1), 0))
    tl.store(p_partial + 1, tl.sum(tl.where(m_pair, b_l1, 0.0), 0))
    tl.store(p_partial + 2, tl.sum(tl.where(m_pair, b_giou, 0.0), 0))
    tl.store(p_partial + 3, tl.sum(tl.where(m_q & (b_top > 0.0), 1.0, 0.0), 0))


@triton.jit(do_not_specialize=["B", "L", "blocks"])
def sum_kernel(
    p_partial,  # [L*B, blocks, 4], contiguous
    p_counts,  # [B]
    p_num_boxes,  # []
    p_losses,  # [4, L], contiguous
    counts_b,
    L, B, blocks,
    BB: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Add the partial sums of one layer, image by image."""
    i_l = tl.program_id(0)
    b_focal = tl.zeros([BB, BP], tl.float32)
    b_l1 = tl.zeros([BB, BP], tl.float32)
    b_giou = tl.zeros([BB, BP], tl.float32)
    b_cardinality = tl.zeros([BB], tl.float32)
    for first_image in range(0, B, BB):
        o_b = first_image + tl.arange(0, BB)
        b_seen = tl.zeros([BB], tl.float32)
        for first in range(0, blocks, BP):
            o_p = first + tl.arange(0, BP)
            m_p = (o_b < B)[:, None] & (o_p < blocks)[None, :]
            o_row = (i_l * B + o_b).to(tl.int64)[:, None] * blocks + o_p[None, :]
            p_row = p_partial + o_row * 4  # [BB, BP]
            b_focal += tl.load(p_row, m_p, other=0.0)
            b_l1 += tl.load(p_row + 1, m_p, other=0.0)
            b_giou += tl.load(p_row + 2, m_p, other=0.0)
            b_seen += tl.sum(tl.load(p_row + 3, m_p, other=0.0), 1)
        b_count = tl.load(p_counts + o_b.to(tl.int64) * counts_b, o_b < B, other=0)
        b_cardinality += tl.abs(b_seen - b_count.to(tl.float32))
    num_boxes = tl.load(p_num_boxes)
    tl.store(p_losses + i_l, tl.sum(tl.sum(b_focal, 1), 0) / num_boxes)
    tl.store(p_losses + L + i_l, tl.sum(tl.sum(b_l1, 1), 0) / num_boxes)
    tl.store(p_losses + 2 * L + i_l, tl.sum(tl.sum(b_giou, 1), 0) / num_boxes)
    tl.store(p_losses + 3 * L + i_l, tl.sum(b_cardinality, 0) / B)


@triton.jit(do_not_specialize=["L", "blocks"])
def backward_kernel(
    p_do,  # [4, L]
    p_saved_logits,  # [L, n_logits], contiguous
    p_saved_boxes,  # [2, L, n_boxes], contiguous
    p_num_boxes,  # []
    p_dlogits,  # [L, n_logits], contiguous
    p_dboxes,  # [L, n_boxes], contiguous
    do_i, do_l,
    L, n_logits, n_boxes, blocks,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scale the gradients of BLOCK logits, and of BLOCK coordinates, of one layer."""
    i_l = (tl.program_id(0) // blocks).to(tl.int64)
    o_n = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    num_boxes = tl.load(p_num_boxes)
    p_do += i_l * do_l
    m_logits = o_n < n_logits
    b_saved = tl.load(p_saved_logits + i_l * n_logits + o_n, m_logits, other=0.0)
    b_scaled = b_saved * (tl.load(p_do).to(tl.float32) / num_boxes)
    b_dlogits = rounded(b_scaled, p_dlogits.dtype.element_ty, PRECISION)
    tl.store(p_dlogits + i_l * n_logits + o_n, b_dlogits, m_logits)
    if (tl.program_id(0) % blocks) * BLOCK < n_boxes:
        m_boxes = o_n < n_boxes
        p_saved = p_saved_boxes + i_l * n_boxes + o_n
        b_l1 = tl.load(p_saved, m_boxes, other=0.0)
        b_giou = tl.load(p_saved + L.to(tl.int64) * n_boxes, m_boxes, other=0.0)
        b_sum = b_l1 * (tl.load(p_do + do_i).to(tl.float32) / num_boxes)
        b_sum += b_giou * (tl.load(p_do + 2 * do_i).to(tl.float32) / num_boxes)
        b_dboxes = rounded(b_sum, p_dboxes.dtype.element_ty, PRECISION)
        tl.store(p_dboxes + i_l * n_boxes + o_n, b_dboxes, m_boxes)


def forward_launch(
    logits: Tensor,
    boxes_cxcywh: Tensor,
    target_labels: Tensor,
    target_boxes_cxcywh: Tensor,
    matches: Tensor,
    alpha: float,
    gamma: float,
    dlogits: Tensor,
    dboxes: Tensor,
    partial: Tensor,
) -> Launch:
    """Compute partial sums, and gradients unless there is no memory for them."""
    layers, batch, queries, classes = logits.shape
    width = min(_CLASSES, triton.next_power_of_2(max(classes, 1)))
    warps = max(1, QUERIES * width // 128)
    tile = Tile(QUERIES, width, warps, 1, registers=96, shared=2)
    arguments = {
        "p_logits": logits,
        "p_boxes": boxes_cxcywh,
        "p_labels": target_labels,
        "p_targets": target_boxes_cxcywh,
        "p_matches": matches,
        "p_dlogits": dlogits,
        "p_dboxes": dboxes,
        "p_partial": partial,
        **strides("logits", "lbqk", logits),
        **strides("boxes", "lbqc", boxes_cxcywh),
        **strides("labels", "bt", target_labels),
        **strides("targets", "btc", target_boxes_cxcywh),
        **strides("matches", "lbt", matches),
        "B": batch,
        "Q": queries,
        "K": classes,
        "T": target_labels.shape[1],
        "rows": layers * batch * queries,
        "alpha": float(alpha),
        "gamma": float(gamma),
        "BQ": tile.queries,
        "BK": tile.keys,
        "BT": _TARGETS,
        "SQUARE": gamma == 2,
        "GRADIENT": dboxes.ndim > 1,
    }
    programs = layers * batch * triton.cdiv(queries, tile.queries)
    return Launch(forward_kernel, programs, arguments, tile)


def sum_launch(partial: Tensor, target_counts: Tensor, num_boxes: Tensor, losses: Tensor) -> Launch:
    """Compute the sums of each layer into `losses`."""
    arguments = {
        "p_partial": partial,
        "p_counts": target_counts,
        "p_num_boxes": num_boxes,
        "p_losses": losses,
        **strides("counts", "b", target_counts),
        "L": losses.shape[1],
        "B": len(target_counts),
        "blocks": partial.shape[1],
        "BB": _SUMMED.queries,
        "BP": _SUMMED.keys,
    }
    return Launch(sum_kernel, losses.shape[1], arguments, _SUMMED)


def forward_launches(
    logits: Tensor,
    boxes_cxcywh: Tensor,
    target_labels: Tensor,
    target_boxes_cxcywh: Tensor,
    target_counts: Tensor,
    matches: Tensor,
    num_boxes: Tensor,
    alpha: float,
    gamma: float,
    losses: Tensor,
    dlogits: Tensor,
    dboxes: Tensor,
) -> tuple[Launch, Launch]:
    """Compute the losses, by way of partial sums, and the gradients."""
    layers, batch, queries, _ = logits.shape
    partial = losses.new_empty(layers * batch, triton.cdiv(queries, QUERIES), 4)
    forward = forward_launch(
        logits, boxes_cxcywh, target_labels, target_boxes_cxcywh, matches, alpha, gamma,
        dlogits, dboxes, partial,
    )  # fmt: skip
    return forward, sum_launch(partial, target_counts, num_boxes, losses)


def backward_launch(
    grad_losses: Tensor,
    saved_logits: Tensor,
    saved_boxes: Tensor,
    num_boxes: Tensor,
    dlogits: Tensor,
    dboxes: Tensor,
) -> Launch:
    """Write the scaled gradients into `dlogits` and `dboxes`."""
    layers = len(dlogits)
    n_logits, n_boxes = dlogits[:1].numel(), dboxes[:1].numel()
    blocks = triton.cdiv(max(n_logits, n_boxes), _SCALED.queries)
    arguments = {
        "p_do": grad_losses,
        "p_saved_logits": saved_logits,
        "p_saved_boxes": saved_boxes,
        "p_num_boxes": num_boxes,
        "p_dlogits": dlogits,
        "p_dboxes": dboxes,
        **strides("do", "il", grad_losses),
        "L": layers,
        "n_logits": n_logits,
        "n_boxes": n_boxes,
        "blocks": blocks,
        "BLOCK": _SCALED.queries,
        "PRECISION": launching.dot_precision(torch.bfloat16),
    }
    return Launch(backward_kernel, layers * blocks, arguments, _SCALED)


def _forward(
    logits, boxes_cxcywh, target_labels, target_boxes_cxcywh, target_counts, matches, num_boxes,
    alpha, gamma, with_gradient,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    losses, dlogits, dboxes = _outputs(
        logits, boxes_cxcywh, target_labels, target_boxes_cxcywh, target_counts, matches,
        num_boxes, alpha, gamma, with_gradient,
    )  # fmt: skip
    launching.run(
        forward_launches, logits, boxes_cxcywh, target_labels, target_boxes_cxcywh, target_counts,
        matches, num_boxes, alpha, gamma, losses, dlogits, dboxes,
    )  # fmt: skip
    return losses, dlogits, dboxes


def _outputs(logits, boxes_cxcywh, *rest) -> tuple[Tensor, Tensor, Tensor]:
    def empty(*shape):
        return logits.new_empty(shape, dtype=torch.float32)

    losses = empty(4, len(logits))
    if not rest[-1]:
        return losses, empty(0), empty(0)
    return losses, empty(*logits.shape), empty(2, *boxes_cxcywh.shape)


def _backward(
    grad_losses, saved_logits, saved_boxes, num_boxes, logits_dtype, boxes_dtype
) -> tuple[Tensor, Tensor]:
    dlogits, dboxes = gradients = _backward_outputs(
        grad_losses, saved_logits, saved_boxes, num_boxes, logits_dtype, boxes_dtype
    )
    launching.run(
        backward_launch, grad_losses, saved_logits, saved_boxes, num_boxes, dlogits, dboxes
    )
    return gradients


def _backward_outputs(
    grad_losses, saved_logits, saved_boxes, num_boxes, logits_dtype, boxes_dtype
) -> tuple[Tensor, Tensor]:
    dlogits = saved_logits.new_empty(saved_logits.shape, dtype=logits_dtype)
    return dlogits, saved_boxes.new_empty(saved_boxes.shape[1:], dtype=boxes_dtype)


def _save_for_backward(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    ctx.save_for_backward(*output[1:], inputs[6])


def _gradients(ctx, grad_losses, *_):
    if grad_losses is None:
        return (None,) * 10
    gradients = _set_loss_backward(grad_losses, *ctx.saved_tensors, *ctx.dtypes)
    return (*gradients, *(None,) * 8)


# Losses [4, L] (focal, L1, GIoU, cardinality), and what backward scales.
_set_loss = register(
    "set_loss(Tensor logits, Tensor boxes_cxcywh, Tensor target_labels, "
    "Tensor target_boxes_cxcywh, Tensor target_counts, Tensor matches, Tensor num_boxes, "
    "float alpha, float gamma, bool with_gradient) -> (Tensor, Tensor, Tensor)",
    _forward,
    _outputs,
    _gradients,
    _save_for_backward,
)
_set_loss_backward = register(
    "set_loss_backward(Tensor grad_losses, Tensor saved_logits, Tensor saved_boxes, "
    "Tensor num_boxes, ScalarType logits_dtype, ScalarType boxes_dtype) -> (Tensor, Tensor)",
    _backward,
    _backward_outputs,
    refuse_second_derivative("set_loss_backward"),
)


def set_loss(
    logits: Tensor,
    boxes_cxcywh: Tensor,
    target_labels: Tensor,
    target_boxes_cxcywh: Tensor,
    target_counts: Tensor,
    matches: Tensor,
    num_boxes: Tensor | float,
    alpha: float,
    gamma: float,
) -> dict[str, Tensor]:
    """Run the path "triton" of `cdetr_kernels.set_loss`; see there for shapes."""
    if isinstance(num_boxes, Tensor):
        # From the host's memory the copy does not wait for the device.
        num_boxes = num_boxes.detach().to(
            logits.device, torch.float32, non_blocking=num_boxes.is_cpu
        )
    else:
        num_boxes = torch.full((), num_boxes, dtype=torch.float32, device=logits.device)
    differentiable = logits.requires_grad or boxes_cxcywh.requires_grad
    losses, _, _ = _set_loss(
        logits, boxes_cxcywh, target_labels, target_boxes_cxcywh, target_counts, matches,
        num_boxes, alpha, gamma, differentiable and torch.is_grad_enabled(),
    )  # fmt: skip
    focal, l1, giou, cardinality = losses.unbind(0)
    return {
        "loss_ce": focal,
        "loss_bbox": l1,
        "loss_giou": giou,
        "cardinality_error": cardinality.detach(),
    }
