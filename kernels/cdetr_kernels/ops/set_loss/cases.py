"""Inputs of `set_loss` for tests, benchmarks and the audit."""

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cdetr_kernels.ops.set_loss import set_loss
from cdetr_kernels.testing.case import Case, Sizes, count_bytes
from cdetr_kernels.testing.criterion import predictions_and_targets

if TYPE_CHECKING:
    from cdetr_kernels.testing.machine_code import Audit, Audited

SIZES = {
    "set_loss": Sizes(
        smallest={"layers": 1, "queries": 2, "classes": 3, "counts": (1,)},
        small={"layers": 2, "queries": 37, "counts": (3, 1)},
        medium={"queries": 67, "counts": (13, 13, 13)},
        typical=[{"counts": (count,) * 8} for count in (7, 100)],
        called=[
            *({"counts": (count,) * 8} for count in (7, 100)),
            # Without auxiliary losses, or one image of all layers.
            *({"layers": 1, "counts": (count,) * 8} for count in (7, 100)),
        ],
    )
}


def make(
    dtype: torch.dtype,
    device: torch.device | str,
    layers: int = 6,
    queries: int = 300,
    classes: int = 91,
    counts: tuple[int, ...] = (20,) * 8,
) -> Case:
    """Make the predictions of all decoder layers, targets, and a matching of the first ones.

    Args:
        dtype: dtype of the predictions.
        device: Device of the inputs.
        layers: Decoder layers.
        queries: Queries.
        classes: Classes.
        counts: Targets of each image.
    """
    inputs = predictions_and_targets(dtype, device, layers, queries, classes, counts)
    inputs["matches"] = matches(layers, queries, counts).to(device)
    predictions = ("logits", "boxes_cxcywh")
    read = count_bytes(*inputs.values())
    return Case(
        "set_loss",
        f"L={layers} B={len(counts)} Q={queries} T={max(counts)} K={classes}",
        dtype,
        inputs,
        set_loss,
        {"num_boxes": float(max(1, sum(counts)))},
        lambda losses: [losses[name] for name in ("loss_ce", "loss_bbox", "loss_giou")],
        gradients=predictions,
        # The gradient of the logits can be made in the same pass; it is written once.
        bytes_moved=(read, read + count_bytes(*(inputs[name] for name in predictions))),
    )


def matches(layers: int, queries: int, counts: tuple[int, ...], seed: int = 0) -> Tensor:
    """Give each target a query of its own while there are any: int64 `[L, B, T]`, -1 for none."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.full((layers, len(counts), max(counts)), -1)
    for layer in range(layers):
        for image, count in enumerate(counts):
            pairs = min(queries, count)
            chosen = torch.randperm(count, generator=generator)[:pairs]
            found[layer, image, chosen] = torch.randperm(queries, generator=generator)[:pairs]
    return found


def audits() -> "list[Audit]":
    """Return the calls whose kernels are compiled: a training step with few and many targets."""
    from cdetr_kernels.testing.machine_code import Audit

    return [
        Audit(
            f"focal {precision} {targets}",
            functools.partial(_audited, dtype, targets),
            brief=precision == "half",
        )
        for precision, dtype in (("half", torch.bfloat16), ("single", torch.float32))
        for targets in (7, 100)
    ]


def _audited(dtype: torch.dtype, targets: int) -> "dict[str, Audited]":
    from cdetr_kernels.ops.set_loss import triton
    from cdetr_kernels.testing.machine_code import Audited

    case = make(dtype, "meta", counts=(targets,) * 8)
    logits, boxes, labels, wanted, counts, matched = case.inputs.values()
    boxes = boxes.float()  # they stay in fp32 under autocast
    saved = logits.float(), torch.empty(2, *boxes.shape, device="meta")
    partial = torch.empty(48, 19, 4, device="meta")
    losses, num_boxes = torch.empty(4, 6, device="meta"), torch.empty((), device="meta")
    forward = triton.forward_launch(
        logits, boxes, labels, wanted, matched, 0.25, 2.0, *saved, partial
    )
    return {
        # Rows of 91 classes and of 4 numbers: no loads of 16 bytes.
        "set_loss": Audited(forward),
        "set_loss_sum": Audited(triton.sum_launch(partial, counts, num_boxes, losses)),
        "set_loss_backward": Audited(
            triton.backward_launch(losses, *saved, num_boxes, logits, boxes),
            frozenset({"load16"}),
        ),
    }
