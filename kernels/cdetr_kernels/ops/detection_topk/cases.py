"""Inputs of `detection_topk` for tests and benchmarks."""

from typing import TYPE_CHECKING

import torch

from cdetr_kernels.ops.detection_topk import detection_topk
from cdetr_kernels.testing.case import Case, Inputs, RandomTensors, Sizes, count_bytes

if TYPE_CHECKING:
    from cdetr_kernels.testing.machine_code import Audit

SIZES = {
    "detection_topk": Sizes(
        smallest={"batch": 1, "queries": 2, "classes": 3, "k": 2},
        small={"batch": 2, "queries": 20, "k": 10},
        medium={"batch": 3, "queries": 67, "k": 100},
        typical=[{"batch": 1}, {"batch": 32}],
        dtypes=(torch.float32,),  # halves tie, and then any order of labels is right
        differentiable=False,
        called=[{"batch": 1}, {"batch": 8}],
    )
}


def make(
    dtype: torch.dtype,
    device: torch.device | str,
    batch: int = 1,
    queries: int = 300,
    classes: int = 91,
    k: int = 100,
) -> Case:
    """Make the outputs of a head.

    Args:
        dtype: dtype of the inputs; logits in half precision tie, and then any order is right.
        device: Device of the inputs.
        batch: Images.
        queries: Queries.
        classes: Classes.
        k: Detections of an image.
    """
    random = RandomTensors(device, dtype)
    inputs: Inputs = {
        "logits": random.normal(batch, queries, classes),
        "boxes_cxcywh": random.uniform(batch, queries, 4),
    }
    sizes = torch.tensor([[800, 1066]], device=device).expand(batch, -1)

    out = batch * k * (4 + 8 + 4 * 4 + 8)
    return Case(
        "detection_topk",
        f"B={batch} Q={queries} K={classes} k={k}",
        dtype,
        inputs,
        detection_topk,
        {"target_sizes": sizes, "k": k},
        lambda found: [x.to(found[0].dtype) for x in found[:3]],
        bytes_moved=(count_bytes(*inputs.values()) + out,) * 2,
    )


def audits() -> "list[Audit]":
    """Return nothing: it has no triton kernel, and nvcc reports on the CUDA one."""
    return []
