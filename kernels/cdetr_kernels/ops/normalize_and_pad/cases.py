"""Inputs of `normalize_and_pad` for tests, benchmarks and the audit."""

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cdetr_kernels.ops.normalize_and_pad import normalize_and_pad
from cdetr_kernels.testing.case import Case, Inputs, RandomTensors, Sizes, count_bytes

if TYPE_CHECKING:
    from cdetr_kernels.testing.machine_code import Audit, Audited

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = {
    "normalize_and_pad": Sizes(
        smallest={"sizes": ((2, 2),)},
        small={"sizes": ((5, 7), (9, 4), (1, 1), (16, 33))},
        medium={"sizes": ((51, 170), (97, 43), (60, 60))},
        typical=[{"sizes": ((800, 1066),)}, {"sizes": ((800, 1066), (640, 800)) * 4}],
        dtypes=(torch.uint8,),
        differentiable=False,
    )
}


def make(
    dtype: torch.dtype,
    device: torch.device | str,
    sizes: tuple[tuple[int, int], ...] = ((800, 1066),),
    channels: int = 3,
) -> Case:
    """Make a batch of images as a processor gets it.

    Args:
        dtype: dtype of the pixels, such as uint8.
        device: Device of the images.
        sizes: Height and width of each image.
        channels: Channels.
    """
    random = RandomTensors(device, torch.float32)
    images: Inputs = {
        f"image_{i}": random.integers(256, channels, *size).to(dtype)
        for i, size in enumerate(sizes)
    }

    height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
    out = len(sizes) * height * width * (4 * channels + 8)
    return Case(
        "normalize_and_pad",
        f"B={len(sizes)} h={height} w={width}",
        dtype,
        images,
        _pad,
        {"mean": MEAN, "std": STD, "rescale_factor": 1 / 255},
        lambda found: [x.float() for x in found],
        bytes_moved=(count_bytes(*images.values()) + out,) * 2,
    )


def _pad(backend: str, **arguments: Any) -> tuple[Tensor, Tensor]:
    images = [arguments.pop(name) for name in list(arguments) if name.startswith("image_")]
    return normalize_and_pad(images, backend=backend, **arguments)


def audits() -> "list[Audit]":
    """Return the calls whose kernels are compiled: one image in a batch of 800x1088."""
    from cdetr_kernels.testing.machine_code import Audit

    # Edge sizes: what is 1 is a constant for the compiler.
    return [
        Audit("image", functools.partial(audited, (800, 1066), (800, 1088))),
        *(
            Audit(f"image {h}x{w}", functools.partial(audited, (h, w), (h, w)), brief=False)
            for h, w in ((1, 1), (1, 64), (64, 1))
        ),
    ]


def audited(
    size_hw: tuple[int, int], padded_hw: tuple[int, int], dtype: torch.dtype = torch.uint8
) -> "dict[str, Audited]":
    """Return the launch for one image, by name."""
    from cdetr_kernels.ops.normalize_and_pad.triton import pad_launch
    from cdetr_kernels.testing.machine_code import Audited

    image = torch.empty(3, *size_hw, dtype=dtype, device="meta")
    values = torch.empty(3, *padded_hw, device="meta")
    mask = torch.empty(padded_hw, dtype=torch.int64, device="meta")
    launch = pad_launch(image, (1.0, 2.0, 3.0), (4.0, 5.0, 6.0), values, mask)
    # It reads bytes; a row of one pixel is no 16 bytes.
    wide = {"store16"} if padded_hw[1] % 16 == 0 and padded_hw[1] >= 1024 else set()
    return {"normalize_and_pad": Audited(launch, frozenset(wide))}
