"""No kernel writes outside of its outputs, nor leaves a part of them: guards around each buffer.

What lies around the inputs is poisoned in the tests of each kernel; here it is what lies around
everything that the launchers allocate.
"""

import itertools
import math
from unittest import mock

import pytest
import torch
from support.interpreter import INTERPRETED, run_in_the_interpreter
from torch import Tensor

from benchmarks import accuracy, ops

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
needs_kernels = pytest.mark.skipif(
    not INTERPRETED and DEVICE.type == "cpu",
    reason="run by test_in_the_interpreter, in a process of its own",
)
GUARD = 4096  # elements on both sides
MARKS = {True: 12345.0, False: 123}  # what guards hold, in floating point or not

# Odd sizes: the last tile of each axis hangs over.
SIZES = {
    "conditional_attention": {"batch": 2, "queries": 21, "height": 3, "width": 13, "masked": True},
    "conditional_attention_separable": {"batch": 2, "queries": 21, "height": 3, "width": 13},
    "sine_position_2d": {"batch": 2, "height": 3, "width": 17},
    "sine_query": {"batch": 2, "queries": 9},
    "residual_layer_norm": {"batch": 2, "rows": 9},
    "matching_cost": {"batch": 2, "queries": 21, "targets": 3},
    "set_loss": {"batch": 2, "queries": 21, "targets": 3},
}


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


@pytest.mark.skipif(INTERPRETED, reason="is the process that this test starts")
def test_in_the_interpreter(root):
    run_in_the_interpreter(root, __file__)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_kernels_write_all_of_their_outputs_and_nothing_else(name, dtype):
    work = ops.WORKS[name][0](dtype, DEVICE, **SIZES[name])
    judge = accuracy.Judge(work, bool(work.gradients))
    function = work.providers["cdetr_fast triton"]()
    guarded = Guarded()
    with (
        mock.patch.object(Tensor, "new_empty", lambda x, *s, **o: guarded.empty(x, s, **o)),
        mock.patch.object(torch, "empty_like", lambda x, **o: guarded.empty(x, x.shape, **o)),
    ):
        results = judge.evaluate(function)
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
