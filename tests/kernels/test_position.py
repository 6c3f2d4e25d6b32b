"""Position codes against transformers' and against the formula."""

import math

import pytest
import torch
from transformers.models.conditional_detr import modeling_conditional_detr as theirs

from cdetr_kernels import sine_position_2d, sine_query


def rectangles(*sizes, height=6, width=9):
    mask = torch.zeros(len(sizes), height, width, dtype=torch.bool)
    for i, (h, w) in enumerate(sizes):
        mask[i, :h, :w] = True
    return mask


@pytest.mark.parametrize("channels", [8, 64, 256])
@pytest.mark.parametrize("normalize", [True, False])
def test_position_equals_transformers(channels, normalize):
    mask = rectangles((6, 9), (4, 5), (1, 1))
    mask = torch.cat([mask, torch.rand(1, 6, 9, generator=torch.Generator().manual_seed(0)) > 0.5])
    module = theirs.ConditionalDetrSinePositionEmbedding(channels // 2, normalize=normalize)
    expected = module((4, channels, 6, 9), "cpu", torch.float32, mask).flatten(2).transpose(1, 2)
    got = sine_position_2d(mask, channels, normalize=normalize)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)


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


@pytest.mark.parametrize("coordinates", [2, 4])
def test_query_equals_transformers(coordinates):
    points = torch.rand(2, 5, coordinates, generator=torch.Generator().manual_seed(0))
    expected = theirs.encode_sinusoidal_position_embedding(points, num_pos_feats=32)
    got = sine_query(points, 32 * coordinates)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("coordinates", [2, 4])
def test_query_gradients(coordinates):
    points = torch.rand(3, coordinates, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p, s: sine_query(p, 16, s), (points, scale))


def test_query_scale_multiplies_and_sets_the_dtype():
    points, scale = torch.rand(1, 3, 2), torch.randn(4, 3, 16)
    torch.testing.assert_close(sine_query(points, 16, scale), sine_query(points, 16) * scale)
    half = sine_query(points, 16, scale.bfloat16())
    assert half.dtype == torch.bfloat16
    assert half.shape == (4, 3, 16)


def test_errors():
    mask = rectangles((6, 9))
    with pytest.raises(ValueError, match="channels: expected a positive multiple of 4, got 10"):
        sine_position_2d(mask, 10)
    with pytest.raises(TypeError, match="mask: expected bool"):
        sine_position_2d(mask.float(), 8)
    with pytest.raises(ValueError, match="mask: expected 3 dimensions"):
        sine_position_2d(mask[0], 8)
    with pytest.raises(ValueError, match=r"reference_points: expected .* got \[3, 3\]"):
        sine_query(torch.rand(3, 3), 16)
    with pytest.raises(ValueError, match="channels: expected a positive multiple of 8, got 12"):
        sine_query(torch.rand(3, 4), 12)
    with pytest.raises(ValueError, match=r"query_scale: expected \[..., 16\], got \[3, 8\]"):
        sine_query(torch.rand(3, 2), 16, torch.rand(3, 8))
