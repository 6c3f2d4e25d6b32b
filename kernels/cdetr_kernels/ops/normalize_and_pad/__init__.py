"""`normalize_and_pad`: public function, argument checks and implementations."""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from cdetr_kernels.dispatch import Implementation, Operator, bucket
from cdetr_kernels.gpu.support import by_evidence, unsupported_device
from cdetr_kernels.ops.normalize_and_pad import reference

_PIXELS = (torch.uint8, torch.float32)
_MOST_CHANNELS = 4


# The extension is loaded, and triton imported, at the first call. Each import is a statement, as
# torch.compile does not follow importlib.
def _native(*args: Any) -> Any:
    from cdetr_kernels.ops.normalize_and_pad.native import normalize_and_pad

    return normalize_and_pad(*args)


def _triton(*args: Any) -> Any:
    from cdetr_kernels.ops.normalize_and_pad.triton import normalize_and_pad

    return normalize_and_pad(*args)


def _unsupported_by_native(images: Any, *rest: Any) -> str | None:
    """Return why, given the arguments or a tensor alone."""
    from cdetr_kernels import native

    first: Tensor = images[0] if rest else images
    if first.is_cuda:
        return "the extension pads images on CPUs only"
    reason = native.unsupported_device(first)
    if reason is None and rest and any(image.dtype not in _PIXELS for image in images):
        reason = f"the kernel takes images in {_PIXELS}"
    return reason or (_differentiated(images) if rest else None)


def _unsupported_by_triton(images: Any, *rest: Any) -> str | None:
    """Return why, given the arguments or a tensor alone."""
    first: Tensor = images[0] if rest else images
    reason = unsupported_device(first)
    if reason is None and rest and first.shape[0] > _MOST_CHANNELS:
        reason = f"the kernel takes images of up to {_MOST_CHANNELS} channels"
    return reason or (_differentiated(images) if rest else None)


def _differentiated(images: Sequence[Tensor]) -> str | None:
    if torch.is_grad_enabled() and any(image.requires_grad for image in images):
        return "an image requires grad, and the kernel has no gradient"
    return None


def _classify(
    images: Sequence[Tensor],
    shift: Any,
    _divisor: Any,
    _factor: float,
    height: int,
    width: int,
) -> tuple[int | bool, ...]:
    """Return the class of a call: images, pixels of one, and whether they are shifted."""
    batch = 1 if len(images) == 1 else bucket(len(images), 16)
    return batch, bucket(height * width, 2**16), shift is not None


OPERATOR = Operator(
    "normalize_and_pad",
    {
        "native": Implementation(_native, _unsupported_by_native),
        "triton": by_evidence(_triton, _unsupported_by_triton),
        "torch": Implementation(reference.normalize_and_pad),
    },
    _classify,
)


def normalize_and_pad(
    images: Iterable[Tensor],
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    rescale_factor: float | None = None,
    size_hw: tuple[int, int] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Rescale, normalise and pad images of different sizes to one batch, in one pass.

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
    images = list(images)
    if not images:
        raise ValueError("images: expected at least one image, got none")
    first = images[0]
    tallest = widest = 0
    for i, image in enumerate(images):
        if not isinstance(image, Tensor) or image.dtype == torch.bool or image.is_complex():
            got = image.dtype if isinstance(image, Tensor) else type(image).__name__
            raise TypeError(f"images[{i}]: expected a tensor of numbers, got {got}")
        if image.dim() != 3 or image.shape[0] != first.shape[0] or image.numel() == 0:
            raise ValueError(f"images[{i}]: expected [C, h, w], got {list(image.shape)}")
        if image.device != first.device:
            raise ValueError(f"images[{i}]: expected {first.device}, got {image.device}")
        tallest, widest = max(tallest, image.shape[1]), max(widest, image.shape[2])
    height, width = (tallest, widest) if size_hw is None else size_hw
    if tallest > height or widest > width:
        sizes = [list(image.shape[1:]) for image in images]
        i = next(i for i, (h, w) in enumerate(sizes) if h > height or w > width)
        raise ValueError(
            f"size_hw: expected at least {sizes[i]} for images[{i}], got {[height, width]}"
        )
    if (mean is None) != (std is None):
        missing = "mean" if mean is None else "std"
        raise ValueError(f"{missing}: expected values, as its counterpart is given, got None")
    factor = 1.0 if rescale_factor is None else float(rescale_factor)
    shift = divisor = None
    if mean is not None and std is not None:
        if factor == 0.0:
            raise ValueError("rescale_factor: expected a number other than 0, got 0")
        channels = first.shape[0]
        # torch.compile cannot look into a cache, and needs none.
        per_channel = _per_channel if torch.compiler.is_compiling() else _known_per_channel
        shift = per_channel("mean", _tuple(mean), channels, factor)
        divisor = per_channel("std", _tuple(std), channels, factor)
    return OPERATOR(backend, images, shift, divisor, factor, height, width)


def _tuple(values: Sequence[float] | float) -> tuple[float, ...]:
    return (float(values),) if isinstance(values, int | float) else tuple(values)


def _per_channel(
    name: str, values: tuple[float, ...], channels: int, factor: float
) -> tuple[float, ...]:
    """Return values / factor of each channel, rounded as torch's fp32 tensors are."""
    if len(values) not in (1, channels):
        raise ValueError(f"{name}: expected {channels} values (channels), got {len(values)}")
    if name == "std" and 0.0 in values:
        raise ValueError(f"std: expected numbers other than 0, got {list(values)}")
    scale = _to_single(1.0 / factor)
    scaled = tuple(_to_single(_to_single(value) * scale) for value in values)
    return scaled * channels if len(scaled) == 1 else scaled


_known_per_channel = functools.lru_cache(maxsize=64)(_per_channel)


def _to_single(value: float) -> float:
    """Round to 24 bits, in arithmetic that torch.compile can follow."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(math.ldexp(mantissa, 24)), exponent - 24)
