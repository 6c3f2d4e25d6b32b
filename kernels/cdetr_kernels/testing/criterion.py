"""Predictions and targets that matching and loss are tested and measured on."""

import math

import torch

from cdetr_kernels.testing.case import Inputs, RandomTensors


def predictions_and_targets(
    dtype: torch.dtype,
    device: torch.device | str,
    layers: int,
    queries: int,
    classes: int,
    counts: tuple[int, ...],
) -> Inputs:
    """Return the inputs of matching and loss by parameter name.

    Args:
        dtype: dtype of predictions; boxes of targets are fp32.
        device: Where they are.
        layers: Decoder layers.
        queries: Queries.
        classes: Classes.
        counts: Targets of each image. Boxes in the padding are NaN.
    """
    random = RandomTensors(device, torch.float32)
    batch, targets = len(counts), max(counts)
    inputs: Inputs = {
        "logits": (3 * random.normal(layers, batch, queries, classes)).to(dtype),
        "boxes_cxcywh": (random.uniform(layers, batch, queries, 4) * 0.5 + 0.2).to(dtype),
        "target_labels": random.integers(classes, batch, targets),
    }
    boxes = random.uniform(batch, targets, 4) * 0.5 + 0.2
    for image, count in enumerate(counts):
        boxes[image, count:] = math.nan
    inputs["target_boxes_cxcywh"] = boxes
    inputs["target_counts"] = torch.tensor(counts).to(device)
    return inputs
