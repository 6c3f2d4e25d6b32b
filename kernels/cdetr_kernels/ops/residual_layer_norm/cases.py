"""Inputs of `residual_layer_norm` for tests, benchmarks and the audit."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from cdetr_kernels.ops.residual_layer_norm import residual_layer_norm
from cdetr_kernels.testing.case import Case, Inputs, RandomTensors, Sizes, count_bytes

if TYPE_CHECKING:
    from cdetr_kernels.testing.machine_code import Audit, Audited

SIZES = {
    "residual_layer_norm": Sizes(
        smallest={"batch": 1, "rows": 2, "channels": 8},
        small={"batch": 2, "rows": 9},
        medium={"batch": 3, "rows": 67},
        typical=[{"batch": batch, "rows": rows} for batch in (1, 8, 32) for rows in (300, 1050)],
        called=[{"batch": batch, "rows": 300 if batch == 1 else 1050} for batch in (1, 8, 32)],
        differentiable=False,
    )
}


def make(
    dtype: torch.dtype,
    device: torch.device | str,
    batch: int = 1,
    rows: int = 300,
    channels: int = 256,
    shared: bool = False,
) -> Case:
    """Make a state and its update, at the end of a part of a transformer layer.

    Args:
        dtype: dtype of the inputs.
        device: Device of the inputs.
        batch: Images.
        rows: Queries or map positions.
        channels: Width.
        shared: Whether the batch shares the residual.
    """
    random = RandomTensors(device, dtype)
    inputs: Inputs = {
        # A mean far from 0, which a variance of uncentred values would not survive.
        "x": random.normal(batch, rows, channels) + 3,
        "residual": random.normal(1 if shared else batch, rows, channels),
        "weight": random.normal(channels),
        "bias": random.normal(channels),
    }
    return Case(
        "residual_layer_norm",
        f"B={batch} rows={rows} C={channels}",
        dtype,
        inputs,
        residual_layer_norm,
        bytes_moved=(count_bytes(*inputs.values(), inputs["x"]),) * 2,
        peers={
            "add, then layer_norm": lambda: _add_then_layer_norm,
        },
    )


def _add_then_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(residual + x, weight.shape, weight, bias)


def audits() -> "list[Audit]":
    """Return the calls whose kernels are compiled: the end of a decoder layer, and the widest."""
    from cdetr_kernels.testing.machine_code import Audit

    return [
        Audit("norm half 256", lambda: _audited(torch.bfloat16, 256)),
        Audit("norm single 256", lambda: _audited(torch.float32, 256), brief=False),
        Audit("norm single 4096", lambda: _audited(torch.float32, 4096), brief=False),
    ]


def _audited(dtype: torch.dtype, channels: int) -> "dict[str, Audited]":
    from cdetr_kernels.ops.residual_layer_norm.triton import norm_launch
    from cdetr_kernels.testing.machine_code import Audited

    x, residual, weight, bias = make(dtype, "meta", 8, channels=channels).inputs.values()
    launch = norm_launch(x, residual, weight, bias, 1e-5, x)
    return {"residual_layer_norm": Audited(launch, frozenset({"load16", "store16"}))}
