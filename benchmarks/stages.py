"""Where the time of the optimised model goes, stage by stage, beside what this machine could do.

    python -m benchmarks.stages --threads 2
    python -m benchmarks.stages --threads 2 --operators   # and torch.profiler's table
    python -m benchmarks.stages --device cuda --dtype bfloat16

A stage's roofline is the longer of two times: its counted products at the rate of a large matrix
product, and its counted bytes (weights, inputs and outputs of each operator, once) at the rate of a
large copy, both measured here in the same dtype. With one thread times are processor time.
"""

import argparse
import collections
import re
import statistics
import sys
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import cdetr_fast
from benchmarks.measure import print_table, save
from benchmarks.model import make_models
from benchmarks.timing import call_times, copied_bytes_per_second, multiplied_flops_per_second, now
from cdetr_fast.inference.convolution import FusedConv2d
from cdetr_fast.inference.engine import Engine
from cdetr_fast.inference.linear import FusedLinear

_BLOCK = re.compile(r"(?:layer|stages|blocks)_?(\d+)")


class Work(NamedTuple):
    """What an operator does at least: products (counted twice, as additions too) and bytes."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":  # type: ignore[override]
        return Work(self.flops + other.flops, self.bytes + other.bytes)


def size_of(*tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def work_of(module: nn.Module, inputs: tuple, output: Tensor) -> Work:
    """Counts a convolution, a linear layer or a norm."""
    moved = size_of(*inputs, output)
    if not isinstance(module, (FusedConv2d, FusedLinear)):
        return Work(0.0, moved)
    products = output.numel() * module.weight[0].numel()
    return Work(2 * products, moved + size_of(module.weight))


class Clock:
    """Measures an engine's stages in calls.

    Args:
        engine: Gets hooks on its parts.
    """

    def __init__(self, engine: Engine) -> None:
        self.device = engine.device
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self.works: dict[str, Work] = collections.defaultdict(Work)
        self._starts: list[float] = []
        for part in ("backbone", "encoder", "decoder", "heads"):
            container = getattr(engine, part)
            self._watch(container, part, None)
            for name, module in container.named_modules():
                if isinstance(module, FusedConv2d):
                    block = _BLOCK.search(name)
                    self._watch(module, f"stage {block[1]}" if block else "stem", part)
                elif isinstance(module, FusedLinear):
                    self._watch(module, f"{part}: linear layers", part)
                elif isinstance(module, (nn.LayerNorm, nn.MaxPool2d)):
                    self._watch(module, f"{part}: {type(module).__name__}", part)
        self._watch(engine.input_projection, "input projection", None)

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
            if within is not None:  # what is left of the container is what has no name of its own
                self.seconds[within] -= seconds
            if isinstance(output, Tensor) and stage not in ("backbone", "encoder", "decoder"):
                self.works[stage] += work_of(module, inputs, output)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)


def attention_works(model: Any, batch: int, size: tuple[int, int], itemsize: int) -> dict:
    """Counts the products of attention, which no module stands for."""
    config = model.config
    height, width = size
    positions, channels, queries = height * width, config.d_model, config.num_queries
    layers = config.decoder_layers
    encoder = config.encoder_layers * 4 * positions**2 * channels
    decoder = layers * (4 * positions + 2 * (height + width)) * queries * channels
    decoder += (layers - 1) * 4 * queries**2 * channels
    moved = channels * itemsize * batch
    return {
        "encoder": Work(batch * encoder, config.encoder_layers * 4 * positions * moved),
        "decoder": Work(
            batch * decoder,
            (layers * (3 * queries + 2 * positions) + (layers - 1) * 4 * queries) * moved,
        ),
    }


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """The best rate of a large product, in FLOP/s: torch's, or that of a packed linear layer."""
    layer = FusedLinear(nn.Linear(1024, 1024, device=device, dtype=dtype))
    x = torch.randn(1, 1024, 1024, device=device).to(dtype)
    with torch.inference_mode():
        ms = call_times(lambda: layer(x), device, repeats=20, seconds=2.0)["p10"]
    return max(multiplied_flops_per_second(device, dtype), 2 * 1024**3 / (1e-3 * ms))


def measure(model: Any, pixel_values: Tensor, repeats: int) -> list[dict[str, Any]]:
    """One row a stage, and one for all of them."""
    engine = model.runner.engine
    clock = Clock(engine)
    times: dict[str, list[float]] = collections.defaultdict(list)
    with torch.inference_mode():
        for call in range(2 + repeats):
            clock.reset()
            engine(pixel_values, None)  # the model would see the hooks, and run itself
            if call >= 2:
                for stage, seconds in clock.seconds.items():
                    times[stage].append(seconds)
        works = dict(clock.works)
        size = engine.backbone(pixel_values)[-1].shape[-2:]
    itemsize = pixel_values.element_size()
    works |= attention_works(model, len(pixel_values), tuple(size), itemsize)
    flops = product_rate(engine.device, pixel_values.dtype)
    rate = copied_bytes_per_second(engine.device)
    names = {
        "backbone": "backbone: the rest",
        "encoder": "encoder: attention",
        "decoder": "decoder: attention and the rest",
        "heads": "heads: the rest",
    }
    rows = []
    total = sum(statistics.median(values) for values in times.values())
    for stage, values in times.items():
        work, ms = works.get(stage, Work()), 1e3 * statistics.median(values)
        by_flops, by_bytes = 1e3 * work.flops / flops, 1e3 * work.bytes / rate
        rows.append(
            {
                "stage": names.get(stage, stage),
                "ms": ms,
                "share": 1e-3 * ms / total,
                "GFLOP": work.flops / 1e9,
                "MB": work.bytes / 1e6,
                "roofline, ms": max(by_flops, by_bytes),
                "bound by": "products" if by_flops > by_bytes else "memory",
                "of the roofline": max(by_flops, by_bytes) / ms,
            }
        )
    rows.sort(key=lambda row: -row["ms"])
    summed = {key: sum(r[key] for r in rows) for key in ("ms", "share", "GFLOP", "MB")}
    floor = sum(row["roofline, ms"] for row in rows)
    rows.append(
        {"stage": "all", **summed, "roofline, ms": floor, "bound by": "",
         "of the roofline": floor / summed["ms"]}
    )  # fmt: skip
    rows[-1] |= {"GFLOP/s of products": flops / 1e9, "GB/s of copies": rate / 1e9}
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stages", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1066), metavar=("H", "W"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--operators", action="store_true", help="torch.profiler's table as well")
    parser.add_argument("--output", help="name of the file in benchmarks/results to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    _, ours = make_models(options.backbone, "sdpa", dilation=False)
    settings = {"dtype": dtype, "device": options.device, "cuda_graphs": False}
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(options.batch, 3, *options.size, generator=generator)
    pixel_values = pixel_values.to(options.device, dtype)
    if options.operators:
        model = cdetr_fast.optimize(ours, **settings)
        with torch.inference_mode():
            model(pixel_values)
            with torch.profiler.profile() as profile:
                model(pixel_values)
        on_a_gpu = pixel_values.is_cuda
        order = "self_device_time_total" if on_a_gpu else "self_cpu_time_total"
        print(profile.key_averages().table(sort_by=order, row_limit=15))
    rows = measure(cdetr_fast.optimize(ours, **settings), pixel_values, options.repeats)
    print(
        "products {GFLOP/s of products:.0f} GFLOP/s, copies {GB/s of copies:.1f} GB/s".format(
            **rows[-1]
        )
    )
    print_table([*rows[:-1], {key: rows[-1][key] for key in rows[0]}])
    if options.output:
        print("written to", save(options.output, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
