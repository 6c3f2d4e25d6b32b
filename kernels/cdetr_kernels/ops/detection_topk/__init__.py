"""`detection_topk`: public function, argument checks and implementations."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cdetr_kernels.dispatch import Implementation, Operator, bucket
from cdetr_kernels.ops.detection_topk import reference

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# The extension is loaded at the first call. The import is a statement, as torch.compile does not
# follow importlib.
def _native(*args: Any) -> Any:
    from cdetr_kernels.ops.detection_topk.native import detection_topk

    return detection_topk(*args)


def _unsupported_by_native(logits: Tensor, *rest: Any) -> str | None:
    from cdetr_kernels.native import unsupported_device

    reason = unsupported_device(logits)
    if reason is not None or not rest:
        return reason
    floats = _FLOATS[:3] if logits.is_cuda else _FLOATS
    if logits.dtype not in floats:
        return f"the kernel takes logits in {floats}, not {logits.dtype}"
    if rest[0].dtype not in _FLOATS:
        return f"the kernel takes boxes in {_FLOATS}, not {rest[0].dtype}"
    if logits.shape[1] * logits.shape[2] >= 2**31:
        return "the kernel counts the logits of an image in 31 bits"
    return None


def _classify(logits: Tensor, _boxes: Tensor, _sizes: Any, k: int, *_: Any) -> tuple[int, ...]:
    """Return the class of a call: images, logits of one, and detections of one."""
    batch, queries, classes = logits.shape
    return 1 if batch == 1 else bucket(batch, 64), bucket(queries * classes, 2**16), bucket(k, 1024)


OPERATOR = Operator(
    "detection_topk",
    {
        "native": Implementation(
            _native,
            _unsupported_by_native,
            evidence_on=("cuda",),
        ),
        "torch": Implementation(reference.detection_topk),
    },
    _classify,
)


def detection_topk(
    logits: Tensor,
    boxes_cxcywh: Tensor,
    target_sizes: Tensor | Sequence[Sequence[float]] | None = None,
    k: int = 100,
    backend: str = "auto",
    *,
    threshold: float | None = None,
) -> tuple[Tensor, ...]:
    """Select the k best (query, class) pairs of each image, NMS-free, with boxes in pixels.

    The sigmoid is monotone, so the selection is made on logits (upcast to fp32 at least). Equal
    logits come in the order of their flat index `query * K + class`. NaN comes last, with score 0.

    Args:
        logits: Class logits `[B, Q, K]`.
        boxes_cxcywh: Boxes `[B, Q, 4]`, centre and size relative to the image.
        target_sizes: Height and width of each image in pixels, `[B, 2]`, a tensor on any device or
            a list; None keeps relative boxes.
        k: Detections per image, at most Q*K.
        backend: "auto", "torch", "triton", "native" or "cuda".
        threshold: Also count the detections of each image with a score above it. They come first,
            so one transfer of the counts cuts the whole batch. NaN is never among them.

    Returns:
        scores `[B, k]` descending, labels int64 `[B, k]`, boxes_xyxy `[B, k, 4]`, query index int64
        `[B, k]`; with `threshold` also counts int64 `[B]`. Scores and boxes are fp32, or fp64 if an
        input is.

    Raises:
        TypeError: `logits` or `boxes_cxcywh` is not floating point, or `k` is not an integer.
        ValueError: A shape does not fit, `k` is out of range, or a size in a list or in a tensor on
            the CPU is not positive (sizes on a GPU are not looked at: that would wait for it).
        RuntimeError: `backend` was named and cannot run.

    Source: the authors' PostProcess in models/conditional_detr.py.
    """
    for name, tensor in (("logits", logits), ("boxes_cxcywh", boxes_cxcywh)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating point tensor, got {tensor.dtype}")
    if logits.dim() != 3:
        raise ValueError(f"logits: expected [B, Q, K], got {list(logits.shape)}")
    batch, queries, classes = logits.shape
    if boxes_cxcywh.shape != (batch, queries, 4):
        expected = [batch, queries, 4]
        raise ValueError(f"boxes_cxcywh: expected {expected}, got {list(boxes_cxcywh.shape)}")
    if boxes_cxcywh.device != logits.device:
        raise ValueError(
            f"boxes_cxcywh: expected {logits.device} as logits, got {boxes_cxcywh.device}"
        )
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k: expected an integer, got {type(k).__name__}")
    if not 1 <= k <= queries * classes:
        raise ValueError(f"k: expected 1 to Q*K = {queries * classes}, got {k}")
    sizes_hw = None if target_sizes is None else _sizes(target_sizes, batch)
    limit = math.inf if threshold is None else float(threshold)
    *detections, counts = OPERATOR(backend, logits, boxes_cxcywh, sizes_hw, k, limit)
    return tuple(detections) if threshold is None else (*detections, counts)


def _sizes(target_sizes: Tensor | Sequence[Sequence[float]], batch: int) -> Tensor:
    """Return the sizes as a tensor `[B, 2]` on their own device."""
    if isinstance(target_sizes, Tensor):
        sizes_hw = target_sizes
    else:
        try:
            numbers = [[float(side) for side in size] for size in target_sizes]
            sizes_hw = torch.tensor(numbers, device="cpu")
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"target_sizes: expected {[batch, 2]} (height, width), got {target_sizes!r}"[:300]
            ) from error
        if batch == 0:
            sizes_hw = sizes_hw.reshape(-1, 2)
    if sizes_hw.shape != (batch, 2):
        raise ValueError(
            f"target_sizes: expected {[batch, 2]} (height, width), got {list(sizes_hw.shape)}"
        )
    # A traced tensor has no values to look at.
    if not torch.compiler.is_compiling() and sizes_hw.device.type == "cpu":
        sides = sizes_hw.tolist() if isinstance(target_sizes, Tensor) else target_sizes
        for i, (height, width) in enumerate(sides):
            if not (height > 0 and width > 0):
                raise ValueError(
                    f"target_sizes[{i}]: expected a positive height and width, "
                    f"got {[height, width]}"
                )
    return sizes_hw
