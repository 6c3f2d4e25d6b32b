"""Position codes against those of transformers. Matching and loss: tests/loss/test_criterion.py."""

import pytest
import torch
from transformers.models.conditional_detr import modeling_conditional_detr as theirs

from cdetr_kernels import sine_position_2d, sine_query
from cdetr_kernels.testing.case import key_mask


@pytest.mark.parametrize("channels", [8, 64, 256])
@pytest.mark.parametrize("normalize", [True, False])
def test_position_equals_transformers(channels, normalize):
    one = torch.zeros(1, 6, 9, dtype=torch.bool)
    one[0, 0, 0] = True
    masks = (key_mask("padded", 2, 6, 9, "cpu"), one, key_mask("holes", 1, 6, 9, "cpu"))
    mask = torch.cat(masks)
    module = theirs.ConditionalDetrSinePositionEmbedding(channels // 2, normalize=normalize)
    expected = module((4, channels, 6, 9), "cpu", torch.float32, mask).flatten(2).transpose(1, 2)
    got = sine_position_2d(mask, channels, normalize=normalize)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("coordinates", [2, 4])
def test_query_equals_transformers(coordinates):
    points = torch.rand(2, 5, coordinates, generator=torch.Generator().manual_seed(0))
    expected = theirs.encode_sinusoidal_position_embedding(points, num_pos_feats=32)
    got = sine_query(points, 32 * coordinates)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)
