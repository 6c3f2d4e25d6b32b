"""Host time of a call of a public operator: checks, dispatch and launch, on a CPU.

    python -m benchmarks overhead

Tensors are as small as can be, in inference mode. The overhead is the processor time of the public
function with an implementation that does nothing: the difference of two calls that compute is
smaller than the noise of the machine. The times of both calls are printed beside it. An overhead
above the limit is a failure.

Where an operator has triton kernels, they are launched by a driver that does nothing: the host time
of the public function, and of bare launches by triton of the same kernels with arguments that are
ready. More than two bare launches are a failure. "forward and backward" is the call and its
gradients by autograd, most of whose time is autograd's; it has no limit.
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
from cdetr_kernels.testing.stub_driver import stubbed

OVERHEAD = "checks and dispatch"
LIMIT_MS = 0.006
CALLS = 100
HOST = "host, triton"
BARE = "bare launches"
BACKWARD = ", forward and backward"
MOST_BARE_LAUNCHES = 2.0


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


def launch_calls(operator: Operator, backward: bool) -> tuple[Case, Call, Call]:
    """Return an operator's smallest case, its call on a GPU, and that of its kernels alone."""
    from cdetr_kernels.gpu import launching

    module = registry.cases(operator.name)
    sizes = module.SIZES[operator.name]
    case = module.make(sizes.dtypes[0], "cpu", **sizes.smallest)
    forward = functools.partial(case.function("triton"), **case.inputs)
    inputs = [case.inputs[name].requires_grad_(backward) for name in case.gradients]
    outputs = forward()
    gradients = torch.ones_like(outputs) if isinstance(outputs, torch.Tensor) else None

    def both() -> Any:
        result = forward()
        total = result if gradients is not None else sum(result)
        return torch.autograd.grad(total, inputs, gradients)

    call: Call = both if backward else forward

    launches: list[launching.Launch] = []
    run = launching.Launch.run

    def noted(launch: launching.Launch) -> Any:
        launches.append(launch)
        return run(launch)

    launching.forget()
    with mock.patch.object(launching.Launch, "run", noted):
        call()

    def bare() -> None:
        for launch in launches:
            run(launch)

    return case, call, bare


def measured_launches(operator: Operator, repeats: int) -> Iterator[results.Row]:
    """Yield the host time of a call and of a bare launch of its kernels."""
    differentiable = registry.cases(operator.name).SIZES[operator.name].differentiable
    for backward in (False, True)[: 1 + differentiable]:
        with stubbed(), torch.inference_mode(not backward), torch.set_grad_enabled(backward):
            case, call, bare = launch_calls(operator, backward)
            turns = [[milliseconds(x) for x in (call, bare)] for _ in range(repeats)]
        for provider, taken in zip((HOST, BARE), zip(*turns, strict=True), strict=True):
            yield {
                **names_of(case),
                "provider": provider + BACKWARD * backward,
                **summarised(taken),
            }


def names_of(case: Case) -> results.Row:
    """Return what names a row."""
    dtype = str(case.dtype).removeprefix("torch.")
    return {"benchmark": "overhead", "work": case.op, "shape": case.label, "dtype": dtype}


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
    times = zip(
        (OVERHEAD, "public function", "reference"),
        (overheads, *zip(*turns, strict=True)),
        strict=True,
    )
    for provider, taken in times:
        yield {**names_of(case), "provider": provider, **summarised(taken)}


def slow_launches(rows: list[results.Row]) -> list[str]:
    """Return the operators whose call takes longer than its bare launches allow."""
    ms = {(x["work"], x["provider"]): x["min_ms"] for x in rows}
    works = [work for work, provider in ms if provider == HOST]
    return [x for x in works if ms[x, HOST] > MOST_BARE_LAUNCHES * ms[x, BARE]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--output", help="name of the file in benchmarks/results to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: list[results.Row] = []
    for operator in map(registry.operator, registry.NAMES):
        with torch.inference_mode():
            rows += measured(operator, options.repeats)
        if "triton" in operator.implementations:
            rows += measured_launches(operator, options.repeats)
    results.print_table(rows)
    over = [x["work"] for x in rows if x["provider"] == OVERHEAD and x["ms"] > LIMIT_MS]
    if over:
        print(f"more than {LIMIT_MS * 1e3:g} us: {', '.join(over)}", file=sys.stderr)
    slow = slow_launches(rows)
    if slow:
        print(f"more than {MOST_BARE_LAUNCHES:g} bare launches: {', '.join(slow)}", file=sys.stderr)
    if options.output:
        command = results.command_line("overhead", arguments)
        print("written to", results.save(options.output, rows, command))
    return 1 if over or slow else 0


if __name__ == "__main__":
    sys.exit(main())
