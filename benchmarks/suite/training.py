"""Training step: ours against transformers' model and loss in the same loop.

    python -m benchmarks training
    python -m benchmarks training --precision fp32 bf16
    python -m benchmarks training --device cuda --precision bf16 --backbone resnet50

Whole step: forward with labels, backward, clipping, fused AdamW (at a learning rate of 0, which
takes as long and keeps the weights). Matching and loss: those of all decoder layers and their
gradients, on the model's outputs. Each decoder layer has a loss (`auxiliary_loss`), as in the
paper. Both models have the same weights, images and labels, and compute what transformers computes
(`compat="transformers"`). The row "paper" is what a new model of this package does: stem and first
stage of the backbone do not train. On a GPU there is a row with forward and backward as CUDA
graphs (`cdetr_fast/training/graphs.py`).

Launches and waits of the host are counted on a CPU as on a GPU (`cdetr_fast/models/counting.py`).
"""

import argparse
import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import cdetr_fast
from benchmarks.case import Case, GateFailed, relative_difference
from benchmarks.inputs import (
    Labels,
    add_image_options,
    model_pair,
    random_images,
    random_labels,
)
from benchmarks.memory import peak_mib
from benchmarks.suite import loss
from benchmarks.suite.model import REFERENCE, on_kernels
from cdetr_fast.models.counting import OperatorCounter, as_on_a_gpu
from cdetr_fast.training.graphs import use_graphs

AUTOCAST = {"fp32": None, "bf16": "bfloat16", "fp16": "float16"}
OURS, PAPER, GRAPHS = "cdetr_fast", "cdetr_fast, paper", "cdetr_fast, CUDA graphs"
Batch = tuple[Tensor, Tensor, Labels]


def add_options(parser: argparse.ArgumentParser) -> None:
    add_image_options(parser, (256, 256), "resnet18")
    parser.add_argument("--targets", type=int, default=20, help="objects per image")
    parser.add_argument("--layers", type=int, default=6, help="of the encoder and the decoder")
    parser.add_argument(
        "--precision", nargs="+", choices=AUTOCAST, default=["fp32"],
        help="autocast of all models; several are measured in turns, against the first",
    )  # fmt: skip
    parser.set_defaults(batch=8, repeats=7)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    device, (height, width) = torch.device(options.device), options.size
    values, mask = random_images(options.batch, options.size, padded=True)
    labels = random_labels(options.batch, options.targets, device)
    batch = values.to(device), mask.to(device), labels
    models = make_models(options.backbone, options.layers, device)
    steps: dict[str, Step] = {}
    autocasts: dict[str, str | None] = {}
    for precision in dict.fromkeys(options.precision):
        autocast = AUTOCAST[precision]
        own = {name: Step(model, model, batch, autocast) for name, model in models.items()}
        for name, run in on_kernels(models[OURS], batch[0]).items():
            own[name] = Step(models[OURS], run, batch, autocast)
        if device.type == "cuda":
            own[GRAPHS] = GraphedStep(models[OURS], batch, autocast)
        # One precision stands in the column of the dtype; several are told apart by the name.
        suffix = f" {precision}" if len(set(options.precision)) > 1 else ""
        steps |= {name + suffix: step for name, step in own.items()}
        autocasts |= {name + suffix: autocast for name in own}
    is_one = len(set(options.precision)) == 1
    columns = {"threads": options.threads, "targets": options.targets}
    yield Case(
        work="whole step",
        shape=f"{options.backbone} {height}x{width} B={options.batch} T={options.targets}",
        dtype=(AUTOCAST[options.precision[0]] or "float32") if is_one else "as named",
        device=device,
        providers=steps,
        result=lambda name: steps[name].checked(),
        gate=lambda name, *given: _gate(autocasts[name], name, *given),
        counts=lambda name: steps[name].counts(),
        memory=(lambda name: peak_mib(steps[name], device)) if device.type == "cuda" else None,
        columns=columns,
    )
    outputs = outputs_of(models[OURS], batch)
    case = loss.case(models[OURS].config, *outputs, labels)
    yield dataclasses.replace(case, columns={**case.columns, "threads": options.threads})


