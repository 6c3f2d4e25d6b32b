"""Time of the optimised model, part by part, beside what this machine could do at best.

    python -m benchmarks stages --threads 2
    python -m benchmarks stages --threads 2 --operators   # and torch.profiler's table
    python -m benchmarks stages --device cuda --dtype bfloat16

The roofline of a part is the longer of two times: its counted products at the rate of a large
matrix product, and its counted bytes (weights, inputs and outputs of each operator, once) at the
rate of a large copy, both measured here in the same dtype. With one thread times are processor
time. The model is first checked against the one that it was made from.
"""

import argparse
import collections
import dataclasses
import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

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
from benchmarks.results import Row
from benchmarks.timing import (
    call_times,
    copied_bytes_per_second,
    multiplied_flops_per_second,
    now,
    summarised,
)
from cdetr_fast.inference.convolution import FusedConv2d
from cdetr_fast.inference.linear import FusedLinear
from cdetr_fast.inference.prepare import PreparedModel

BLOCK = re.compile(r"(?:layer|stages|blocks)_?(\d+)")
NAMES = {
    "backbone": "backbone: the rest",
    "encoder": "encoder: attention",
    "decoder": "decoder: attention and the rest",
    "box head": "box head: the rest",
}
SUMMED = ("ms", "share", "GFLOP", "MB", "roofline, ms")


def add_options(parser: argparse.ArgumentParser) -> None:
    add_image_options(parser, (800, 1066), "resnet50")
    add_dtype_option(parser)
    parser.add_argument("--operators", action="store_true", help="torch.profiler's table as well")


def cases(options: argparse.Namespace) -> Iterator[Case]:
    dtype = getattr(torch, options.dtype)
    _, model = model_pair(backbone=options.backbone, num_labels=91)
    pixel_values, _ = random_images(options.batch, options.size)
    with torch.inference_mode():
        expected = model(pixel_values)
    fast = cdetr_fast.optimize(model, dtype=dtype, device=options.device, cuda_graphs=False)
    pixel_values = pixel_values.to(options.device, dtype)
    if options.operators:
        print_operators(fast, pixel_values)
    limits = (1e-3, 0.1) if options.dtype == "float32" else (0.5, float("inf"))
    errors = output_errors(options.size)
    yield Stages(
        work="forward",
        shape=f"{options.backbone} {options.size[0]}x{options.size[1]} B={options.batch}",
        dtype=options.dtype,
        device=pixel_values.device,
        providers={"optimize(cdetr_fast)": lambda: fast(pixel_values)},
        gate=Within(lambda got, _: errors(got, expected), dict(zip(ERRORS, limits, strict=True))),
        model=fast,
        pixel_values=pixel_values,
    )


def print_operators(model: Any, pixel_values: Tensor) -> None:
    """Print torch.profiler's table of a call."""
    with torch.inference_mode():
        model(pixel_values)
        with torch.profiler.profile() as profile:
            model(pixel_values)
    order = f"self_{'device' if pixel_values.is_cuda else 'cpu'}_time_total"
    print(profile.key_averages().table(sort_by=order, row_limit=15))


class Work(NamedTuple):
    """Least work of an operator: products (counted twice, as additions too) and bytes."""

    flops: float = 0.0
    bytes: float = 0.0


def size_of(*tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def work_of(module: nn.Module, inputs: tuple, output: Tensor) -> Work:
    """Count a convolution, a linear layer or a norm."""
    moved = size_of(*inputs, output)
    if not isinstance(module, (FusedConv2d, FusedLinear)):
        return Work(0.0, moved)
    products = output.numel() * module.weight[0].numel()
    return Work(2 * products, moved + size_of(module.weight))


class Clock:
    """Measures the parts of a prepared detection model while it is called.

    Args:
        prepared: Gets hooks on its parts.
    """

    def __init__(self, prepared: PreparedModel) -> None:
        self.device = prepared.device
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self.works: dict[str, Work] = collections.defaultdict(Work)
        self._starts: list[float] = []
        base, detector = prepared.base, prepared.detector
        assert detector is not None, "expected a detection model"
        containers = {
            "backbone": base.backbone,
            "encoder": base.encoder,
            "decoder": base.decoder,
            "box head": detector.bbox_predictor,
        }
        for part, container in containers.items():
            self._watch(container, part, None)
            for name, module in container.named_modules():
                if isinstance(module, FusedConv2d):
                    block = BLOCK.search(name)
                    self._watch(module, f"stage {block[1]}" if block else "stem", part)
                elif isinstance(module, FusedLinear):
                    self._watch(module, f"{part}: linear layers", part)
                elif isinstance(module, (nn.LayerNorm, nn.MaxPool2d)):
                    self._watch(module, f"{part}: {type(module).__name__}", part)
        self._watch(base.input_projection, "input projection", None)
        self._watch(detector.class_labels_classifier, "class head", None)

    def reset(self) -> None:
        self.seconds.clear()
        self.works.clear()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return now()

    def _watch(self, module: nn.Module, stage: str, within: str | None) -> None:
        def before(*_: Any) -> None:
            self._starts.append(self._now())

        def after(module: nn.Module, inputs: tuple, output: Any) -> None:
            seconds = self._now() - self._starts.pop()
            self.seconds[stage] += seconds
            if within is not None:  # what remains of the container has no name of its own
                self.seconds[within] -= seconds
            if isinstance(output, Tensor) and stage not in NAMES:
                done, work = self.works[stage], work_of(module, inputs, output)
                self.works[stage] = Work(done.flops + work.flops, done.bytes + work.bytes)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)


