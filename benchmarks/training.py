"""A training step: ours against transformers' model and loss in the same loop, one run.

    python -m benchmarks.training
    python -m benchmarks.training --device cuda --autocast bfloat16 --backbone resnet50

Whole step: forward with labels, backward, clipping, fused AdamW (at a learning rate of 0, which
takes as long and keeps the weights). Matching and loss: those of all decoder layers and their
gradients, on the model's outputs. Each decoder layer has a loss (`auxiliary_loss`), as in the
paper. Both models have the same weights, images and labels, and compute what transformers computes
(`compat="transformers"`); a row is printed only if losses and gradients agree. The row "paper" is
what a new model of this package does: stem and first stage of the backbone do not train. On a GPU
there is a row with forward and backward as CUDA graphs (`cdetr_fast/training/graphs.py`).

Dispatches and waits of the host are counted on a CPU as on a GPU (`cdetr_fast/models/counting.py`).
"""

import argparse
import contextlib
import copy
import sys
from collections.abc import Callable

import torch
import transformers
from torch import Tensor, nn
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss

import cdetr_fast
from benchmarks.measure import interleaved, print_table, save
from benchmarks.model import on_kernels
from benchmarks.timing import peak_mib
from cdetr_fast.loss.criterion import detection_loss
from cdetr_fast.models.counting import OperatorCounter, as_on_a_gpu
from cdetr_fast.training.graphs import use_graphs

THEIRS, OURS, PAPER = "transformers sdpa", "cdetr_fast", "cdetr_fast, paper"
GRAPHS = "cdetr_fast, CUDA graphs"
Labels = list[dict[str, Tensor]]


def make_models(backbone: str, layers: int, device: torch.device) -> dict[str, nn.Module]:
    """Returns the models, the first two with equal weights, in training mode without dropout."""
    settings = {"backbone": backbone, "num_labels": 91, "auxiliary_loss": True, "dropout": 0.0,
                "encoder_layers": layers, "decoder_layers": layers}  # fmt: skip
    torch.manual_seed(0)
    ours, paper = (
        cdetr_fast.ConditionalDetrForObjectDetection(
            cdetr_fast.ConditionalDetrConfig(**settings, compat=compat)
        )
        for compat in ("transformers", "paper")
    )
    their_config = transformers.ConditionalDetrConfig(**settings)
    their_config._attn_implementation = "sdpa"
    theirs = transformers.ConditionalDetrForObjectDetection(their_config)
    theirs.load_state_dict(ours.state_dict())
    models = {THEIRS: theirs, OURS: ours, PAPER: paper}
    return {name: model.to(device).train() for name, model in models.items()}


def make_batch(arguments: argparse.Namespace) -> tuple[Tensor, Tensor, Labels]:
    """Returns images of which all but the first are padded, their masks and labels."""
    device = torch.device(arguments.device)
    height, width = arguments.size
    count = arguments.targets
    pixel_values = torch.randn(arguments.batch, 3, height, width, device=device)
    pixel_mask = torch.ones(arguments.batch, height, width, dtype=torch.int64, device=device)
    pixel_mask[1:, height * 3 // 4 :] = 0
    labels = [
        {
            "class_labels": torch.randint(0, 91, (count,), device=device),
            "boxes": torch.rand(count, 4, device=device) * 0.5 + 0.2,
        }
        for _ in range(arguments.batch)
    ]
    return pixel_values, pixel_mask, labels


class Step:
    """A step of one model, in pieces that are timed and checked.

    Args:
        model: With its weights.
        call: What runs it: the model, or the model on other kernels.
        batch: Of `make_batch`.
        autocast: A dtype's name, or None.
    """

    def __init__(self, model: nn.Module, call: Callable, batch: tuple, autocast: str | None):
        self.model, self.call, self.batch = model, call, batch
        self.autocast = contextlib.nullcontext
        if autocast:
            device, dtype = batch[0].device.type, getattr(torch, autocast)
            self.autocast = lambda: torch.autocast(device, dtype)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, weight_decay=1e-4, fused=True)

    def backward(self) -> Tensor:
        """Forward with labels, and backward."""
        self.optimizer.zero_grad()
        pixel_values, pixel_mask, labels = self.batch
        with self.autocast():
            loss = self.call(pixel_values, pixel_mask, labels=labels).loss
        loss.backward()
        return loss

    def __call__(self) -> None:
        """The whole step."""
        self.backward()
        nn.utils.clip_grad_norm_(self.parameters, 0.1, foreach=True)
        self.optimizer.step()

    def counts(self) -> dict[str, int]:
        """Dispatches of forward and backward, and how often the host would wait for a GPU."""
        with as_on_a_gpu(), OperatorCounter() as counting:
            self.backward()
        return {
            "dispatches": counting.launches.total(),
            "host waits": counting.waits.total(),
            "copies to the device": counting.copies.total(),
        }

    def gradient(self) -> Tensor:
        """All gradients of the last `backward` in one vector, by the parameters' names."""
        by_name = dict(sorted(self.model.named_parameters()))
        return torch.cat([p.grad.flatten().float() for p in by_name.values() if p.grad is not None])


def graphed_step(model: nn.Module, batch: tuple, autocast: str | None) -> Step | None:
    """Returns the step of a copy of a model as CUDA graphs; None, with a message, if it fails."""
    model = copy.deepcopy(model)
    try:
        graphs = use_graphs(model, eager_first=0)
    except ValueError as error:
        print(f"{GRAPHS}: {error}", file=sys.stderr)
        return None
    step = Step(model, model, batch, autocast)
    step.backward()
    if graphs.table.failures:
        print(f"{GRAPHS}: {graphs.describe()}", file=sys.stderr)
        return None
    return step


