"""Helpers of the launchers: the architecture of a device, the precision of dots, the launch."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from cdetr_kernels import evidence
from cdetr_kernels.gpu import configurations
from cdetr_kernels.gpu.tiles import Tile

# triton decides when it decorates a kernel, that is when this package is imported.
INTERPRETED = bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Launch:
    """One kernel with its grid, arguments and tile: what runs, and what the audit compiles."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    tile: Tile

    @property
    def options(self) -> dict[str, Any]:
        """Compiler options of the launch."""
        # Multiply-adds with one rounding, as in every library; triton 3.10 has another default.
        return {
            "num_warps": self.tile.warps,
            "num_stages": self.tile.stages,
            "enable_fp_fusion": True,
        }

    def run(self, device: torch.device) -> None:
        """Launch on the current stream of `device`."""
        if self.programs == 0:
            return
        with torch.cuda.device(device.index if device.type == "cuda" else -1):
            self.kernel[(self.programs,)](**self.arguments, **self.options)


def strides(name: str, axes: str, tensor: Tensor) -> dict[str, int]:
    """Return the arguments that hold the strides of a tensor: `name_a` for each of its axes."""
    return {f"{name}_{axis}": step for axis, step in zip(axes, tensor.stride(), strict=True)}


def shared_strides(name: str, axes: str, tensor: Tensor | None) -> dict[str, int]:
    """Return strides as `strides` does, 0 for an absent tensor and along a batch of 1."""
    if tensor is None:
        return dict.fromkeys((f"{name}_{axis}" for axis in axes), 0)
    # A size of 1 is shared by the batch: whatever its stride is, no step is taken.
    shared = {f"{name}_b": 0} if len(tensor) == 1 else {}
    return strides(name, axes, tensor) | shared


@functools.lru_cache
def architecture(device: torch.device) -> str:
    """Return "sm_90", "gfx942" and the like, or "interpreter" for a CPU."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.lru_cache
def multiprocessors(device: torch.device) -> int:
    """Return how many programs run side by side at least."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def dot_precision(dtype: torch.dtype) -> str:
    """Return how kernels multiply: "tf32" for fp32 where torch is allowed to, else "ieee"."""
    if INTERPRETED and dtype == torch.bfloat16:
        return "interpreted_bf16"
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if dtype == torch.float32 and allowed and not torch.version.hip else "ieee"


def sum_precision(dtype: torch.dtype, device: torch.device) -> str:
    """Return how kernels for `dtype` multiply fp32 sums with what they read.

    For fp32 that is `dot_precision`. Numbers in half precision lose nothing in TF32, and sums less
    than if they were rounded to half precision.
    """
    if dtype == torch.float32:
        return dot_precision(dtype)
    return "tf32" if architecture(device).startswith("sm_") else "ieee"


def attention_tile(kernel: str, q_content: Tensor, value: Tensor) -> Tile:
    """Return the tile of an attention kernel for these tensors."""
    half = q_content.dtype != torch.float32
    precision = "half" if half else dot_precision(q_content.dtype)
    size = max(q_content.shape[-1], value.shape[-1])
    device = q_content.device
    if device.type in ("cuda", "cpu"):  # not "meta", where the audit's launches are
        record = evidence.of(device).record
        if record is not None and record.tiles:
            found = record.tiles.get(f"{precision} {configurations.width(size)} {kernel}")
            if found is not None:
                return Tile(*found)
    return configurations.tile(kernel, architecture(device), precision, size)
