"""transformers' Conditional DETR before and after `patch_transformers()`, on a CPU.

    python -m benchmarks patching --threads 2

A forward pass in eval mode, and a training step (forward, loss, backward), with each technique by
itself and all together. Applying the patch and undoing it, 1 ms, is in the time of every patched
call.
"""

import argparse
import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import nn

import cdetr_fast
from benchmarks.case import Case, Within, relative_difference
from benchmarks.inputs import model_pair, output_errors, random_images, random_labels
from cdetr_fast.models.counting import OperatorCounter

UNPATCHED, PATCHED = "transformers", "cdetr_fast, all"
OF_EVAL = ("attention", "position_codes", "batch_norm", "channels_last")
OF_TRAINING = (*OF_EVAL, "overflow_clamp", "losses")
LIMITS = {
    "max |dlogit|": 1e-3,
    "max box error, px": 0.1,
    "loss error": 1e-4,
    "gradient error": 1e-3,
}
LAYERS = ("encoder_layers", "decoder_layers")
BATCH, TARGETS = 4, 20


def add_options(parser: argparse.ArgumentParser) -> None:
    size: dict[str, Any] = {"type": int, "nargs": 2, "metavar": ("H", "W")}
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--size", default=(800, 1066), **size)
    parser.add_argument("--training-backbone", default="resnet18")
    parser.add_argument("--training-size", default=(320, 416), **size)
    parser.add_argument("--layers", type=int, default=6, help="of the encoder and the decoder")
    parser.set_defaults(repeats=7)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    settings: dict[str, Any] = {"num_labels": 91} | dict.fromkeys(LAYERS, options.layers)
    model, _ = model_pair(backbone=options.backbone, **settings)
    images = random_images(1, options.size)
    forward = torch.no_grad()(lambda: model(*images))
    yield case("forward", forward, OF_EVAL, options.size, "B=1")
    step = training_step(options.training_backbone, options.training_size, settings)
    shape = f"B={BATCH} padded T={TARGETS}"
    yield case("training step", step, OF_TRAINING, options.training_size, shape)


def training_step(
    backbone: str, size: tuple[int, int], settings: dict[str, Any]
) -> Callable[[], Any]:
    """Return a training step; its outputs also have all gradients in one vector."""
    torch.manual_seed(0)
    make_config: Any = transformers.ConditionalDetrConfig  # its fields come by inheritance
    config = make_config(backbone=backbone, auxiliary_loss=True, dropout=0.0, **settings)
    model = transformers.ConditionalDetrForObjectDetection(config).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                nn.init.uniform_(parameter, 0.5, 1.5)
    images = random_images(BATCH, size, padded=True)
    labels = random_labels(BATCH, TARGETS, model.device)

    def run() -> Any:
        model.zero_grad()
        output = model(*images, labels=labels)
        output.loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        output.gradient = torch.cat(gradients)
        return output

    return run


def case(
    work: str, run: Callable[[], Any], techniques: tuple[str, ...], size: tuple[int, int], more: str
) -> Case:
    """Compare a run without the patch, with each technique and with all."""
    names = (UNPATCHED, *techniques, PATCHED)

    def call(name: str) -> Any:
        with patched_by(name):
            return run()

    counts: dict[str, dict[str, int]] = {}

    def counted(name: str) -> Any:
        with patched_by(name), OperatorCounter() as counter:
            output = run()
        totals = counter.totals()
        counts[name] = {kind: totals[kind] for kind in ("dispatches", "waits")}
        return output

    def errors(got: Any, expected: Any) -> dict[str, float]:
        found = output_errors(size)(got, expected) | {"loss error": 0.0, "gradient error": 0.0}
        if got.loss is not None:
            found["loss error"] = abs(got.loss / expected.loss - 1).item()
            found["gradient error"] = relative_difference(got.gradient, expected.gradient)
        return found

    return Case(
        work=work,
        shape=f"{size[0]}x{size[1]} {more}",
        providers={name: functools.partial(call, name) for name in names},
        gate=Within(errors, LIMITS),
        result=counted,
        counts=counts.__getitem__,
    )


def patched_by(name: str) -> contextlib.AbstractContextManager:
    """Return the context of a provider: no patch, one technique or all."""
    if name == UNPATCHED:
        return contextlib.nullcontext()
    if name == PATCHED:
        return cdetr_fast.patch_transformers()
    switches = inspect.signature(cdetr_fast.patch_transformers).parameters
    return cdetr_fast.patch_transformers(**{switch: switch == name for switch in switches})
