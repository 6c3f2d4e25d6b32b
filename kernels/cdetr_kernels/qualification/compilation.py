"""Compilation ahead of the checks: other processes fill triton's cache, and touch no GPU.

A quick qualification compiles about two hundred variants of kernels, each of which takes half a
second of one core: more than all else that it does. So some processes run the tasks' calls on
tensors in the host's memory, where everything happens but the launches, and a check finds most of
its kernels compiled. What goes wrong there has no consequence: the check compiles for itself.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from cdetr_kernels import evidence, registry
from cdetr_kernels.evidence import Evidence
from cdetr_kernels.qualification.children import Child
from cdetr_kernels.qualification.plan import CHECK, TILE, Level, Task

_MOST_PROCESSES = 8
CPU = torch.device("cpu")


def processes() -> int:
    """Return how many processes compile: half of the cores are left to the checks."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(_MOST_PROCESSES, (cores or 1) // 2)


@contextlib.contextmanager
def ahead(tasks: Sequence[Task], device: torch.device, level: Level) -> Iterator[None]:
    """Compile what tasks launch, where it can be done ahead, until they are done.

    Args:
        tasks: Those of all operators, in the order in which they are run.
        device: The GPU that they are run on.
        level: Of the qualification.
    """
    count = processes()
    if device.type != "cuda" or torch.version.hip:
        count = 0
    with contextlib.ExitStack() as stack:
        for i in range(count):
            child = Child(device, level)
            stack.callback(_end, child)
            properties = torch.cuda.get_device_properties(device)
            child.submit(
                tasks[i::count], {},
                capability=10 * properties.major + properties.minor,
                multiprocessors=properties.multi_processor_count,
            )  # fmt: skip
        yield


def _end(child: Child) -> None:
    with contextlib.suppress(TimeoutError):  # it is left alone: it has no GPU
        child.close()


def run(job: dict[str, Any]) -> list[str]:
    """Compile what the tasks of a job launch; return the names of the kernels, one each time."""
    from unittest import mock

    from cdetr_kernels.gpu import launching
    from cdetr_kernels.testing.stub_driver import stubbed

    evidence.fix(CPU, Evidence(None, "compilation"))  # tiles are those of the tasks
    multiprocessors = mock.patch.object(
        launching, "multiprocessors", return_value=job["multiprocessors"]
    )
    with stubbed(job["capability"], compiles=True) as stub, multiprocessors:
        for fields in job["tasks"]:
            for call in _calls(Task(**fields)):
                with contextlib.suppress(Exception):
                    call()
    return stub.compilations


def _calls(task: Task) -> Iterator[Any]:
    """Yield the calls of the operator (or of a kernel with a tile) that a task makes."""
    from cdetr_kernels.gpu.tiles import Tile
    from cdetr_kernels.qualification import tuning

    if task.what != TILE:
        case = registry.cases(task.operator).make(getattr(torch, task.dtype), CPU, **task.sizes)
        yield from _of_case(case, task.path, strided=task.what == CHECK)
        return
    key = tuning.Key.parse(task.kernel)
    with tuning.with_tile(key.kernel, Tile.of(task.tile)), tuning.precision_of_dots(key):
        yield from _of_case(tuning.checked_case(key, CPU, tuning.CHECKED), "triton", strided=False)
        for _, call in tuning.calls(key, CPU, tuning.SHAPES):
            yield call


def _of_case(case: Any, path: str, strided: bool) -> Iterable[Any]:
    from cdetr_kernels.testing import accuracy, borders

    function = case.function(path)
    given = [case.inputs]
    if strided:
        given.append(
            {
                name: borders.scattered(x) if isinstance(x, Tensor) else x
                for name, x in case.inputs.items()
            }
        )
    for inputs in given:

        def call(inputs: Any = inputs) -> None:
            with torch.no_grad():
                outputs = accuracy.tensors(function(**inputs))
            if case.gradients:
                grads = [torch.zeros_like(x) for x in outputs]
                accuracy.evaluate(function, inputs, case.gradients, grads)

        yield call