def make_models(backbone: str, layers: int, device: torch.device) -> dict[str, nn.Module]:
    """Return the models in training mode without dropout, the first two with equal weights."""
    settings: dict[str, Any] = {
        "backbone": backbone,
        "num_labels": 91,
        "auxiliary_loss": True,
        "dropout": 0.0,
        "encoder_layers": layers,
        "decoder_layers": layers,
    }
    theirs, ours = model_pair(compat="transformers", **settings)
    config = cdetr_fast.ConditionalDetrConfig(**settings, compat="paper")
    paper = cdetr_fast.ConditionalDetrForObjectDetection(config)
    models = {REFERENCE: theirs, OURS: ours, PAPER: paper}
    return {name: model.to(device).train() for name, model in models.items()}


class Step:
    """A step of one model, in pieces that are timed and checked.

    Args:
        model: With its weights.
        call: What runs it: the model, or the model on other kernels.
        batch: Images, mask and labels.
        autocast: Name of a dtype, or None.
    """

    def __init__(
        self, model: nn.Module, call: Callable, batch: Batch, autocast: str | None
    ) -> None:
        self.model, self.call, self.batch = model, call, batch
        self.autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
        if autocast:
            device, dtype = batch[0].device.type, getattr(torch, autocast)
            self.autocast = lambda: torch.autocast(device, dtype)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, weight_decay=1e-4, fused=True)

    def backward(self) -> Tensor:
        """Run forward with labels, and backward."""
        self.optimizer.zero_grad()
        pixel_values, pixel_mask, labels = self.batch
        with self.autocast():
            loss = self.call(pixel_values, pixel_mask, labels=labels).loss
        loss.backward()
        return loss

    def __call__(self) -> None:
        """Run the whole step."""
        self.backward()
        nn.utils.clip_grad_norm_(self.parameters, 0.1, foreach=True)
        self.optimizer.step()

    def checked(self) -> tuple[Tensor, Tensor]:
        """Return loss and gradients of a step after the first, which allocates what stays."""
        self()
        loss = self.backward().detach()
        gradient = self.gradient()
        self.optimizer.zero_grad()
        return loss, gradient

    def counts(self) -> dict[str, int]:
        """Count the operators of forward and backward, and what makes the host wait for a GPU."""
        with as_on_a_gpu(), OperatorCounter() as counter:
            self.backward()
        return counter.totals()

    def gradient(self) -> Tensor:
        """Return all gradients of the last `backward` in one vector, by the parameters' names."""
        by_name = dict(sorted(self.model.named_parameters()))
        return torch.cat([p.grad.flatten().float() for p in by_name.values() if p.grad is not None])


class GraphedStep(Step):
    """The step of a copy of a model as CUDA graphs, which are captured by the first `checked`.

    Raises:
        ValueError: By the constructor, for a model that cannot be captured.
        RuntimeError: By `checked`, with the reason why the capture failed.
    """

    def __init__(self, model: nn.Module, batch: Batch, autocast: str | None) -> None:
        graphed: Any = copy.deepcopy(model)
        self.graphs = use_graphs(graphed, eager_first=0)
        super().__init__(graphed, graphed, batch, autocast)

    def checked(self) -> tuple[Tensor, Tensor]:
        found = super().checked()
        if self.graphs.table.failures:
            raise RuntimeError(str(self.graphs.describe()))
        return found


def _gate(autocast: str | None, provider: str, got: Any, expected: Any) -> dict[str, float | None]:
    if provider.startswith(PAPER):  # other weights: nothing to compare with
        if not got[0].isfinite():
            raise GateFailed(f"the loss is {got[0].item()}")
        return {"loss error": None, "gradient error": None}
    # Under autocast a match may come out differently, so gradients are held to their size only.
    limits = (1e-4, 1e-3) if autocast is None else (5e-2, 0.5)
    errors = abs(got[0] / expected[0] - 1).item(), relative_difference(got[1], expected[1])
    names = ("loss error", "gradient error")
    if not all(error <= limit for error, limit in zip(errors, limits, strict=True)):
        raise GateFailed(f"loss and gradients differ by {errors}, expected at most {limits}")
    return dict(zip(names, errors, strict=True))


def outputs_of(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return logits and boxes of all layers, as leaves."""
    pixel_values, pixel_mask, labels = batch
    with torch.no_grad():
        outputs = model(pixel_values, pixel_mask, labels=labels)
    layers = [*outputs.auxiliary_outputs, outputs]
    logits, boxes = (
        torch.stack([one[name] for one in layers]).detach().requires_grad_()
        for name in ("logits", "pred_boxes")
    )
    return logits, boxes
