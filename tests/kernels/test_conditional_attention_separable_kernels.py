"""The triton kernels of `conditional_attention_separable` against fp64, and their registration.

Run on a GPU, or in triton's interpreter, as those of the general form are.
"""

from unittest import mock

import pytest
import torch
from support.kernels import (
    DEVICE,
    assert_accurate,
    cases_and_dtypes,
    check_refusals,
    differentiate,
    needs_kernels,
)

from cdetr_kernels import conditional_attention, conditional_attention_separable
from cdetr_kernels.ops.conditional_attention_separable import cases
from cdetr_kernels.testing.case import RandomTensors

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned_memory")

NAMES = ("q_content", "q_spatial", "k_content", "k_rows", "k_columns", "value")

CODES = ("k_rows", "k_columns")
CASES = {
    "one of each": {"queries": 1, "height": 1, "width": 1, "heads": 1, "size": 4, "shared": CODES},
    "padded": {"batch": 2, "queries": 9, "height": 3, "width": 34, "heads": 2, "shared": CODES,
               "mask": "padded"},
    "no mask": {"queries": 100, "height": 7, "width": 9, "heads": 1, "size": 16, "value_size": 32,
                "shared": CODES},
    "odd sizes": {"batch": 2, "queries": 5, "height": 14, "width": 5, "heads": 1, "size": 9,
                  "value_size": 20, "mask": "holes"},
    "one row": {"queries": 33, "height": 1, "width": 70, "heads": 1, "size": 8, "value_size": 16,
                "shared": CODES, "mask": "holes"},
    "one column": {"batch": 2, "queries": 7, "height": 70, "width": 1, "heads": 1, "size": 8,
                   "value_size": 16, "shared": CODES, "mask": "no keys"},
    "many queries": {"queries": 140, "height": 4, "width": 10, "heads": 1, "shared": CODES,
                     "mask": "holes"},
    "columns of two tiles": {"batch": 2, "queries": 5, "height": 34, "width": 5, "heads": 1,
                             "size": 8, "mask": "padded"},
    "widest": {"queries": 33, "height": 5, "width": 8, "heads": 1, "size": 128,
               "value_size": 100, "shared": CODES, "mask": "holes"},
}  # fmt: skip


def draw(case, dtype=torch.float32):
    """Six inputs by name, the key mask, and the output's gradient."""
    inputs = cases.make(dtype, DEVICE, **CASES[case]).inputs
    mask = inputs.pop("key_mask")
    shape = (*inputs["q_content"].shape[:3], inputs["value"].shape[-1])
    return inputs, mask, RandomTensors(DEVICE, dtype, seed=9).normal(*shape)


def fused(mask, **options):
    return lambda **tensors: conditional_attention_separable(
        **tensors, key_mask=mask, backend="triton", **options
    )


def spatial_keys(k_rows, k_columns):
    return (k_rows[:, :, None] + k_columns[:, None]).flatten(1, 2)


def general(mask, backend, **options):
    """`conditional_attention` with its spatial keys in memory."""

    def attend(q_content, q_spatial, k_content, k_rows, k_columns, value):
        inputs = (q_content, q_spatial, k_content, spatial_keys(k_rows, k_columns), value)
        return conditional_attention(*inputs, mask, backend=backend, **options)

    return attend


@needs_kernels
@pytest.mark.parametrize(
    ("case", "dtype"), cases_and_dtypes(CASES, ("padded", "odd sizes", "one column")), ids=str
)
def test_output_and_gradients(case, dtype):
    assert_accurate(cases.make(dtype, DEVICE, **CASES[case]))


@needs_kernels
def test_a_row_without_keys_is_zero_and_has_no_gradient():
    tensors, mask, grad_output = draw("one column")
    tensors |= {name: tensors[name].repeat(2, 1, 1, 1) for name in ("k_rows", "k_columns")}
    got = differentiate(fused(mask), tensors, grad_output)
    for name, x in got.items():
        assert (x[0] == 0).all()
        # A single column shifts all scores alike, which softmax does not see.
        assert (x[1] != 0).any() or name == "k_columns"


@needs_kernels
@pytest.mark.parametrize("names", [("k_rows",), ("k_content", "k_columns")], ids=str)
def test_what_the_batch_shares(names):
    assert_accurate(cases.make(torch.float32, DEVICE, **CASES["odd sizes"], shared=names))


@needs_kernels
@pytest.mark.parametrize("case", ["padded", "one row", "one column"])
def test_dropout_is_that_of_the_general_form(case):
    """The same mask from the same seed, in the output, every gradient and the map."""
    tensors, mask, grad_output = draw(case)
    options = {"dropout_p": 0.25, "seed": 11}
    got = differentiate(fused(mask, **options), tensors, grad_output)
    expected = differentiate(general(mask, "triton", **options), tensors, grad_output)
    for name, x in expected.items():
        torch.testing.assert_close(got[name], x, rtol=1e-5, atol=1e-5)
    options["return_attention"] = True
    output, attention = fused(mask, **options)(**tensors)
    torch.testing.assert_close(output, got["output"], rtol=0, atol=0)
    _, expected_map = general(mask, "triton", **options)(**tensors)
    assert (attention == 0).any()
    torch.testing.assert_close(attention, expected_map, rtol=1e-5, atol=1e-6)


@needs_kernels
@pytest.mark.parametrize("case", ["one of each", "padded", "one column"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradients_of_the_attention_map(case, dropout_p):
    tensors, mask, _ = draw(case)
    options = {"return_attention": True, "dropout_p": dropout_p, "seed": 5}
    grad_map = torch.randn_like(fused(mask, **options)(**tensors)[1])
    value = tensors.pop("value")
    got = differentiate(lambda **x: fused(mask, **options)(**x, value=value)[1], tensors, grad_map)
    exact = differentiate(
        lambda **x: general(mask, "triton", **options)(**x, value=value)[1], tensors, grad_map
    )
    for name, x in exact.items():
        torch.testing.assert_close(got[name], x, rtol=1e-5, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("case", ["padded", "one column", "columns of two tiles"])
def test_parts_of_the_lines(case):
    """The parts put together are the whole, rows without keys and parts without lines included."""
    from cdetr_kernels.gpu import configurations

    tensors, mask, grad_output = draw(case)
    whole = differentiate(fused(mask), tensors, grad_output)
    with mock.patch.object(configurations, "parts", return_value=3):
        split = differentiate(fused(mask), tensors, grad_output)
    for name, x in whole.items():
        torch.testing.assert_close(split[name], x, rtol=1e-6, atol=1e-6)


def test_lines_are_what_fills_more_of_the_tiles():
    from cdetr_kernels.gpu.configurations import places, rows_are_lines

    assert [places(32, line) for line in (1, 16, 17, 34)] == [16, 16, 32, 32]
    assert not rows_are_lines(25, 34, 32)  # 34 columns in tiles of 32, not 25 rows in two each
    assert rows_are_lines(34, 25, 32)
    assert rows_are_lines(1, 100, 32)
    assert not rows_are_lines(100, 1, 32)


@needs_kernels
def test_what_the_kernels_cannot_do_is_said():
    check_refusals(fused(None), draw)
