"""`detection_topk` against a stable sort in numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cdetr_kernels import detection_topk

# Few distinct values, so that ties abound; both zeros, infinities, NaN, and the extremes of fp32.
VALUES = [0.0, -0.0, 1.0, -1.0, 2.5, np.inf, -np.inf, np.nan, 3.4028235e38, -3.4028235e38, 1e-45]


def expected_order(logits: np.ndarray) -> np.ndarray:
    """Flat indices of `[Q, K]` logits: descending, ties by index, NaN last."""
    flat = logits.astype(np.float64).ravel()
    numbers, nans = np.flatnonzero(~np.isnan(flat)), np.flatnonzero(np.isnan(flat))
    return np.concatenate((numbers[np.argsort(-flat[numbers], kind="stable")], nans))


@st.composite
def candidates(draw):
    """Logits `[B, Q, K]` and a k."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 7)))
    values = st.sampled_from(VALUES) | st.floats(width=32)
    logits = draw(hnp.arrays(np.float32, shape, elements=values))
    return logits, draw(st.integers(1, shape[1] * shape[2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@given(candidates())
def test_order_equals_a_stable_sort(dtype, case):
    logits, k = case
    logits = torch.from_numpy(logits).to(dtype)
    batch, queries, classes = logits.shape
    scores, labels, _, query_index = detection_topk(logits, torch.rand(batch, queries, 4), k=k)
    for i in range(batch):
        expected = expected_order(logits[i].double().numpy())[:k]
        assert (query_index[i] * classes + labels[i]).tolist() == expected.tolist()
        expected_scores = logits[i].flatten()[torch.from_numpy(expected)].float().sigmoid()
        torch.testing.assert_close(scores[i].float(), expected_scores.nan_to_num(0.0))
    assert not scores.isnan().any()
    assert (scores[:, 1:] <= scores[:, :-1]).all()


@pytest.mark.parametrize("k", [1, 63, 100, 300, 27300])
def test_sizes_of_a_real_head(k):
    logits = torch.randn(2, 300, 91, generator=torch.Generator().manual_seed(0)).bfloat16()
    _, labels, _, query_index = detection_topk(logits, torch.rand(2, 300, 4), k=k)
    for i in range(2):
        expected = expected_order(logits[i].double().numpy())[:k]
        assert (query_index[i] * 91 + labels[i]).tolist() == expected.tolist()


@pytest.mark.parametrize("sizes_type", [list, torch.Tensor])
def test_boxes_are_corners_in_pixels_of_the_chosen_query(sizes_type):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 3, generator=generator)
    boxes_cxcywh = torch.rand(2, 5, 4, generator=generator)
    sizes = [(480, 640), (97.0, 131.0)]
    sizes = torch.tensor(sizes) if sizes_type is torch.Tensor else sizes
    _, _, boxes_xyxy, query_index = detection_topk(logits, boxes_cxcywh, sizes, k=4)
    for image, (height, width) in enumerate([(480, 640), (97, 131)]):
        for box, query in zip(boxes_xyxy[image], query_index[image], strict=True):
            cx, cy, w, h = boxes_cxcywh[image, query].tolist()
            corners = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
            scales = (width, height, width, height)
            expected = torch.tensor([c * s for c, s in zip(corners, scales, strict=True)])
            torch.testing.assert_close(box, expected, rtol=1e-5, atol=1e-4)
    relative = detection_topk(logits, boxes_cxcywh, k=4)[2]
    scale = torch.tensor([640.0, 480.0, 640.0, 480.0])
    torch.testing.assert_close(relative[0] * scale, boxes_xyxy[0])


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtypes(dtype, expected):
    scores, labels, boxes_xyxy, query_index = detection_topk(
        torch.randn(1, 4, 3, dtype=dtype), torch.rand(1, 4, 4, dtype=dtype), [(9, 9)], k=2
    )
    assert scores.dtype == boxes_xyxy.dtype == expected
    assert labels.dtype == query_index.dtype == torch.int64


def test_half_precision_boxes_are_scaled_in_fp32():
    boxes_cxcywh = torch.full((1, 1, 4), 0.3333).bfloat16()
    _, _, boxes_xyxy, _ = detection_topk(torch.zeros(1, 1, 1), boxes_cxcywh, [(800, 1333)], k=1)
    exact = boxes_cxcywh[0, 0, 0].double().item()
    assert boxes_xyxy[0, 0, 2].item() == pytest.approx(1.5 * exact * 1333, abs=1e-3)


def test_strided_inputs_and_inputs_unchanged():
    logits = torch.randn(3, 91, 20).transpose(1, 2)[:, ::2]
    boxes_cxcywh = torch.rand(4, 10, 3).permute(2, 1, 0)
    versions = logits._version, boxes_cxcywh._version
    strided = detection_topk(logits, boxes_cxcywh, k=7)
    assert (logits._version, boxes_cxcywh._version) == versions
    for ours, expected in zip(
        strided, detection_topk(logits.contiguous(), boxes_cxcywh.contiguous(), k=7), strict=True
    ):
        assert torch.equal(ours, expected)


def test_compiles_into_one_graph():
    compiled = torch.compile(detection_topk, fullgraph=True, backend="eager")
    arguments = torch.randn(2, 6, 4), torch.rand(2, 6, 4), torch.tensor([[5, 6], [7, 8]])
    for ours, expected in zip(
        compiled(*arguments, k=5), detection_topk(*arguments, k=5), strict=True
    ):
        assert torch.equal(ours, expected)


LOGITS, BOXES = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((LOGITS.int(), BOXES), TypeError, r"logits: expected a floating point.*torch\.int32"),
        ((LOGITS, BOXES.long()), TypeError, r"boxes_cxcywh: expected a floating point"),
        ((LOGITS[0], BOXES), ValueError, r"logits: expected \[B, Q, K\], got \[3, 4\]"),
        ((LOGITS, BOXES[:1]), ValueError, r"boxes_cxcywh: expected \[2, 3, 4\], got \[1, 3, 4\]"),
        (
            (LOGITS, BOXES, [(5, 5)], 3),
            ValueError,
            r"target_sizes: expected \[2, 2\].*got \[1, 2\]",
        ),
        ((LOGITS, BOXES, None, 13), ValueError, r"k: expected 1 to Q\*K = 12, got 13"),
        ((LOGITS, BOXES, None, 0), ValueError, r"k: expected 1 to Q\*K = 12, got 0"),
        ((LOGITS, BOXES, None, 2.0), TypeError, r"k: expected an integer, got float"),
        ((LOGITS[:, :0], BOXES[:, :0], None, 1), ValueError, r"k: expected 1 to Q\*K = 0, got 1"),
        (
            (LOGITS, BOXES, [(5, 5), (4, 0)], 3),
            ValueError,
            r"target_sizes\[1\]: expected a positive height and width, got \[4, 0\]",
        ),
        (
            (LOGITS, BOXES, torch.tensor([[5, 5], [-4, 6]]), 3),
            ValueError,
            r"target_sizes\[1\]: expected a positive height and width, got \[-4, 6\]",
        ),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        detection_topk(*arguments)
