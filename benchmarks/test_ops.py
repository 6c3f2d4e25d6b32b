"""The operators' paths on this CPU, by pytest-benchmark: `pytest benchmarks --benchmark-only`."""

import pytest
import torch

from benchmarks import accuracy, ops
from benchmarks.works import own_backends

# Of self-attention, a small map: its time on two cores is that of all other operators together.
SIZES = {name: sizes[0] for name, (_, sizes) in ops.WORKS.items()}
PATHS = [
    (name, backend)
    for name in SIZES
    for backend in own_backends(
        {"encoder_self_attention": "conditional_attention",
         "cross_attention_module": "conditional_attention"}.get(name, name),
        torch.empty(0),
    )
]  # fmt: skip


@pytest.mark.parametrize("mode", ops.MODES)
@pytest.mark.parametrize(("name", "backend"), PATHS)
def test_cpu(benchmark, name, backend, mode):
    work = ops.WORKS[name][0](torch.float32, torch.device("cpu"), **SIZES[name])
    if mode != "forward" and not work.gradients:
        pytest.skip("has no gradient")
    function = work.providers[f"cdetr_fast {backend}"]()
    judge = accuracy.Judge(work, mode != "forward")
    errors = judge.errors(judge.evaluate(function))
    assert all(x.passes(accuracy.OTHERS_FACTOR) for x in errors), errors
    benchmark.group = f"{work.op} {work.shape} {mode}"
    benchmark(judge.evaluate, function)
