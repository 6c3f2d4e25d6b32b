"""What a call of a public operator costs over its PyTorch reference: checks and dispatch, on a CPU.

    python -m benchmarks.overhead

Tensors are as small as can be, in inference mode. The overhead is the processor time of the public
function with a path that does nothing: the difference of two calls that compute is smaller than
what the machine's noise does to them. That difference is printed beside it.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from unittest import mock

import torch

import cdetr_kernels
from benchmarks.measure import print_table, save
from cdetr_kernels import registry
from cdetr_kernels.ops.conditional_attention import reference as attention
from cdetr_kernels.ops.conditional_attention_separable import reference as separable
from cdetr_kernels.ops.detection_topk import reference as topk
from cdetr_kernels.ops.matching_cost import reference as matching
from cdetr_kernels.ops.normalize_and_pad import reference as preprocessing
from cdetr_kernels.ops.residual_layer_norm import reference as norm
from cdetr_kernels.ops.set_loss import reference as loss
from cdetr_kernels.ops.sine_position_2d import reference as position
from cdetr_kernels.ops.sine_query import reference as query

LIMIT_US = 6.0
CALLS = 100


def make_pairs() -> dict[str, tuple[Callable, Callable]]:
    """Returns for each operator a call of its public function, and the same call of its reference.

    References are called with what the public function hands on.
    """
    rows = torch.randn(1, 2, 1, 4)
    keys, code = torch.randn(1, 4, 1, 4), torch.randn(1, 2, 1, 4)
    scale = 8**-0.5
    mask = torch.ones(1, 2, 2, dtype=torch.bool)
    points, query_scale = torch.rand(1, 2, 2), torch.rand(1, 2, 8)
    logits, boxes = torch.randn(1, 1, 2, 3), torch.rand(1, 1, 2, 4)
    targets = torch.tensor([[1]]), torch.rand(1, 1, 4), torch.tensor([1])
    matches = torch.zeros(1, 1, 1, dtype=torch.int64)
    sizes = torch.ones(1, 2)
    image = torch.rand(3, 2, 2)
    affine = torch.randn(8), torch.randn(8)
    options = (scale, 0.0, None, False)
    circle = 6.283185307179586
    return {
        "conditional_attention": (
            lambda: cdetr_kernels.conditional_attention(rows, rows, keys, keys, keys),
            lambda: attention.conditional_attention(rows, rows, keys, keys, keys, None, *options),
        ),
        "conditional_attention_separable": (
            lambda: cdetr_kernels.conditional_attention_separable(
                rows, rows, keys, code, code, keys
            ),
            lambda: separable.conditional_attention_separable(
                rows, rows, keys, code, code, keys, None, *options
            ),
        ),
        "sine_position_2d": (
            lambda: cdetr_kernels.sine_position_2d(mask, 8),
            lambda: position.sine_position_2d(mask, 8, 1e4, True, circle, torch.float32),
        ),
        "sine_query": (
            lambda: cdetr_kernels.sine_query(points, 8, query_scale),
            lambda: query.sine_query(points, 8, query_scale, 1e4, circle, torch.float32),
        ),
        "residual_layer_norm": (
            lambda: cdetr_kernels.residual_layer_norm(query_scale, query_scale, *affine),
            lambda: norm.residual_layer_norm(query_scale, query_scale, *affine, 1e-5),
        ),
        "detection_topk": (
            lambda: cdetr_kernels.detection_topk(logits[0], boxes[0], sizes, 2, backend="torch"),
            lambda: topk.detection_topk(logits[0], boxes[0], sizes, 2, float("inf")),
        ),
        "normalize_and_pad": (
            lambda: cdetr_kernels.normalize_and_pad([image], backend="torch"),
            lambda: preprocessing.normalize_and_pad([image], None, None, 1.0, 2, 2),
        ),
        "matching_cost": (
            lambda: cdetr_kernels.matching_cost(logits, boxes, *targets),
            lambda: matching.matching_cost(
                logits, boxes, *targets, 2.0, 5.0, 2.0, "focal", 0.25, 2.0
            ),
        ),
        "set_loss": (
            lambda: cdetr_kernels.set_loss(logits, boxes, *targets, matches, 1.0),
            lambda: loss.set_loss(logits, boxes, *targets, matches, 1.0, 0.25, 2.0),
        ),
    }


def microseconds(call: Callable) -> float:
    """Returns the processor time of one of `CALLS` calls."""
    start = time.thread_time()
    for _ in range(CALLS):
        call()
    return (time.thread_time() - start) * 1e6 / CALLS


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--output", help="name of the file in benchmarks/results to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pairs = make_pairs()
    rows = []
    for operator in map(registry.operator, registry.NAMES):
        calls = pairs[operator.name]
        turns = [[microseconds(call) for call in calls] for _ in range(arguments.repeats)]
        time_, plain = (statistics.median(times) for times in zip(*turns, strict=True))
        nothing = {
            name: dataclasses.replace(path, run=lambda *_: (None, None))
            for name, path in operator.implementations.items()
        }
        with mock.patch.dict(operator.implementations, nothing):
            overheads = [microseconds(calls[0]) for _ in range(arguments.repeats)]
        rows.append(
            {
                "operator": operator.name,
                "overhead us": statistics.median(overheads),
                "us": time_,
                "reference us": plain,
                "difference us": time_ - plain,
            }
        )
    print_table(rows)
    over = [row["operator"] for row in rows if row["overhead us"] > LIMIT_US]
    if over:
        print(f"more than {LIMIT_US} us: {', '.join(over)}", file=sys.stderr)
    if arguments.output:
        print("written to", save(arguments.output, rows))
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
