"""Whole model at inference: ours against transformers', same weights, same inputs.

    python -m benchmarks model --threads 2
    python -m benchmarks model --threads 2 --steps --compile default max-autotune
    python -m benchmarks model --device cuda --dtype bfloat16 --batch 8

`--steps` adds what `optimize()` does with a row for each technique, each on top of those before it;
`--compile` adds transformers' model under torch.compile with a row for each mode; `--memory`
measures the peak memory of each row, on a CPU in a process of its own. Weights are random, those of
layer norms too, which takes the same time as trained ones.
"""

import argparse
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import cdetr_fast
from benchmarks.case import Case, Within
from benchmarks.inputs import (
    ERRORS,
    add_dtype_option,
    add_image_options,
    model_pair,
    output_errors,
    random_images,
)
from benchmarks.memory import peak_mib, peak_mib_of_process
from cdetr_fast.inference.backbone import FusedBackbone
from cdetr_fast.inference.convolution import FusedConv2d
from cdetr_fast.inference.linear import FusedLinear
from cdetr_fast.models.counting import OperatorCounter
from cdetr_kernels import dispatch, registry

REFERENCE = "transformers sdpa"


def add_options(parser: argparse.ArgumentParser) -> None:
    add_image_options(parser, (800, 1066), "resnet50")
    add_dtype_option(parser)
    parser.add_argument("--layers", type=int, default=6, help="of the encoder and the decoder")
    parser.add_argument("--dilation", action="store_true")
    parser.add_argument("--padded", action="store_true", help="pad all images but the first")
    parser.add_argument("--steps", action="store_true", help="add a row for each technique")
    parser.add_argument(
        "--compile", nargs="*", default=[], metavar="MODE", help="modes of torch.compile to try"
    )
    parser.add_argument("--memory", action="store_true", help="peak memory of each row")


def cases(options: argparse.Namespace) -> Iterator[Case]:
    models = Models(options)
    images = models.images()
    calls = {
        name: torch.no_grad()(functools.partial(models.make(name), *images))
        for name in models.names()
    }

    def counts(name: str) -> dict[str, int | None]:
        if " compile " in name:  # a compiled graph is not dispatched operator by operator
            return {"dispatches": None, "waits": None}
        with OperatorCounter() as counter:
            calls[name]()
        return {"dispatches": counter.dispatches.total(), "waits": counter.waits.total()}

    def memory(name: str) -> float | None:
        if models.device.type == "cuda":
            return peak_mib(calls[name], models.device)
        return peak_mib_of_process(_one_call, options, name)

    # In half precision transformers' boxes are off by pixels: logits alone say whether they agree.
    limits = (1e-3, 0.1) if options.dtype == "float32" else (0.5, float("inf"))
    yield Case(
        work="forward",
        shape=f"{options.backbone} {options.size[0]}x{options.size[1]} B={options.batch}"
        + (" padded" if options.padded else ""),
        dtype=options.dtype,
        device=models.device,
        providers=calls,
        reference=REFERENCE,
        gate=Within(output_errors(options.size), dict(zip(ERRORS, limits, strict=True))),
        optional=[name for name in calls if " compile " in name],
        warmup=1,
        derive=lambda row: {"images/s": 1e3 * options.batch / row["ms"]},
        counts=counts,
        memory=memory if options.memory else None,
    )


