"""Addresses that kernels read, in the interpreter: none outside of a mask, whatever its size is."""

from unittest import mock

import numpy as np
import pytest
import torch
from support.interpreter import run_in_the_interpreter
from support.kernels import in_this_process, interpreted_only

from cdetr_kernels import conditional_attention_separable
from cdetr_kernels.gpu import launching
from cdetr_kernels.ops.conditional_attention_separable import cases

pytest.importorskip("triton")


@in_this_process
def test_in_the_interpreter(root):
    run_in_the_interpreter(root, __file__)


@interpreted_only
@pytest.mark.parametrize(
    ("height", "width", "parts"), [(9, 20, 6), (5, 4, 4), (1, 9, 1), (7, 3, 5), (3, 8, 3)]
)
@pytest.mark.parametrize("mask", ["padded", "no keys"])
def test_separable_forward_reads_no_mask_behind_the_last_line(height, width, parts, mask):
    """9 lines in 6 parts of 2: the last part begins at line 10."""
    from triton.runtime import interpreter

    case = cases.make(torch.float32, "cpu", 2, 5, height, width, mask, heads=1, size=16)
    attended = case.inputs["key_mask"]
    first = attended.data_ptr()
    load, outside, reads = interpreter.InterpreterBuilder.create_masked_load, [], []

    def watched(self, pointers, present, *rest):
        addresses = pointers.data[np.broadcast_to(present.data, pointers.data.shape)]
        if pointers.get_element_ty().primitive_bitwidth <= 8:
            reads.append(len(addresses))
            outside.extend(addresses[(addresses < first) | (addresses >= first + attended.numel())])
        return load(self, pointers, present, *rest)

    expected = case.function("torch")(**case.inputs)
    with (
        mock.patch.object(interpreter.InterpreterBuilder, "create_masked_load", watched),
        mock.patch.object(launching, "multiprocessors", return_value=100),
        mock.patch("cdetr_kernels.gpu.configurations.parts", return_value=parts),
    ):
        got = conditional_attention_separable(**case.inputs, backend="triton")
    assert sum(reads) > 0
    assert not outside
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
