"""Overhead of a call of a public operator: checks and dispatch, on a CPU.

    python -m benchmarks.overhead

Tensors are as small as can be, in inference mode. The overhead is the processor time of the public
function with an implementation that does nothing: the difference of two calls that compute is
smaller than the noise of the machine. That difference is printed beside it.
"""

import argparse
import contextlib
import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from benchmarks.measure import print_table, save
from cdetr_kernels import registry
from cdetr_kernels.dispatch import Operator

LIMIT_US = 6.0
CALLS = 100


def make_calls(operator: Operator) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return the smallest call of an operator's public function, and of its reference."""
    module = registry.cases(operator.name)
    sizes = module.SIZES[operator.name]
    case = module.make(sizes.dtypes[0], "cpu", **sizes.smallest)
    backend = "auto" if operator.choice().path == "torch" else "torch"
    call = functools.partial(case.public, **case.inputs, **case.options, backend=backend)
    # The reference is called with what the public function hands on.
    handed_on: list[Any] = []
    reference = operator.implementations["torch"]
    recorder = dataclasses.replace(reference, run=lambda *args: handed_on.append(args) or ())
    with (
        mock.patch.dict(operator.implementations, {"torch": recorder}),
        contextlib.suppress(Exception),
    ):
        call()
    return call, functools.partial(reference.run, *handed_on[0])


def microseconds(call: Callable[[], Any]) -> float:
    """Return the processor time of one of `CALLS` calls."""
    start = time.thread_time()
    for _ in range(CALLS):
        call()
    return (time.thread_time() - start) * 1e6 / CALLS


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--output", help="name of the file in benchmarks/results to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    for operator in map(registry.operator, registry.NAMES):
        call, reference = make_calls(operator)
        turns = [[microseconds(x) for x in (call, reference)] for _ in range(options.repeats)]
        time_, plain = (statistics.median(times) for times in zip(*turns, strict=True))
        nothing = {
            name: dataclasses.replace(implementation, run=lambda *_: (None, None))
            for name, implementation in operator.implementations.items()
        }
        with mock.patch.dict(operator.implementations, nothing):
            overheads = [microseconds(call) for _ in range(options.repeats)]
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
    if options.output:
        print("written to", save(options.output, rows))
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