class Models:
    """The models by the name of their row, built on a device when they are asked for."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.dtype = getattr(torch, options.dtype)
        self._originals = functools.cache(model_pair)

    def names(self) -> list[str]:
        """Return the names of the rows that the options ask for."""
        rows = ["transformers eager", REFERENCE]
        rows += [f"{REFERENCE} compile {mode}" for mode in self.options.compile]
        if self.options.steps:
            rows.append(f"{REFERENCE} folded, channels-last")
        rows.append("cdetr_fast")
        if "triton" in registry.operator("conditional_attention").supported(self.images()[0]):
            rows.append("cdetr_fast triton")
        if self.options.steps:
            rows += ["+ norms folded", "+ fused convolutions", "+ constants, joint products"]
        return [*rows, "optimize(cdetr_fast)", "optimize(transformers)"]

    def make(self, name: str) -> Callable:
        """Build the model of a row."""
        theirs, ours = (
            copy.deepcopy(model).to(self.device, self.dtype)
            for model in self._originals(
                "eager" if name == "transformers eager" else "sdpa",
                backbone=self.options.backbone,
                encoder_layers=self.options.layers,
                decoder_layers=self.options.layers,
                dilation=self.options.dilation,
                num_labels=91,
            )
        )
        if name in ("transformers eager", REFERENCE):
            return theirs
        if " compile " in name:
            return torch.compile(theirs, mode=name.split()[-1])
        makers: dict[str, Callable[[], Callable]] = {
            f"{REFERENCE} folded, channels-last": lambda: _folded(theirs),
            "cdetr_fast": lambda: ours,
            "cdetr_fast triton": lambda: on_kernels(ours, self.images()[0])[name],
            "+ norms folded": lambda: _with_backbone(ours, fused=False),
            "+ fused convolutions": lambda: _with_backbone(ours, fused=True),
            "+ constants, joint products": lambda: _without_onednn(cdetr_fast.optimize(ours)),
            "optimize(cdetr_fast)": lambda: cdetr_fast.optimize(ours),
            "optimize(transformers)": lambda: cdetr_fast.optimize(theirs),
        }
        return makers[name]()

    def images(self) -> tuple[Tensor, Tensor]:
        """Return the arguments of the models."""
        options = self.options
        values, mask = random_images(options.batch, options.size, options.padded)
        return values.to(self.device, self.dtype), mask.to(self.device)


def on_kernels(model: nn.Module, like: Tensor) -> dict[str, Callable]:
    """Return the model on its triton kernels, which "auto" may not choose; none without a GPU."""
    if "triton" not in registry.operator("conditional_attention").supported(like):
        return {}

    def run(*arguments: Any, **options: Any) -> Any:
        with mock.patch.object(dispatch, "PREFERRED", "triton"):
            return model(*arguments, **options)

    return {"cdetr_fast triton": run}


def _folded(model: Any) -> Any:
    """Do what a user can do by hand: fold the frozen norms, and make the weights channels-last."""
    modules = dict(model.model.backbone.model.named_modules())
    previous: Any = None
    for name, module in list(modules.items()):
        if type(module).__name__ == "ConditionalDetrFrozenBatchNorm2d":
            conv = previous
            scale = module.weight * (module.running_var + 1e-5).rsqrt()
            conv.weight.data = conv.weight.data * scale[:, None, None, None]
            conv.bias = nn.Parameter(module.bias - module.running_mean * scale)
            parent, _, leaf = name.rpartition(".")
            setattr(modules[parent], leaf, nn.Identity())
        elif isinstance(module, nn.Conv2d):
            previous = module
    return model.to(memory_format=torch.channels_last)


def _with_backbone(model: Any, fused: bool) -> Any:
    """Give the drop-in the backbone of `optimize()`."""
    backbone = FusedBackbone(model.model.backbone.model)
    for module in backbone.modules():
        if isinstance(module, FusedConv2d) and not fused:
            module.implementation = "torch"
    model.model.backbone.model = backbone
    return model


def _without_onednn(model: Any) -> Any:
    for module in model.runner.prepared.modules():
        if isinstance(module, FusedLinear):
            module.implementation = "torch"
    return model


def _one_call(options: argparse.Namespace, name: str) -> Callable[[], Any]:
    """Return, for a process of its own, a call of a model that has been called before."""
    torch.set_num_threads(options.threads)
    models = Models(options)
    call = torch.no_grad()(functools.partial(models.make(name), *models.images()))
    call()
    return call
