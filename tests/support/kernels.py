"""Helpers of the kernel tests: where they run, awkward inputs, the twice-the-error rule, checks."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from cdetr_kernels.testing.accuracy import KERNELS_FACTOR, Judge
from cdetr_kernels.testing.borders import scattered as scattered
from cdetr_kernels.testing.case import Case
from support.interpreter import INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
_ELSEWHERE = "run by test_in_the_interpreter, in a process of its own"
needs_kernels = pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason=_ELSEWHERE)
interpreted_only = pytest.mark.skipif(not INTERPRETED, reason=_ELSEWHERE)
compiled_only = pytest.mark.skipif(INTERPRETED, reason="needs kernels that can be compiled")
in_this_process = pytest.mark.skipif(INTERPRETED, reason="is the process that this test starts")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def cases_and_dtypes(cases: Iterable[str], few: Collection[str]) -> list[tuple[str, torch.dtype]]:
    """Return all pairs; in the interpreter, where all take minutes, half precision of a few."""
    return [
        (case, dtype)
        for case in cases
        for dtype in DTYPES
        if DEVICE == "cuda" or dtype == torch.float32 or case in few
    ]


def in_double(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return inputs with those in floating point as fp64."""
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


def differentiate(
    function: Callable[..., Tensor],
    tensors: Mapping[str, Tensor | None],
    grad_output: Tensor,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Return output and gradients by name of `function(**tensors)`, in `dtype` if one is given."""
    leaves = {
        name: None if x is None else x.detach().to(dtype or x.dtype).requires_grad_()
        for name, x in tensors.items()
    }
    output = function(**leaves)
    output.backward(grad_output.to(output.dtype))
    gradients = {name: x.grad for name, x in leaves.items() if x is not None}
    return {"output": output.detach(), **gradients}


def assert_close(
    got: Mapping[str, Tensor], torchs: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> None:
    """At most twice the error of torch in the same dtype, against fp64.

    Torch may be exact by luck, as for a single key: the floor is one rounding of the result and the
    cancellation of two fp32 sums.
    """
    assert got.keys() == exact.keys()
    for name, expected in exact.items():
        assert got[name].shape == expected.shape, name
        assert got[name].dtype == torchs[name].dtype, name
        assert got[name].isfinite().all(), name
        if expected.numel() == 0:
            continue
        error = (got[name] - expected).abs().max()
        eps = torch.finfo(got[name].dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps
        floor = eps * max(1.0, expected.abs().max())
        assert error <= 2 * (torchs[name] - expected).abs().max() + floor, name


def assert_accurate(case: Case, backend: str = "triton") -> None:
    """Check results and gradients of a case by the same rule, and that inputs are unchanged."""
    present = {name: x for name, x in case.inputs.items() if x is not None}
    before = {name: (x.clone(), x._version) for name, x in present.items()}
    judge = Judge(case, backward=bool(case.gradients))
    got = judge.evaluate(case.function(backend))
    for name, x in got.named().items():
        assert x.dtype == judge.torchs[name].dtype, name
        assert x.isfinite().all(), name
    for error in judge.errors(got):
        assert error.passes(KERNELS_FACTOR), error
    for name, (values, version) in before.items():
        torch.testing.assert_close(present[name], values, rtol=0, atol=0, equal_nan=True)
        assert present[name]._version == version


def check_refusals(function: Callable[..., Tensor], draw: Callable[..., tuple[Any, ...]]) -> None:
    """Inputs that the attention kernels refuse: fp64, and heads that are too wide."""
    tensors, _, _ = draw("odd sizes", torch.float64)
    with pytest.raises(RuntimeError, match=r"'triton' cannot run: .* not torch.float64"):
        function(**tensors)
    tensors, _, _ = draw("odd sizes")
    tensors["value"] = torch.zeros(2, 70, 1, 129, device=DEVICE)
    with pytest.raises(RuntimeError, match="heads of up to 128, not 129"):
        function(**tensors)
