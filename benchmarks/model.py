"""Whole model: ours against transformers', same weights, same inputs, one run.

    python -m benchmarks.model --threads 2
    python -m benchmarks.model --threads 2 --steps --compile default max-autotune
    python -m benchmarks.model --device cuda --dtype bfloat16 --batch 8

`--steps` adds what `optimize()` does one technique a row, each on top of those before it;
`--compile` adds transformers' model under torch.compile, one row a mode; `--memory` measures each
row's peak memory in a process of its own. Weights are random (layer norms too), which takes the
same time as trained ones. No row is reported unless all models agree.
"""

import argparse
import copy
import functools
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import cdetr_fast
from benchmarks.measure import interleaved, peak_memory, print_table, save
from cdetr_fast.inference.backbone import InferenceBackbone
from cdetr_fast.inference.convolution import FusedConv2d
from cdetr_fast.inference.linear import FusedLinear
from cdetr_kernels import dispatch, registry

REFERENCE = "transformers sdpa"


def make_models(backbone: str, implementation: str, dilation: bool):
    """Returns transformers' model and ours with equal weights, in eval mode."""
    settings = {"backbone": backbone, "dilation": dilation, "num_labels": 91}
    their_config = transformers.ConditionalDetrConfig(**settings)
    their_config._attn_implementation = implementation
    torch.manual_seed(0)
    theirs = transformers.ConditionalDetrForObjectDetection(their_config).eval()
    ours = cdetr_fast.ConditionalDetrForObjectDetection(
        cdetr_fast.ConditionalDetrConfig(**settings)
    ).eval()
    # Initial weights of the paper: transformers' make all queries alike, which hides differences.
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "norm" in name:
                nn.init.uniform_(parameter, 0.5, 1.5)
            elif "bbox_predictor.layers.2" in name:
                nn.init.normal_(parameter, std=0.05)
    theirs.load_state_dict(ours.state_dict())
    return theirs, ours


class Models:
    """The models by the name of their row, built on a device when they are asked for."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = torch.device(arguments.device)
        self.dtype = getattr(torch, arguments.dtype)
        self._originals = functools.cache(make_models)

    def names(self) -> list[str]:
        rows = ["transformers eager", REFERENCE]
        rows += [f"{REFERENCE} compile {mode}" for mode in self.arguments.compile]
        if self.arguments.steps:
            rows.append(f"{REFERENCE} folded, channels-last")
        rows.append("cdetr_fast")
        if "triton" in registry.operator("conditional_attention").supported(self.images()[0]):
            rows.append("cdetr_fast triton")
        if self.arguments.steps:
            rows += ["+ norms folded", "+ fused convolutions", "+ constants, joint products"]
        return [*rows, "optimize(cdetr_fast)", "optimize(transformers)"]

    def make(self, name: str) -> Callable:
        """Builds the model of a row."""
        implementation = "eager" if name == "transformers eager" else "sdpa"
        options = (self.arguments.backbone, implementation, self.arguments.dilation)
        theirs, ours = (
            copy.deepcopy(model).to(self.device, self.dtype) for model in self._originals(*options)
        )
        if name in ("transformers eager", REFERENCE):
            return theirs
        if name.startswith(f"{REFERENCE} compile "):
            return torch.compile(theirs, mode=name.split()[-1])
        makers = {
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

    def images(self) -> tuple[torch.Tensor, torch.Tensor]:
        height, width = self.arguments.size
        batch = self.arguments.batch
        pixel_values = torch.randn(
            batch, 3, height, width, generator=torch.Generator().manual_seed(0)
        )
        pixel_mask = torch.ones(batch, height, width, dtype=torch.int64, device=self.device)
        if self.arguments.padded:
            pixel_mask[1:, height * 3 // 4 :] = 0
        return pixel_values.to(self.device, self.dtype), pixel_mask


def _folded(model: nn.Module) -> nn.Module:
    """What a user can do by hand: fold the frozen norms, and lay the weights channels-last."""
    modules = dict(model.model.backbone.model.named_modules())
    previous = None
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


def _with_backbone(model: nn.Module, fused: bool) -> nn.Module:
    """The drop-in with the backbone of `optimize()`."""
    backbone = InferenceBackbone(model.model.backbone.model)
    for module in backbone.modules():
        if isinstance(module, FusedConv2d) and not fused:
            module.way = "plain"
    model.model.backbone.model = backbone
    return model


def _without_onednn(model: nn.Module) -> nn.Module:
    for module in model.runner.engine.modules():
        if isinstance(module, FusedLinear):
            module.way = "plain"
    return model


def on_kernels(model: nn.Module, like: torch.Tensor) -> dict[str, Callable]:
    """Returns the model on its triton kernels, which "auto" may hold back; none without a GPU."""
    if "triton" not in registry.operator("conditional_attention").supported(like):
        return {}

    def run(*arguments, **options):
        with mock.patch.object(dispatch, "PREFERRED", "triton"):
            return model(*arguments, **options)

    return {"cdetr_fast triton": run}


class Counter(TorchDispatchMode):
    """Counts the operators that torch dispatches, and those that wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.syncs = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.total += 1
        self.syncs += any(x in str(operator) for x in ("_local_scalar_dense", "nonzero"))
        return operator(*args, **(kwargs or {}))


