"""Inputs of `matching_cost` for tests, benchmarks and the audit."""

import functools
from typing import TYPE_CHECKING

import torch

from cdetr_kernels.ops.matching_cost import matching_cost
from cdetr_kernels.testing.case import Case, Sizes, count_bytes
from cdetr_kernels.testing.criterion import predictions_and_targets

if TYPE_CHECKING:
    from cdetr_kernels.testing.machine_code import Audit, Audited

SIZES = {
    "matching_cost": Sizes(
        smallest={"layers": 1, "queries": 2, "classes": 3, "counts": (1,)},
        small={"layers": 2, "queries": 67, "counts": (3, 17)},
        medium={"queries": 67, "counts": (13, 13, 13)},
        typical=[{"counts": (count,) * 8} for count in (7, 100)],
        called=[
            *({"counts": (count,) * 8} for count in (7, 100)),
            # Without auxiliary losses, or one image of all layers.
            *({"layers": 1, "counts": (count,) * 8} for count in (7, 100)),
        ],
        differentiable=False,
    )
}


def make(
    dtype: torch.dtype,
    device: torch.device | str,
    layers: int = 6,
    queries: int = 300,
    classes: int = 91,
    counts: tuple[int, ...] = (20,) * 8,
    classification: str = "focal",
) -> Case:
    """Make the predictions of all decoder layers, and targets.

    Args:
        dtype: dtype of the predictions.
        device: Device of the inputs.
        layers: Decoder layers.
        queries: Queries.
        classes: Classes.
        counts: Targets of each image.
        classification: "focal" or "softmax".
    """
    inputs = predictions_and_targets(dtype, device, layers, queries, classes, counts)
    targets = max(counts)
    out = layers * len(counts) * queries * targets * 4
    # Of the logits, the columns of the targets' classes are read.
    read = out // 4 * torch.finfo(dtype).bits // 8 + count_bytes(
        *(x for name, x in inputs.items() if name != "logits")
    )
    return Case(
        "matching_cost",
        f"L={layers} B={len(counts)} Q={queries} T={targets} K={classes}",
        dtype,
        inputs,
        matching_cost,
        {"classification": classification},
        bytes_moved=(read + out,) * 2,
    )


def audits() -> "list[Audit]":
    """Return the calls whose kernels are compiled: a training step with few and many targets."""
    from cdetr_kernels.testing.machine_code import Audit

    focal = [
        Audit(
            f"focal {precision} {targets}",
            functools.partial(_audited, dtype, targets, "focal"),
            brief=precision == "half",
        )
        for precision, dtype in (("half", torch.bfloat16), ("single", torch.float32))
        for targets in (7, 100)
    ]
    softmax = Audit(
        "softmax single 100", lambda: _audited(torch.float32, 100, "softmax"), brief=False
    )
    return [*focal, softmax]


def _audited(dtype: torch.dtype, targets: int, classification: str) -> "dict[str, Audited]":
    from cdetr_kernels.ops.matching_cost.triton import cost_launch
    from cdetr_kernels.testing.machine_code import Audited

    inputs = make(dtype, "meta", counts=(targets,) * 8).inputs
    # Boxes stay in fp32 under autocast.
    logits, boxes, labels, wanted, counts = inputs.values()
    boxes = boxes.float()
    cost = torch.empty(48, targets, 300, device="meta")
    launch = cost_launch(
        logits, boxes, labels, wanted, counts, (2, 5, 2), classification == "softmax", 0.25, 2.0,
        cost,
    )  # fmt: skip
    return {"matching_cost": Audited(launch)}
