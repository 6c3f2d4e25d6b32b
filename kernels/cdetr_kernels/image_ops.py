"""The public operators on either side of the model: images in, detections out."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cdetr_kernels.dispatch import Operator, Path
from cdetr_kernels.reference import preprocessing, topk
from cdetr_kernels.triton_support import held_back, reason_against_device

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PIXELS = (torch.uint8, torch.float32)
_MOST_CHANNELS = 4
_HELD_BACK = "not run on a GPU yet; ask for it by name"


# The extension is loaded at the first call. Each import is a statement, as torch.compile does not
# follow importlib.
def _detection_topk_native(*args):
    from cdetr_kernels.native import detection_topk

    return detection_topk(*args)


def _normalize_and_pad_native(*args):
    from cdetr_kernels.native import normalize_and_pad

    return normalize_and_pad(*args)


def _normalize_and_pad_triton(*args):
    from cdetr_kernels.fused.normalize_and_pad import normalize_and_pad

    return normalize_and_pad(*args)


def _no_native_at(tensor: Tensor) -> str | None:
    from cdetr_kernels.native import ABSENT

    device_type = tensor.device.type
    if device_type in ABSENT:
        return ABSENT[device_type]
    return f"the extension is for CPUs and CUDA, and the tensors are on {device_type}"


def _no_native_topk(logits: Tensor, *rest) -> str | None:
    reason = _no_native_at(logits)
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


def _no_native_pad(images: Tensor | Sequence[Tensor], *rest) -> str | None:
    first = images[0] if rest else images
    if first.is_cuda:
        return "the extension pads images on CPUs only"
    reason = _no_native_at(first)
    if reason is None and rest and any(image.dtype not in _PIXELS for image in images):
        reason = f"the kernel takes images in {_PIXELS}"
    return reason


def _no_triton_pad(images: Tensor | Sequence[Tensor], *rest) -> str | None:
    first = images[0] if rest else images
    reason = reason_against_device(first)
    if reason is None and rest and first.shape[0] > _MOST_CHANNELS:
        reason = f"the kernel takes images of up to {_MOST_CHANNELS} channels"
    return reason


DETECTION_TOPK = Operator(
    "detection_topk",
    {
        "native": Path(_detection_topk_native, _no_native_topk, _HELD_BACK, held_back_on="cuda"),
        "torch": Path(topk.detection_topk),
    },
)
NORMALIZE_AND_PAD = Operator(
    "normalize_and_pad",
    {
        "native": Path(_normalize_and_pad_native, _no_native_pad),
        "triton": held_back(_normalize_and_pad_triton, _no_triton_pad),
        "torch": Path(preprocessing.normalize_and_pad),
    },
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
    """The k best (query, class) pairs of each image, NMS-free, with boxes in pixels.

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
    *detections, counts = DETECTION_TOPK(backend, logits, boxes_cxcywh, sizes_hw, k, limit)
    return tuple(detections) if threshold is None else (*detections, counts)


