"""Overhead of a call of a public operator: checks and dispatch, on a CPU.

    python -m benchmarks overhead

Tensors are as small as can be, in inference mode. The overhead is the processor time of the public
function with an implementation that does nothing: the difference of two calls that compute is
smaller than the noise of the machine. The times of both calls are printed beside it. An overhead
above the limit is a failure.
"""

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from benchmarks import results
from benchmarks.timing import summarised
from cdetr_kernels import registry
from cdetr_kernels.dispatch import Operator
from cdetr_kernels.testing.case import Case

OVERHEAD = "checks and dispatch"
LIMIT_MS = 0.006
CALLS = 100


Call = Callable[[], Any]


def make_calls(operator: Operator) -> tuple[Case, Call, Call]:
    """Return an operator's smallest case, its call of the public function, and of the reference."""
    module = registry.cases(operator.name)
    sizes = module.SIZES[operator.name]
    case = module.make(sizes.dtypes[0], "cpu", **sizes.smallest)
    backend = "auto" if operator.choice().path == "torch" else "torch"
    call = functools.partial(case.public, **case.inputs, **case.options, backend=backend)
    reference = operator.implementations["torch"]
    return case, call, functools.partial(reference.run, *case.handed_on("torch"))


def milliseconds(call: Call) -> float:
    """Return the processor time of one of `CALLS` calls."""
    start = time.thread_time()
    for _ in range(CALLS):
        call()
    return (time.thread_time() - start) * 1e3 / CALLS


def measured(operator: Operator, repeats: int) -> Iterator[results.Row]:
    """Yield the rows of an operator: checks and dispatch alone, the public function, reference."""
    case, call, reference = make_calls(operator)
    turns = [[milliseconds(x) for x in (call, reference)] for _ in range(repeats)]
    nothing = {
        name: dataclasses.replace(implementation, run=lambda *_: (None, None))
        for name, implementation in operator.implementations.items()
    }
    with mock.patch.dict(operator.implementations, nothing):
        overheads = [milliseconds(call) for _ in range(repeats)]
    names = {
        "benchmark": "overhead",
        "work": operator.name,
        "shape": case.label,
        "dtype": str(case.dtype).removeprefix("torch."),
    }
    times = zip(
        (OVERHEAD, "public function", "reference"),
        (overheads, *zip(*turns, strict=True)),
        strict=True,
    )
    for provider, taken in times:
        yield {**names, "provider": provider, **summarised(taken)}


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--output", help="name of the file in benchmarks/results to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: list[results.Row] = []
    for name in registry.NAMES:
        rows += measured(registry.operator(name), options.repeats)
    results.print_table(rows)
    over = [x["work"] for x in rows if x["provider"] == OVERHEAD and x["ms"] > LIMIT_MS]
    if over:
        print(f"more than {LIMIT_MS * 1e3:g} us: {', '.join(over)}", file=sys.stderr)
    if options.output:
        command = results.command_line("overhead", arguments)
        print("written to", results.save(options.output, rows, command))
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
