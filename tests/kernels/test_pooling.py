"""Max-pooling of codes against torch's, of the same numbers in fp32."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from cdetr_kernels.pooling import codes_unsupported_reason, max_pool_codes

REASON = codes_unsupported_reason()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 70),
    height=st.integers(7, 20),
    width=st.integers(7, 20),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.integers(1, 3),
    padded=st.booleans(),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
)
def test_equals_torch(batch, channels, height, width, kernel, stride, dilation, padded, layout):
    codes = torch.randint(0, 256, (batch, channels, height + 1, width + 2), dtype=torch.uint8)
    codes = codes.contiguous(memory_format=layout)[:, :, 1:, 2:]
    padding = tuple(k // 2 for k in kernel) if padded else (0, 0)
    options = (kernel, stride, padding, (dilation, dilation))
    got = max_pool_codes(codes, *options)
    assert got.dtype == torch.uint8
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(got.float(), F.max_pool2d(codes.float(), *options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": (0, 1)}, "positive sizes"),
        ({"padding": (2, 1)}, "at most half a kernel"),
        ({"kernel": (3, 3, 3)}, "two sizes"),
        ({"kernel": (9, 3), "padding": (0, 0)}, "as large as a window"),
    ],
)
def test_what_would_read_out_of_bounds_is_refused(change, message):
    options = {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1), "dilation": (1, 1)} | change
    with pytest.raises(RuntimeError, match=message):
        max_pool_codes(torch.zeros(1, 2, 8, 8, dtype=torch.uint8), **options)
