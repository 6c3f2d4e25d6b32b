"""`detection_topk` in C++ and CUDA: schema, fake and gradient; the kernels are in csrc/."""

from typing import Any

import torch
from torch import Tensor

from cdetr_kernels import native as _extension  # noqa: F401, loads the kernels

_LIBRARY = torch.library.Library("cdetr_fast", "FRAGMENT")
_LIBRARY.define(
    "detection_topk(Tensor logits, Tensor boxes_cxcywh, Tensor? sizes_hw, int k, float threshold) "
    "-> (Tensor scores, Tensor labels, Tensor boxes_xyxy, Tensor query_index, Tensor counts)"
)
_TOPK = torch.ops.cdetr_fast.detection_topk.default  # looking it up takes 2 us per call
_SIZE_DTYPES = (torch.float32, torch.float64, torch.int32, torch.int64)


def _fake(
    logits: Tensor, boxes_cxcywh: Tensor, sizes_hw: Tensor | None, k: int, threshold: float
) -> tuple[Tensor, ...]:
    batch = logits.shape[0]
    is_double = torch.float64 in (logits.dtype, boxes_cxcywh.dtype)
    real = torch.float64 if is_double else torch.float32
    return (
        logits.new_empty(batch, k, dtype=real),
        logits.new_empty(batch, k, dtype=torch.int64),
        logits.new_empty(batch, k, 4, dtype=real),
        logits.new_empty(batch, k, dtype=torch.int64),
        logits.new_empty(batch, dtype=torch.int64),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, boxes_cxcywh, sizes_hw, _, _ = inputs
    scores, labels, _, query_index, counts = output
    ctx.mark_non_differentiable(labels, query_index, counts)
    ctx.save_for_backward(scores, labels, query_index, sizes_hw)
    ctx.logits, ctx.boxes = (logits.shape, logits.dtype), (boxes_cxcywh.shape, boxes_cxcywh.dtype)


def _backward(
    ctx: Any,
    d_scores: Tensor,
    _labels: None,
    d_boxes_xyxy: Tensor,
    _query_index: None,
    _counts: None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of logits and boxes; only those of kept pairs are not 0."""
    scores, labels, query_index, sizes_hw = ctx.saved_tensors
    shape, dtype = ctx.logits
    d_logits = scores.new_zeros(shape).flatten(1)
    d_kept = d_scores * scores * (1 - scores)
    d_logits = d_logits.scatter(1, query_index * shape[2] + labels, d_kept)
    if sizes_hw is not None:
        sides = sizes_hw.to(
            d_boxes_xyxy.device, d_boxes_xyxy.dtype, non_blocking=sizes_hw.is_cpu
        ).flip(1)  # [B, 2] width, height
        d_boxes_xyxy = d_boxes_xyxy * sides.repeat(1, 2)[:, None]
    first, last = d_boxes_xyxy[..., :2], d_boxes_xyxy[..., 2:]
    d_cxcywh = torch.cat((first + last, 0.5 * (last - first)), dim=-1)  # [B, k, 4]
    box_shape, box_dtype = ctx.boxes
    d_boxes = d_cxcywh.new_zeros(box_shape)
    d_boxes = d_boxes.scatter_add(1, query_index[..., None].expand(-1, -1, 4), d_cxcywh)
    return d_logits.reshape(shape).to(dtype), d_boxes.to(box_dtype), None, None, None


torch.library.register_fake("cdetr_fast::detection_topk", _fake, lib=_LIBRARY)
torch.library.register_autograd(
    "cdetr_fast::detection_topk", _backward, setup_context=_setup_context, lib=_LIBRARY
)


def detection_topk(
    logits: Tensor, boxes_cxcywh: Tensor, sizes_hw: Tensor | None, k: int, threshold: float
) -> tuple[Tensor, ...]:
    """Run the path "native" of `cdetr_kernels.detection_topk`; see the reference for shapes."""
    if sizes_hw is not None:
        # Sizes on the CPU go to a GPU as arguments of the launch: a copy would have to wait.
        device = sizes_hw.device if sizes_hw.is_cpu else logits.device
        dtype = sizes_hw.dtype if sizes_hw.dtype in _SIZE_DTYPES else torch.float64
        sizes_hw = sizes_hw.to(device, dtype)
    return _TOPK(logits, boxes_cxcywh, sizes_hw, k, threshold)