@torch.no_grad()
def _counts(name: str, model: Callable, images: tuple) -> dict[str, int | None]:
    if " compile " in name:  # a compiled graph is not dispatched operator by operator
        return {"dispatches": None, "syncs": None}
    with Counter() as counter:
        model(*images)
    return {"dispatches": counter.total, "syncs": counter.syncs}


def _one_call(arguments: argparse.Namespace, name: str) -> Callable[[], Any]:
    """For a process of its own: a call of a model that has been called before."""
    torch.set_num_threads(arguments.threads)
    models = Models(arguments)
    model, images = models.make(name), models.images()
    with torch.no_grad():
        model(*images)

    def call() -> None:
        with torch.no_grad():
            model(*images)

    return call


def _peak(arguments: argparse.Namespace, name: str, call: Callable, device: torch.device) -> float:
    """Peak memory that a call adds, in MiB."""
    if device.type != "cuda":
        return peak_memory(_one_call, arguments, name)["peak_mib"]
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.model", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--dilation", action="store_true")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1066), metavar=("H", "W"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--padded", action="store_true", help="pad all images but the first")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--steps", action="store_true", help="one row for each technique")
    parser.add_argument(
        "--compile", nargs="*", default=[], metavar="MODE", help="modes of torch.compile to try"
    )
    parser.add_argument("--memory", action="store_true", help="peak memory of each row")
    parser.add_argument("--output", help="name of the file in benchmarks/results to write")
    return parser.parse_args()


def main() -> int:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    models = Models(arguments)
    images = models.images()
    made = {name: models.make(name) for name in models.names()}
    with torch.no_grad():
        outputs = {name: model(*images) for name, model in made.items()}
        calls = {name: functools.partial(model, *images) for name, model in made.items()}
        times = interleaved(calls, arguments.repeats)
    reference = outputs[REFERENCE]
    # In half precision transformers' boxes are off by pixels: logits alone say whether they agree.
    most = {"float32": (1e-3, 0.1)}.get(arguments.dtype, (0.5, float("inf")))
    rows = []
    for name, timing in times.items():
        logits = (outputs[name].logits - reference.logits).abs().max().item()
        boxes = (outputs[name].pred_boxes - reference.pred_boxes).abs().max().item()
        row = {
            "model": name,
            **timing,
            "images/s": 1e3 * arguments.batch / timing["ms"],
            "speed-up": times[REFERENCE]["ms"] / timing["ms"],
            "max |dlogit|": logits,
            "max box error, px": boxes * max(arguments.size),
            **_counts(name, made[name], images),
        }
        if arguments.memory:
            with torch.no_grad():
                row["peak MiB"] = _peak(arguments, name, calls[name], models.device)
        rows.append(row)
    print_table(rows)
    if any(row["max |dlogit|"] > most[0] or row["max box error, px"] > most[1] for row in rows):
        print("the models disagree: no speed-up is reported", file=sys.stderr)
        return 1
    if arguments.output:
        print("written to", save(arguments.output, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
