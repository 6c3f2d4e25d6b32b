"""The operators' implementations on this CPU, by pytest-benchmark.

pytest benchmarks --benchmark-only
"""

from typing import Any

import pytest
import torch

from benchmarks import ops
from cdetr_kernels.testing import accuracy

# The first of the typical sizes, forward and backward on each implementation.
CASES = {
    name: make(sizes.dtypes[0], torch.device("cpu"), **sizes.typical[0])
    for name, (make, sizes) in ops.works().items()
}
PATHS = [(name, backend) for name, case in CASES.items() for backend in case.backends()]


@pytest.mark.parametrize("mode", ops.MODES)
@pytest.mark.parametrize(("name", "backend"), PATHS)
def test_cpu(benchmark: Any, name: str, backend: str, mode: str) -> None:
    case = CASES[name]
    if mode != "forward" and not case.gradients:
        pytest.skip("has no gradient")
    function = case.function(backend)
    judge = accuracy.Judge(case, mode != "forward")
    errors = judge.errors(judge.evaluate(function))
    assert all(x.passes(accuracy.OTHERS_FACTOR) for x in errors), errors
    benchmark.group = f"{name} {case.label} {mode}"
    benchmark(judge.evaluate, function)
