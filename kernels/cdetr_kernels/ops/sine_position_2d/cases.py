"""Inputs of `sine_position_2d` for tests, benchmarks and the audit."""

from typing import TYPE_CHECKING

import torch

from cdetr_kernels.ops.sine_position_2d import sine_position_2d
from cdetr_kernels.testing.case import Case, Sizes, count_bytes, key_mask

if TYPE_CHECKING:
    from cdetr_kernels.testing.machine_code import Audit, Audited

SIZES = {
    "sine_position_2d": Sizes(
        smallest={"batch": 1, "height": 2, "width": 2, "channels": 8, "mask": "padded"},
        small={"batch": 2, "height": 3, "width": 17},
        medium={"batch": 3, "height": 13, "width": 21},
        typical=[{"batch": batch} for batch in (1, 8, 32)],
        differentiable=False,
    )
}


def make(
    dtype: torch.dtype,
    device: torch.device | str,
    batch: int = 1,
    height: int = 25,
    width: int = 42,
    channels: int = 256,
    mask: str = "padded",
) -> Case:
    """Make the mask of the keys.

    Args:
        dtype: dtype of the code.
        device: Device of the mask.
        batch: Images.
        height: Rows of the map.
        width: Columns of the map.
        channels: Width of the code.
        mask: Kind of the mask.
    """
    unpadded = key_mask(mask, batch, height, width, device)

    written = batch * height * width * channels * torch.finfo(dtype).bits // 8
    return Case(
        "sine_position_2d",
        f"B={batch} h={height} w={width} C={channels}",
        dtype,
        {"mask": unpadded},
        sine_position_2d,
        {"channels": channels, "dtype": dtype},
        bytes_moved=(count_bytes(unpadded) + written,) * 2,
        per_image=True,
        # The mask has no dtype to go by.
        exact_options={"dtype": torch.float64},
    )


def audits() -> "list[Audit]":
    """Return the calls whose kernels are compiled: a training step at 800x1066."""
    from cdetr_kernels.testing.machine_code import Audit

    return [
        Audit("sine half 2", lambda: _audited(torch.bfloat16)),
        Audit("sine single 2", lambda: _audited(torch.float32), brief=False),
    ]


def _audited(dtype: torch.dtype) -> "dict[str, Audited]":
    from cdetr_kernels.ops.sine_position_2d.triton import position_launch
    from cdetr_kernels.testing.machine_code import Audited

    mask = torch.empty(8, 25, 34, dtype=torch.bool, device="meta")
    code = torch.empty(8, 25 * 34, 256, dtype=dtype, device="meta")
    launch = position_launch(mask, 10000.0, True, 6.28, code)
    # It reads a mask, bytes.
    return {"sine_position_2d": Audited(launch, frozenset({"store16"}))}