def attention_works(config: Any, batch: int, size: tuple[int, int], itemsize: int) -> dict:
    """Count the products of attention, which no module stands for."""
    height, width = size
    positions, channels, queries = height * width, config.d_model, config.num_queries
    layers = config.decoder_layers
    encoder = config.encoder_layers * 4 * positions**2 * channels
    decoder = layers * (4 * positions + 2 * (height + width)) * queries * channels
    decoder += (layers - 1) * 4 * queries**2 * channels
    moved = channels * itemsize * batch
    decoder_rows = layers * (3 * queries + 2 * positions) + (layers - 1) * 4 * queries
    return {
        "encoder": Work(batch * encoder, config.encoder_layers * 4 * positions * moved),
        "decoder": Work(batch * decoder, decoder_rows * moved),
    }


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the best rate of a large product, in FLOP/s: torch's, or a packed linear layer's."""
    weights = nn.Linear(1024, 1024, device=device, dtype=dtype)
    layer = FusedLinear(weights.weight, weights.bias)
    x = torch.randn(1, 1024, 1024, device=device).to(dtype)
    with torch.inference_mode():
        ms = call_times(lambda: layer(x), device, repeats=20, seconds=2.0)["min_ms"]
    return max(multiplied_flops_per_second(device, dtype), 2 * 1024**3 / (1e-3 * ms))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stages(Case):
    """The parts of one model: a row for each, and one for all of them.

    Args:
        model: Of `optimize`.
        pixel_values: Its input.
    """

    model: Any
    pixel_values: Tensor

    def measure(self, repeats: int) -> list[Row]:
        """Check the model, then time its parts."""
        rows = {name: self._named(name) for name in self.providers}
        self._check(rows)
        (whole,) = rows.values()
        if self.failures([whole]):
            return [whole]
        prepared = self.model.runner.prepared
        clock = Clock(prepared)
        times: dict[str, list[float]] = collections.defaultdict(list)
        with torch.inference_mode():
            for call in range(2 + repeats):
                clock.reset()
                prepared(self.pixel_values, None)  # the model would see the hooks, and run itself
                if call >= 2:
                    for stage, seconds in clock.seconds.items():
                        times[stage].append(1e3 * seconds)
            works = dict(clock.works)
            size = prepared.base.backbone.model(self.pixel_values)[-1].shape[-2:]
        itemsize = self.pixel_values.element_size()
        works |= attention_works(self.model.config, len(self.pixel_values), tuple(size), itemsize)
        return self._rows(
            whole, {stage: summarised(taken) for stage, taken in times.items()}, works
        )

    def _rows(self, whole: Row, times: dict[str, dict], works: dict[str, Work]) -> list[Row]:
        flops = product_rate(self.device, self.pixel_values.dtype)
        rate = copied_bytes_per_second(self.device)
        total = sum(taken["ms"] for taken in times.values())
        rows = []
        for stage, taken in sorted(times.items(), key=lambda item: -item[1]["ms"]):
            work = works.get(stage, Work())
            by_flops, by_bytes = 1e3 * work.flops / flops, 1e3 * work.bytes / rate
            columns = {
                "stage": NAMES.get(stage, stage),
                **taken,
                "share": taken["ms"] / total,
                "GFLOP": work.flops / 1e9,
                "MB": work.bytes / 1e6,
                "roofline, ms": max(by_flops, by_bytes),
                "bound by": "products" if by_flops > by_bytes else "memory",
                "of the roofline": max(by_flops, by_bytes) / taken["ms"],
            }
            rows.append(whole | columns)
        summed = {key: sum(row[key] for row in rows) for key in SUMMED}
        rates = {"GFLOP/s of products": flops / 1e9, "GB/s of copies": rate / 1e9}
        share = summed["roofline, ms"] / summed["ms"]
        rows.append(whole | {"stage": "all", **summed, "of the roofline": share, **rates})
        return rows
