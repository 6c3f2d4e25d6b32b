"""`sine_position_2d`: its definition against the formula, and the triton kernel against fp64.

The kernel is tested on a GPU, or in triton's interpreter in a process of its own.
"""

import dataclasses
import math

import pytest
import torch
from support.kernels import (
    DEVICE,
    DTYPES,
    assert_accurate,
    assert_close,
    needs_kernels,
)

from cdetr_kernels import sine_position_2d
from cdetr_kernels.ops.sine_position_2d import cases
from cdetr_kernels.testing.case import key_mask

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def draw_mask(kind, batch, height, width):
    """Kinds as of `key_mask`, and "none" of the positions unpadded."""
    mask = key_mask("holes" if kind == "none" else kind, batch, height, width, DEVICE)
    return torch.zeros_like(mask) if kind == "none" else mask


# kind, batch, height, width, channels
MASKS = {
    "one position": ("padded", 1, 1, 1, 4),
    "padded": ("padded", 2, 3, 17, 256),
    "holes": ("no keys", 3, 3, 33, 20),
    "fully masked": ("none", 2, 3, 4, 8),
    "tall": ("holes", 1, 33, 2, 8),
    "wide": ("holes", 1, 1, 150, 8),
    "several blocks of features": ("padded", 1, 3, 5, 520),
}


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MASKS)
def test_position(case, dtype):
    *shape, channels = MASKS[case]
    options = {"channels": channels, "dtype": dtype}
    call = cases.make(dtype, DEVICE, *shape[1:], channels=channels)
    assert_accurate(dataclasses.replace(call, inputs={"mask": draw_mask(*shape)}, options=options))


@needs_kernels
@pytest.mark.parametrize(
    "options",
    [{"normalize": False}, {"temperature": 20.0}, {"temperature": 0.5}, {"scale": -1.5}],
    ids=str,
)
def test_options_of_the_position(options):
    mask = draw_mask("holes", 1, 2, 140)
    got, torchs = (
        {"code": sine_position_2d(mask, 64, backend=backend, **options)}
        for backend in ("triton", "torch")
    )
    exact = sine_position_2d(mask, 64, dtype=torch.float64, **options)
    assert_close(got, torchs, {"code": exact})


@needs_kernels
def test_a_mask_that_the_batch_shares():
    mask = draw_mask("no keys", 3, 2, 5)
    shared = mask[:1].expand(3, -1, -1)
    got, expected = (sine_position_2d(x, 8, backend="triton") for x in (shared, mask))
    assert torch.equal(got[2], expected[0])


@needs_kernels
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_position_on_an_empty_map(shape):
    mask = torch.ones(shape, dtype=torch.bool, device=DEVICE)
    assert sine_position_2d(mask, 8, backend="triton").shape == (shape[0], shape[1] * shape[2], 8)


@needs_kernels
def test_what_the_kernel_cannot_do_is_said():
    mask = draw_mask("none", 1, 2, 2)
    for dtype in (torch.float64, torch.int32):
        with pytest.raises(RuntimeError, match=f"'triton' cannot run: .* not {dtype}"):
            sine_position_2d(mask, 8, dtype=dtype, backend="triton")
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"temperature: expected a positive .* got "):
            sine_position_2d(mask, 8, temperature, backend="triton")


def test_frequencies_in_two_parts():
    from cdetr_kernels.gpu.waves import frequency_step

    for temperature, features in ((10000.0, 128), (20.0, 10), (0.5, 2), (1.0, 64), (2.0**100, 4)):
        high, low = frequency_step(temperature, features)
        assert high + low == -2 * math.log2(temperature) / features
        assert abs(low) <= abs(high) * 2**-11
        top = torch.tensor(4095 * high, dtype=torch.float64)
        assert top.float().double() == top


def rectangles(*sizes, height=6, width=9):
    mask = torch.zeros(len(sizes), height, width, dtype=torch.bool)
    for i, (h, w) in enumerate(sizes):
        mask[i, :h, :w] = True
    return mask


def test_position_of_one_pixel_by_the_formula():
    code = sine_position_2d(rectangles((6, 9)), 8, dtype=torch.float64)[0].view(6, 9, 8)
    y, x = 3 / (6 + 1e-6) * 2 * math.pi, 7 / (9 + 1e-6) * 2 * math.pi
    expected = [f(c / t) for c in (y, x) for t in (1, 100.0) for f in (math.sin, math.cos)]
    torch.testing.assert_close(code[2, 6], torch.tensor(expected, dtype=torch.float64))


def test_position_is_separable_over_rows_and_columns():
    code = sine_position_2d(rectangles((6, 9)), 16)[0].view(6, 9, 16)
    assert torch.equal(code[..., :8], code[:, :1, :8].expand(6, 9, 8))
    assert torch.equal(code[..., 8:], code[:1, :, 8:].expand(6, 9, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_the_result_only(dtype):
    mask = rectangles((50, 50), height=50, width=50)
    exact = sine_position_2d(mask, 64, dtype=torch.float64)
    got = sine_position_2d(mask, 64, dtype=dtype)
    assert got.dtype == dtype
    assert (got.double() - exact).abs().max() <= torch.finfo(dtype).eps


def test_errors():
    mask = rectangles((6, 9))
    with pytest.raises(ValueError, match="channels: expected a positive multiple of 4, got 10"):
        sine_position_2d(mask, 10)
    with pytest.raises(TypeError, match="mask: expected bool"):
        sine_position_2d(mask.float(), 8)
    with pytest.raises(ValueError, match="mask: expected 3 dimensions"):
        sine_position_2d(mask[0], 8)
