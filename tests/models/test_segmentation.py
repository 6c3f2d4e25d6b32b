"""The mask head's exact savings against the plain form."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.oracle import make_pair, padded_images
from torch.utils._python_dispatch import TorchDispatchMode

from cdetr_fast.models.mask_head import conv3x3_of_upsampled


@given(
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    ratio=st.sampled_from([1, 2, 3]),
    odd_height=st.booleans(),
    odd_width=st.booleans(),
    seed=st.integers(0, 99),
)
def test_convolution_of_an_upsampled_map(height, width, ratio, odd_height, odd_width, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, height, width, dtype=torch.float64, generator=generator)
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64, generator=generator)
    size = (ratio * height - odd_height, ratio * width - odd_width)
    if min(size) == 0:
        return
    expected = F.conv2d(F.interpolate(x, size=size), weight, padding=1)
    torch.testing.assert_close(conv3x3_of_upsampled(x, weight, size), expected)


@pytest.mark.parametrize("size", [(6, 8), (5, 7)])
def test_gradients_of_the_convolution(size):
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: conv3x3_of_upsampled(a, b, size), (x, weight))


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that an operator returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().size() // x.itemsize)
        return result


def test_masks_in_pieces_and_the_memory_they_need():
    theirs, ours = make_pair("segmentation", num_queries=23)
    pixel_values, pixel_mask = padded_images()
    largest = {}
    with torch.no_grad():
        for name, model in (("theirs", theirs), ("ours", ours)):
            with LargestTensor() as mode:
                largest[name, "masks"] = model.eval()(pixel_values, pixel_mask).pred_masks
            largest[name] = mode.elements
    torch.testing.assert_close(
        largest["ours", "masks"], largest["theirs", "masks"], rtol=0, atol=1e-4
    )
    assert largest["ours"] <= 0.2 * largest["theirs"]