class LossStep:
    """Matching, loss and its gradient on given outputs of all layers `[L, B, Q, ...]`."""

    def __init__(self, criterion: Callable, model: nn.Module, outputs: tuple, labels: Labels):
        self.criterion, self.config, self.labels = criterion, model.config, labels
        self.logits, self.boxes = outputs

    def __call__(self) -> tuple[Tensor, ...]:
        """Returns the loss and the gradients of logits and boxes."""
        logits, boxes = self.logits, self.boxes
        loss, _, _ = self.criterion(
            logits[-1], self.labels, logits.device, boxes[-1], self.config, logits, boxes
        )
        return loss, *torch.autograd.grad(loss, (logits, boxes))


def outputs_of(model: nn.Module, batch: tuple) -> tuple[Tensor, Tensor]:
    """Returns logits and boxes of all layers, as leaves."""
    pixel_values, pixel_mask, labels = batch
    with torch.no_grad():
        outputs = model(pixel_values, pixel_mask, labels=labels)
    layers = [*outputs.auxiliary_outputs, outputs]
    stacks = (torch.stack([one[name] for one in layers]) for name in ("logits", "pred_boxes"))
    return tuple(stack.detach().requires_grad_() for stack in stacks)


def relative(got: Tensor, expected: Tensor) -> float:
    """Returns the relative error of a tensor by its norm."""
    return ((got - expected).norm() / expected.norm()).item()


def step_rows(steps: dict[str, Step], repeats: int, autocast: str | None) -> list[dict]:
    """Measures whole steps; raises ValueError if the numbers disagree."""
    losses, gradients, peaks, counts = {}, {}, {}, {}
    for name, step in steps.items():
        step()  # the first one also allocates what stays
        peaks[name] = peak_mib(step, step.batch[0].device)
        counts[name] = step.counts()
        losses[name] = step.backward().item()
        gradients[name] = step.gradient() if name != PAPER else None
        step.optimizer.zero_grad()
    # Under autocast a match may fall out differently, so gradients are held to their size only.
    most_loss, most_gradient = (1e-4, 1e-3) if autocast is None else (5e-2, 0.5)
    errors = {}
    for name in steps:
        if name == PAPER:  # another loss, of other weights
            errors[name] = (None, None)
            continue
        error = abs(losses[name] / losses[THEIRS] - 1), relative(gradients[name], gradients[THEIRS])
        if not (error[0] <= most_loss and error[1] <= most_gradient):
            raise ValueError(f"{name} and {THEIRS} disagree, loss and gradients: {error}")
        errors[name] = error
    gradients.clear()
    times = interleaved(dict(steps), repeats, warmup=1)
    return [
        {
            "work": "whole step",
            "model": name,
            **timing,
            "speed-up": times[THEIRS]["ms"] / timing["ms"],
            "peak MiB": peaks[name],
            **counts[name],
            "loss error": errors[name][0],
            "gradient error": errors[name][1],
        }
        for name, timing in times.items()
    ]


def loss_rows(steps: dict[str, Step], repeats: int) -> list[dict]:
    """Measures matching and loss on the same outputs; raises ValueError if they disagree."""
    batch = steps[THEIRS].batch
    outputs = outputs_of(steps[OURS].model, batch)
    criteria = {THEIRS: DeformableDetrForObjectDetectionLoss, OURS: detection_loss}
    calls = {
        name: LossStep(criterion, steps[name].model, outputs, batch[2])
        for name, criterion in criteria.items()
    }
    expected, got = calls[THEIRS](), calls[OURS]()
    errors = [relative(a, b) for a, b in zip(got, expected, strict=True)]
    if not max(errors) <= 1e-4:
        raise ValueError(f"the losses disagree: loss and gradients {errors}")
    times = interleaved(dict(calls), repeats, warmup=1)
    return [
        {
            "work": "matching and loss",
            "model": name,
            **timing,
            "speed-up": times[THEIRS]["ms"] / timing["ms"],
            "loss error": errors[0],
            "gradient error": max(errors[1:]),
        }
        for name, timing in times.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 256), metavar=("H", "W"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--targets", type=int, default=20, help="objects in an image")
    parser.add_argument("--layers", type=int, default=6, help="of the encoder and the decoder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--autocast", choices=("bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", help="name of the file in benchmarks/results to write")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    batch = make_batch(arguments)
    models = make_models(arguments.backbone, arguments.layers, batch[0].device)
    calls = {**models, **on_kernels(models[OURS], batch[0])}
    steps = {
        name: Step(models[name.removesuffix(" triton")], call, batch, arguments.autocast)
        for name, call in calls.items()
    }
    status = 0
    if batch[0].device.type == "cuda":
        graphed = graphed_step(models[OURS], batch, arguments.autocast)
        if graphed is None:
            status = 1
        else:
            steps[GRAPHS] = graphed
    try:
        rows = [step_rows(steps, arguments.repeats, arguments.autocast)]
        rows.append(loss_rows(steps, arguments.repeats))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    rows = [[{**row, "threads": arguments.threads} for row in part] for part in rows]
    for part in rows:
        print_table(part)
    if arguments.output:
        print("written to", save(arguments.output, [row for part in rows for row in part]))
    return status


if __name__ == "__main__":
    sys.exit(main())
