"""Guards around every buffer: no kernel writes outside its outputs, or leaves a part unwritten.

The surroundings of the inputs are poisoned in the tests of each kernel; here it is those of
everything that the launchers allocate.
"""

import itertools
import math
from unittest import mock

import pytest
import torch
from support.interpreter import run_in_the_interpreter
from support.kernels import DEVICE, in_this_process, needs_kernels
from torch import Tensor

from cdetr_kernels.testing import accuracy
from cdetr_kernels.testing.case import registered

pytest.importorskip("triton")

GUARD = 4096  # elements on both sides
MARKS = {True: 12345.0, False: 123}  # what guards hold, in floating point or not


class Guarded:
    """Stands in for `Tensor.new_empty` and `torch.empty_like`: NaN inside, marks around."""

    def __init__(self):
        self.buffers = []

    def empty(self, like: Tensor, shape, dtype=None, **_):
        shape = tuple(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        dtype = dtype or like.dtype
        count = math.prod(shape)
        mark = MARKS[dtype.is_floating_point]
        buffer = torch.full((count + 2 * GUARD,), mark, dtype=dtype, device=like.device)
        inside = buffer[GUARD : GUARD + count]
        if dtype.is_floating_point:
            inside.fill_(math.nan)
        self.buffers.append(buffer)
        return inside.view(shape)

    def check(self) -> int:
        for buffer in self.buffers:
            mark = buffer.new_tensor(MARKS[buffer.dtype.is_floating_point])
            assert (buffer[:GUARD] == mark).all()
            assert (buffer[-GUARD:] == mark).all()
            assert not buffer.isnan().any(), "a part of an output was not written"
        return len(self.buffers)


@in_this_process
def test_in_the_interpreter(root):
    run_in_the_interpreter(root, __file__)


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
    with (
        mock.patch.object(Tensor, "new_empty", lambda x, *s, **o: guarded.empty(x, s, **o)),
        mock.patch.object(torch, "empty_like", lambda x, **o: guarded.empty(x, x.shape, **o)),
    ):
        results = judge.evaluate(case.function("triton"))
    guarded.check()
    assert any(len(buffer) > 2 * GUARD for buffer in guarded.buffers)
    for error in judge.errors(results):
        assert error.passes(accuracy.KERNELS_FACTOR), error


def test_guards_notice():
    like = torch.zeros(3)
    for position, value in itertools.product((GUARD - 1, -GUARD, GUARD), (0.0, math.nan)):
        guarded = Guarded()
        guarded.empty(like, (2, 5)).zero_()
        assert guarded.check() == 1
        guarded.buffers[0][position] = value
        if position != GUARD or math.isnan(value):
            with pytest.raises(AssertionError):
                guarded.check()
