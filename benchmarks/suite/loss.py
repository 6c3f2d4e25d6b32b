"""Matching and loss, forward and backward: ours against transformers'.

    python -m benchmarks loss --threads 2
    python -m benchmarks loss --device cuda

Six decoder layers, 300 queries, 91 classes, random outputs.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss

import cdetr_fast
from benchmarks.case import Case, Within, relative_difference
from benchmarks.inputs import Labels, random_labels
from cdetr_fast.loss.criterion import detection_loss

LAYERS, QUERIES, CLASSES = 6, 300, 91
LIMITS = {"loss error": 1e-4, "gradient error": 1e-4}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--targets", type=int, nargs="+", default=(7, 100), help="per image")
    parser.set_defaults(repeats=5)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    device = torch.device(options.device)
    config = cdetr_fast.ConditionalDetrConfig(
        num_labels=CLASSES, auxiliary_loss=True, compat="transformers"
    )
    generator = torch.Generator().manual_seed(0)
    shape = (LAYERS, options.batch, QUERIES)
    logits = torch.randn(*shape, CLASSES, generator=generator).to(device).requires_grad_()
    boxes = (torch.rand(*shape, 4, generator=generator) * 0.5 + 0.2).to(device).requires_grad_()
    for targets in options.targets:
        labels = random_labels(options.batch, targets, device)
        yield case(config, logits, boxes, labels)


def case(config: Any, logits: Tensor, boxes: Tensor, labels: Labels) -> Case:
    """Compare the losses of outputs of all layers `[L, B, Q, ...]`, which need gradients."""

    def step(criterion: Callable) -> tuple[Tensor, ...]:
        loss, _, _ = criterion(logits[-1], labels, logits.device, boxes[-1], config, logits, boxes)
        return loss, *torch.autograd.grad(loss, (logits, boxes))

    layers, batch, queries = logits.shape[:3]
    targets = len(labels[0]["boxes"])
    return Case(
        work="matching and loss",
        shape=f"L={layers} B={batch} Q={queries} T={targets}",
        providers={
            "transformers": lambda: step(DeformableDetrForObjectDetectionLoss),
            "cdetr_fast": lambda: step(detection_loss),
        },
        gate=Within(_errors, LIMITS),
        device=logits.device,
        columns={"targets": targets},
    )


def _errors(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> dict[str, float]:
    loss, *gradients = (relative_difference(a, b) for a, b in zip(got, expected, strict=True))
    return {"loss error": loss, "gradient error": max(gradients)}
