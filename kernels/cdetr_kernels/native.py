"""The operators in C++ and CUDA: schemas, fakes and gradients; the kernels are in csrc/.

Importing this module loads what has been built. `ABSENT` says what is not there and why.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).parent
LIBRARY = torch.library.Library("cdetr_fast", "FRAGMENT")
LIBRARY.define(
    "detection_topk(Tensor logits, Tensor boxes_cxcywh, Tensor? sizes_hw, int k, float threshold) "
    "-> (Tensor scores, Tensor labels, Tensor boxes_xyxy, Tensor query_index, Tensor counts)"
)
LIBRARY.define(
    "normalize_and_pad(Tensor[] images, float[] shift, float[] divisor, float factor, int height, "
    "int width) -> (Tensor values, Tensor mask)"
)


def _load(part: str, name: str) -> str | None:
    """Loads one part of the extension; says why it cannot."""
    file = FOLDER / f"_native_{part}.so"
    if not file.is_file():
        return f"the {name} part of the extension is not built: run `cdetr-fast build-native`"
    try:
        torch.ops.load_library(file)
    except OSError as error:
        return f"{file.name} does not load ({error}): run `cdetr-fast build-native`"
    return None


_SIZE_DTYPES = (torch.float32, torch.float64, torch.int32, torch.int64)

ABSENT = {"cpu": _load("cpu", "C++"), "cuda": _load("cuda", "CUDA")}
"""Why a part is not there, None if it is."""


def parts() -> dict[str, str]:
    """Returns what is there of each part of the extension, or why it is not."""
    states = {"native C++": ABSENT["cpu"] or "loaded", "native CUDA": ABSENT["cuda"] or "loaded"}
    report = FOLDER / "_native_cuda.txt"
    if ABSENT["cuda"] is None and report.is_file():
        compiled = set(re.findall(r"for '(sm_\w+)'", report.read_text(encoding="utf-8")))
        names = sorted(compiled, key=lambda name: (len(name), name))
        states["native CUDA"] += " for " + ", ".join(names)
    return states


_TOPK = torch.ops.cdetr_fast.detection_topk.default  # looking it up takes 2 us a call


def _fake_topk(logits, boxes_cxcywh, sizes_hw, k, threshold):
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


def _fake_pad(images, shift, divisor, factor, height, width):
    first = images[0]
    shape = len(images), first.shape[0], height, width
    values = first.new_empty(shape, dtype=torch.float32)
    return values, first.new_empty(shape[0], height, width, dtype=torch.int64)


torch.library.register_fake("cdetr_fast::detection_topk", _fake_topk, lib=LIBRARY)
torch.library.register_fake("cdetr_fast::normalize_and_pad", _fake_pad, lib=LIBRARY)


def _setup_context(ctx, inputs, output) -> None:
    logits, boxes_cxcywh, sizes_hw, _, _ = inputs
    scores, labels, _, query_index, counts = output
    ctx.mark_non_differentiable(labels, query_index, counts)
    ctx.save_for_backward(scores, labels, query_index, sizes_hw)
    ctx.logits, ctx.boxes = (logits.shape, logits.dtype), (boxes_cxcywh.shape, boxes_cxcywh.dtype)


def _backward(ctx, d_scores, _labels, d_boxes_xyxy, _query_index, _counts):
    """Each kept pair hands its gradient to its logit and to its query's box."""
    scores, labels, query_index, sizes_hw = ctx.saved_tensors
    shape, dtype = ctx.logits
    d_logits = scores.new_zeros(shape).flatten(1)
    d_kept = d_scores * scores * (1 - scores)
    d_logits = d_logits.scatter(1, query_index * shape[2] + labels, d_kept)
    if sizes_hw is not None:
        sides = sizes_hw.to(d_boxes_xyxy.device, d_boxes_xyxy.dtype).flip(1)  # [B, 2] width, height
        d_boxes_xyxy = d_boxes_xyxy * sides.repeat(1, 2)[:, None]
    first, last = d_boxes_xyxy[..., :2], d_boxes_xyxy[..., 2:]
    d_cxcywh = torch.cat((first + last, 0.5 * (last - first)), dim=-1)  # [B, k, 4]
    box_shape, box_dtype = ctx.boxes
    d_boxes = d_cxcywh.new_zeros(box_shape)
    d_boxes = d_boxes.scatter_add(1, query_index[..., None].expand(-1, -1, 4), d_cxcywh)
    return d_logits.reshape(shape).to(dtype), d_boxes.to(box_dtype), None, None, None


torch.library.register_autograd(
    "cdetr_fast::detection_topk", _backward, setup_context=_setup_context, lib=LIBRARY
)


def detection_topk(
    logits: Tensor, boxes_cxcywh: Tensor, sizes_hw: Tensor | None, k: int, threshold: float
) -> tuple[Tensor, ...]:
    """The path "native" of `cdetr_kernels.detection_topk`; see the reference for shapes."""
    if sizes_hw is not None:
        # Sizes on the CPU go to a GPU as arguments of the launch: a copy would have to wait.
        device = sizes_hw.device if sizes_hw.is_cpu else logits.device
        dtype = sizes_hw.dtype if sizes_hw.dtype in _SIZE_DTYPES else torch.float64
        sizes_hw = sizes_hw.to(device, dtype)
    return _TOPK(logits, boxes_cxcywh, sizes_hw, k, threshold)


def normalize_and_pad(images, shift, divisor, factor, height, width) -> tuple[Tensor, Tensor]:
    """The path "native" of `cdetr_kernels.normalize_and_pad`; see the reference for shapes."""
    return torch.ops.cdetr_fast.normalize_and_pad(
        images, shift or [], divisor or [], factor, height, width
    )
