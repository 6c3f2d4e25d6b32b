"""Checks that every operator with triton kernels passes, on the inputs of its `cases`.

The memory that kernels touch, equal bits, registration with torch, refusals. What an operator
computes is tested in a file of its own.
"""

import itertools
import math
from unittest import mock

import pytest
import torch
from support.kernels import DEVICE, compiled_only, needs_kernels
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cdetr_kernels import registry
from cdetr_kernels.gpu import support
from cdetr_kernels.testing import accuracy
from cdetr_kernels.testing.borders import GUARD, Guarded, scattered
from cdetr_kernels.testing.case import Case

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned_memory")

KINDS = {
    kind: (module.make, sizes)
    for name in registry.NAMES
    if "triton" in registry.operator(name).implementations
    for module in [registry.cases(name)]
    for kind, sizes in module.SIZES.items()
}

# Other calls than the ordinary one: its kind, and arguments of `cases.make`.
VARIANTS = {
    "attention with dropout": ("conditional_attention", {"dropout_p": 0.2}),
    "attention map": ("conditional_attention", {"returns_map": True}),
    "separable attention with dropout": ("conditional_attention_separable", {"dropout_p": 0.2}),
    "separable attention map": ("conditional_attention_separable", {"returns_map": True}),
    "matching by softmax": ("matching_cost", {"classification": "softmax"}),
    "query without a scale": ("sine_query", {"scaled": False, "points": (2, 5, 4)}),
}
CALLS = {name: (name, {}) for name in KINDS} | VARIANTS
calls = pytest.mark.parametrize("name", CALLS)


def call(name: str, size: str = "small", dtype: torch.dtype | None = None) -> Case:
    """Return a call of an operator."""
    kind, options = CALLS[name]
    make, sizes = KINDS[kind]
    return make(dtype or sizes.dtypes[0], DEVICE, **getattr(sizes, size) | options)


def run(case: Case, function=None, copy=Tensor.detach) -> dict[str, Tensor]:
    """Return outputs and gradients by name, of copies of the inputs if `copy` makes some."""
    function = function or case.function("triton")
    inputs = {name: x if x is None else copy(x) for name, x in case.inputs.items()}
    leaves = {name: inputs[name].requires_grad_() for name in case.gradients}
    outputs = accuracy.tensors(function(**inputs))
    found = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    if leaves:
        grads = map(copy, accuracy.grad_outputs(case, outputs))
        found |= zip(leaves, torch.autograd.grad(outputs, leaves.values(), grads), strict=True)
    return found


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(got[name], x), name


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_kernels_write_all_of_their_outputs_and_nothing_else(name, dtype):
    make, sizes = KINDS[name]
    case = make(dtype, DEVICE, **sizes.small)
    judge = accuracy.Judge(case, bool(case.gradients))
    guarded = Guarded()
    with guarded.installed():
        results = judge.evaluate(case.function("triton"))
    assert guarded.complaint() is None
    assert any(len(buffer) > 2 * GUARD for buffer in guarded.buffers)
    for error in judge.errors(results):
        assert error.passes(accuracy.KERNELS_FACTOR), error


@needs_kernels
@calls
def test_the_same_bits_in_every_run_whatever_the_strides_and_what_is_around_the_inputs(name):
    """NaN, or indices out of range, are around every input: a load beyond its border shows."""
    case = call(name)
    expected = run(case)
    copies = (
        lambda x: scattered(x, tuple(range(x.ndim)), 2),
        lambda x: scattered(x, (1, 0, *range(2, x.ndim))[-x.ndim :], 2, offset=3),
        lambda x: scattered(x, None, 1),
    )
    for copy in copies:
        assert_equal(run(case, copy=copy), expected)
    half = call(name, dtype=torch.float16)
    assert_equal(run(half, copy=lambda x: scattered(x, None, 2)), run(half))


class Calls(TorchDispatchMode):
    """Keeps the calls of this package's operators."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "cdetr_fast":
            self.found[function] = args
        return function(*args, **(kwargs or {}))


@needs_kernels
@calls
def test_registration(name):
    """Of the operator, and of those for its gradients and its map."""
    case = call(name, "smallest")
    with Calls() as made:
        run(case)
    assert made.found
    for operator, given in made.found.items():
        has_gradient = not operator.name().endswith("_backward")
        arguments = tuple(
            x.detach().nan_to_num(0.5).requires_grad_(has_gradient and x.requires_grad)
            if isinstance(x, Tensor)
            else x
            for x in given
        )
        torch.library.opcheck(operator, arguments)


@needs_kernels
@calls
def test_compiles_into_one_graph(name):
    case = call(name, "smallest")
    torch.compiler.reset()  # all calls are one function to it, with a limit of recompilations
    compiled = torch.compile(case.function("triton"), fullgraph=True, backend="aot_eager")
    assert_equal(run(case, compiled), run(case))


@needs_kernels
@calls
def test_exports(name):
    case = call(name, "smallest")
    function = case.function("triton")

    class Model(torch.nn.Module):
        def forward(self, *inputs):
            return function(**dict(zip(case.inputs, inputs, strict=True)))

    inputs = tuple(case.inputs.values())
    exported = torch.export.export(Model(), inputs).module()
    for got, expected in zip(
        accuracy.tensors(exported(*inputs)), accuracy.tensors(Model()(*inputs)), strict=True
    ):
        assert torch.equal(got, expected)


@needs_kernels
@pytest.mark.parametrize("name", [name for name in CALLS if call(name, "smallest").gradients])
def test_a_gradient_of_the_gradient_is_refused(name):
    case = call(name, "smallest")
    leaves = {name: case.inputs[name].requires_grad_() for name in case.gradients}
    first = next(iter(leaves.values()))
    total = sum(x.sum() for x in accuracy.tensors(case.function("triton")(**case.inputs)))
    (gradient,) = torch.autograd.grad(total * first.sum(), first, create_graph=True)
    with pytest.raises(NotImplementedError, match="use backend='torch'"):
        torch.autograd.grad(gradient.sum(), first)


@compiled_only
@pytest.mark.parametrize("name", KINDS)
def test_tensors_on_a_cpu_are_refused(name):
    case = call(name, "smallest")
    inputs = {name: x if x is None else x.cpu() for name, x in case.inputs.items()}
    with pytest.raises(RuntimeError, match=f"^{case.op}: .* the tensors are on cpu"):
        case.function("triton")(**inputs)


@pytest.mark.parametrize("name", KINDS)
def test_a_machine_without_triton_says_so(name):
    case = call(name, "smallest")
    with (
        mock.patch.object(support, "HAS_TRITON", False),
        pytest.raises(RuntimeError, match="'triton' cannot run: triton is not installed"),
    ):
        case.function("triton")(**case.inputs)


def test_guards_notice():
    like = torch.zeros(3)
    for position, value in itertools.product((GUARD - 1, -GUARD, GUARD), (0.0, math.nan)):
        guarded = Guarded()
        guarded.empty(like, (2, 5)).zero_()
        assert guarded.complaint() is None
        assert len(guarded.buffers) == 1
        guarded.buffers[0][position] = value
        if position != GUARD or math.isnan(value):
            where = "writes outside" if position != GUARD else "unwritten"
            assert where in guarded.complaint()