def normalize_and_pad(
    images: Sequence[Tensor],
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    rescale_factor: float | None = None,
    size_hw: tuple[int, int] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Rescales, normalises and pads images of different sizes to one batch, in one pass.

    Args:
        images: B images `[C, h, w]` on one device, of any dtype that is a number.
        mean: Subtracted after rescaling, one value or one per channel; None normalises nothing.
        std: Divides then; None exactly if `mean` is.
        rescale_factor: Multiplies pixels first; None is 1.
        size_hw: Height H and width W of the batch; None takes the largest of each side.
        backend: "auto", "torch", "triton", "native" or "cuda".

    Returns:
        pixel_values fp32 `[B, C, H, W]`, 0 outside of an image, and pixel_mask int64 `[B, H, W]`,
        1 inside of an image. The values are those of torchvision's `normalize(image, mean / r,
        std / r)` with the rescale factor r.

    Raises:
        TypeError: An image is not a tensor of numbers.
        ValueError: A shape, device or length does not fit, a size is too small, or a factor is 0.
        RuntimeError: `backend` was named and cannot run.
    """
    if len(images) == 0:
        raise ValueError("images: expected at least one image, got none")
    first = images[0]
    for i, image in enumerate(images):
        if not isinstance(image, Tensor) or image.dtype == torch.bool or image.is_complex():
            got = image.dtype if isinstance(image, Tensor) else type(image).__name__
            raise TypeError(f"images[{i}]: expected a tensor of numbers, got {got}")
        if image.dim() != 3 or image.shape[0] != first.shape[0] or image.numel() == 0:
            raise ValueError(f"images[{i}]: expected [C, h, w], got {list(image.shape)}")
        if image.device != first.device:
            raise ValueError(f"images[{i}]: expected {first.device}, got {image.device}")
    if size_hw is None:
        size_hw = max(i.shape[1] for i in images), max(i.shape[2] for i in images)
    height, width = size_hw
    for i, image in enumerate(images):
        if image.shape[1] > height or image.shape[2] > width:
            raise ValueError(
                f"size_hw: expected at least {list(image.shape[1:])} for images[{i}], "
                f"got {[height, width]}"
            )
    if (mean is None) != (std is None):
        missing = "mean" if mean is None else "std"
        raise ValueError(f"{missing}: expected values, as its counterpart is given, got None")
    factor = 1.0 if rescale_factor is None else float(rescale_factor)
    shift = divisor = None
    if mean is not None:
        if factor == 0.0:
            raise ValueError("rescale_factor: expected a number other than 0, got 0")
        channels = first.shape[0]
        shift = _per_channel("mean", _tuple(mean), channels, factor)
        divisor = _per_channel("std", _tuple(std), channels, factor)
    return NORMALIZE_AND_PAD(backend, images, shift, divisor, factor, height, width)


def _sizes(target_sizes: Tensor | Sequence[Sequence[float]], batch: int) -> Tensor:
    """Returns the sizes as a tensor `[B, 2]`, where they are."""
    is_tensor = isinstance(target_sizes, Tensor)
    if is_tensor:
        sizes_hw = target_sizes
    else:
        sizes_hw = torch.tensor([[float(side) for side in size] for size in target_sizes])
        if batch == 0:
            sizes_hw = sizes_hw.reshape(-1, 2)
    if sizes_hw.shape != (batch, 2):
        raise ValueError(
            f"target_sizes: expected {[batch, 2]} (height, width), got {list(sizes_hw.shape)}"
        )
    # A traced tensor has no values to look at.
    if not torch.compiler.is_compiling() and sizes_hw.device.type == "cpu":
        sides = sizes_hw.tolist() if is_tensor else target_sizes
        for i, (height, width) in enumerate(sides):
            if not (height > 0 and width > 0):
                raise ValueError(
                    f"target_sizes[{i}]: expected a positive height and width, "
                    f"got {[height, width]}"
                )
    return sizes_hw


def _tuple(values: Sequence[float] | float) -> tuple[float, ...]:
    return (float(values),) if isinstance(values, int | float) else tuple(values)


def _per_channel(
    name: str, values: tuple[float, ...], channels: int, factor: float
) -> tuple[float, ...]:
    """Returns values / factor of each channel, rounded as torch's fp32 tensors are."""
    if len(values) not in (1, channels):
        raise ValueError(f"{name}: expected {channels} values (channels), got {len(values)}")
    if name == "std" and 0.0 in values:
        raise ValueError(f"std: expected numbers other than 0, got {list(values)}")
    scale = _to_single(1.0 / factor)
    scaled = tuple(_to_single(_to_single(value) * scale) for value in values)
    return scaled * channels if len(scaled) == 1 else scaled


def _to_single(value: float) -> float:
    """Rounds to 24 bits, in arithmetic that torch.compile can follow."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(math.ldexp(mantissa, 24)), exponent - 24)
