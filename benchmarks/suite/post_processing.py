"""Segmentation post-processing on a CPU: time and peak memory against transformers'.

    python -m benchmarks post_processing --size 480 640 --kept 30

All read the same outputs. With `compat="transformers"` maps and segments have to be the same; the
paper's keep other queries, so of those nothing is compared but their form. Peak memory is measured
in a process for each.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Case, GateFailed
from benchmarks.memory import peak_mib_of_process

TASKS = ("instance", "panoptic", "semantic")
PAPER = "cdetr_fast"
PROVIDERS = ("transformers", "cdetr_fast, its numbers", PAPER)
Segments = dict[str, Any] | Tensor


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=int, nargs=2, default=[480, 640], metavar=("H", "W"))
    parser.add_argument("--input", type=int, nargs=2, default=[800, 1066], metavar=("H", "W"))
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--classes", type=int, default=91)
    parser.add_argument("--kept", type=int, default=30, help="queries above the threshold")
    parser.set_defaults(repeats=9)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    height, width = options.size
    settings = (*options.input, options.queries, options.classes, options.kept)
    for task in TASKS:
        common = (task, (height, width), settings, options.threads)
        yield Case(
            work=task,
            shape=f"{height}x{width} Q={options.queries} K={options.classes}",
            providers={name: make_call(name, *common) for name in PROVIDERS},
            gate=equal_segments,
            memory=functools.partial(_peak, common),
            columns={"kept": options.kept},
            warmup=1,
        )


def _peak(common: tuple[Any, ...], provider: str) -> float:
    return peak_mib_of_process(make_call, provider, *common)


def equal_segments(provider: str, got: Segments, expected: Segments) -> dict[str, float]:
    """Return how many pixels differ; refuse results other than those of transformers."""
    a, b = (x["segmentation"] if isinstance(x, dict) else x for x in (got, expected))
    if a.shape != b.shape:
        raise GateFailed(f"the map is {list(a.shape)}, expected {list(b.shape)}")
    pixels = int((a != b).sum())
    if provider != PAPER:
        if pixels:
            raise GateFailed(f"{pixels} pixels of the map differ")
        if (
            isinstance(got, dict)
            and isinstance(expected, dict)
            and got["segments_info"] != expected["segments_info"]
        ):
            raise GateFailed("the segments differ")
    return {"pixels that differ": float(pixels)}


def make_outputs(height: int, width: int, queries: int, classes: int, kept: int) -> SimpleNamespace:
    """Return outputs for one image: blobs of random places and sizes, `kept` of them certain."""
    generator = torch.Generator().manual_seed(0)
    h, w = -(-height // 4), -(-width // 4)
    centre = torch.rand(queries, 2, 1, 1, generator=generator)
    radius = 0.05 + 0.15 * torch.rand(queries, 1, 1, generator=generator)
    y, x = torch.linspace(0, 1, h)[:, None], torch.linspace(0, 1, w)
    distance = ((y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2).sqrt()
    noise = F.interpolate(torch.randn(1, queries, 9, 9, generator=generator), (h, w))[0]
    logits = torch.randn(1, queries, classes, generator=generator) - 7
    certain = torch.randperm(queries, generator=generator)[:kept]
    label = torch.randint(classes - 1, (kept,), generator=generator)
    logits[0, certain, label] = 6.0
    return SimpleNamespace(logits=logits, pred_masks=((radius - distance) * 60 + noise)[None])


def make_call(
    provider: str, task: str, size: tuple[int, int], settings: tuple[int, ...], threads: int
) -> Callable[[], Segments]:
    """Return a call of a processor's post-processing of one image."""
    torch.set_num_threads(threads)
    processor: Any
    if provider == "transformers":
        from transformers import ConditionalDetrImageProcessor as Theirs

        processor = Theirs()
    else:
        from cdetr_fast import ConditionalDetrImageProcessor as Ours

        processor = Ours(compat="paper" if provider == PAPER else "transformers")
    function = getattr(processor, f"post_process_{task}_segmentation")
    extra = {} if task == "semantic" else {"overlap_mask_area_threshold": 0.3}
    outputs = make_outputs(*settings)
    return lambda: function(outputs, target_sizes=[size], **extra)[0]
