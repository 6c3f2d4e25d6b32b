"""Guards around every buffer: no kernel writes outside its outputs, or leaves a part unwritten.

The surroundings of the inputs are poisoned in the tests of each kernel; here it is those of
everything that the launchers allocate.
"""

import itertools
import math

import pytest
import torch
from support.kernels import DEVICE, needs_kernels

from cdetr_kernels.testing import accuracy
from cdetr_kernels.testing.borders import GUARD, Guarded
from cdetr_kernels.testing.case import registered

pytest.importorskip("triton")


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", registered())
def test_kernels_write_all_of_their_outputs_and_nothing_else(name, dtype):
    make, sizes = registered()[name]
    case = make(dtype, DEVICE, **sizes.small)
    if "triton" not in case.backends():
        pytest.skip("has no triton kernel")
    judge = accuracy.Judge(case, bool(case.gradients))
    guarded = Guarded()
    with guarded.installed():
        results = judge.evaluate(case.function("triton"))
    assert guarded.complaint() is None
    assert any(len(buffer) > 2 * GUARD for buffer in guarded.buffers)
    for error in judge.errors(results):
        assert error.passes(accuracy.KERNELS_FACTOR), error


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
