"""`detection_topk` against a stable sort in numpy: one contract for all implementations."""

import math
import os
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.topk_cases import KINDS, VALUES, adversarial, expected_order
from torch import Tensor

from cdetr_kernels import detection_topk, native, registry
from cdetr_kernels.ops.detection_topk import reference

HALF_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)
DTYPES = (*HALF_AND_SINGLE, torch.float64)


def implementations(*backends: str):
    """Each backend on each device that is there."""
    parameters = []
    for backend in backends:
        for device in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]:
            absent = native.UNAVAILABLE[device] if backend == "native" else None
            marks = [pytest.mark.skipif(absent is not None, reason=str(absent))]
            marks += [pytest.mark.gpu] if device == "cuda" else []
            parameters.append(
                pytest.param((backend, device), marks=marks, id=f"{backend}-{device}")
            )
    return pytest.mark.parametrize("path", parameters)


each_implementation = implementations("torch", "native")


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """`torch.empty` is filled with NaN and large integers: what is not written is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def takes(path, dtype: torch.dtype) -> bool:
    return path != ("native", "cuda") or dtype in HALF_AND_SINGLE


def run(path, logits: Tensor, boxes_cxcywh: Tensor, *args, **kwargs) -> tuple[Tensor, ...]:
    """Runs one implementation on its device, with results on the CPU."""
    backend, device = path
    results = detection_topk(
        logits.to(device), boxes_cxcywh.to(device), *args, backend=backend, **kwargs
    )
    return tuple(x.cpu() for x in results)


def check_order(path, logits: Tensor, k: int, threshold: float = 0.5):
    """Everything that logits decide: order, labels, scores, counts."""
    batch, queries, classes = logits.shape
    boxes_cxcywh = torch.rand(batch, queries, 4, generator=torch.Generator().manual_seed(k))
    scores, labels, boxes_xyxy, query_index, counts = run(
        path, logits, boxes_cxcywh, k=k, threshold=threshold
    )
    is_double = logits.dtype == torch.float64
    assert scores.dtype == boxes_xyxy.dtype == (torch.float64 if is_double else torch.float32)
    assert labels.dtype == query_index.dtype == counts.dtype == torch.int64
    for i in range(batch):
        wanted = expected_order(logits[i])[:k]
        assert (query_index[i] * classes + labels[i]).tolist() == wanted
        exact = logits[i].flatten()[wanted].double().sigmoid().nan_to_num(0.0)
        torch.testing.assert_close(scores[i].double(), exact, rtol=3e-7, atol=1e-38)
        numbers = ~logits[i].flatten()[wanted].isnan()
        assert counts[i] == ((scores[i] > threshold) & numbers).sum()
    assert not scores.isnan().any()
    assert (scores[:, 1:] <= scores[:, :-1]).all()
    chosen = boxes_cxcywh.gather(1, query_index[..., None].expand(-1, -1, 4)).to(boxes_xyxy.dtype)
    half = 0.5 * chosen[..., 2:]
    corners = torch.cat((chosen[..., :2] - half, chosen[..., :2] + half), dim=-1)
    torch.testing.assert_close(boxes_xyxy, corners, rtol=0, atol=0)


@st.composite
def candidates(draw):
    """Logits `[B, Q, K]`, a k and a threshold."""
    shape = draw(st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(1, 41)))
    values = st.sampled_from([float(np.float32(x)) for x in VALUES]) | st.floats(width=32)
    if draw(st.booleans()):
        values = st.sampled_from(draw(st.lists(values, min_size=1, max_size=3)))
    logits = draw(hnp.arrays(np.float32, shape, elements=values))
    most = shape[1] * shape[2]
    k = draw(st.integers(1, most) | st.sampled_from([1, most]))
    return logits, k, draw(st.sampled_from([0.0, 0.3, 0.5, 1.0, -1.0]) | st.floats(0, 1))


@each_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(case=candidates())
def test_order_equals_a_stable_sort(path, dtype, case):
    logits, k, threshold = case
    if takes(path, dtype):
        check_order(path, torch.from_numpy(logits).to(dtype), k, threshold)


@each_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_that_are_hard_to_select_among(path, kind, dtype):
    for shape, k in (((1, 300, 91), 100), ((2, 97, 31), 300)):
        check_order(path, adversarial(kind, shape).to(dtype), k)


@each_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 63, 100, 300, 1024, 1025, 27300])
def test_sizes_of_a_real_head(path, k, dtype):
    logits = torch.randn(2, 300, 91, generator=torch.Generator().manual_seed(0)).to(dtype)
    if takes(path, dtype):
        check_order(path, logits, k)


@each_implementation
def test_a_large_head(path):
    logits = torch.randn(1, 900, 365, generator=torch.Generator().manual_seed(0))
    for k in (1, 300, 1024):
        check_order(path, logits - 4.6, k, threshold=0.01)


@each_implementation
def test_many_images(path):
    check_order(path, torch.randn(150, 7, 3, generator=torch.Generator().manual_seed(0)), 5)


def test_bf16_logits_tie():
    """The reason for the tie rule: among the best 100 of a usual head many are equal in bf16."""
    logits = torch.randn(1, 300, 91, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert logits.flatten().topk(100).values.unique().numel() < 90


SIZES = [(480, 640), (97.0, 131.0)]


@each_implementation
@pytest.mark.parametrize("sizes", ["list", "float32", "float64", "float16", "int64", "int32"])
def test_boxes_are_corners_in_pixels_of_the_chosen_query(path, sizes):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 3, generator=generator)
    boxes_cxcywh = torch.rand(2, 5, 4, generator=generator)
    given_sizes = SIZES if sizes == "list" else torch.tensor(SIZES).to(getattr(torch, sizes))
    found = run(path, logits, boxes_cxcywh, given_sizes, k=4)
    _, _, boxes_xyxy, query_index = found
    for image, (height, width) in enumerate(SIZES):
        for box, query in zip(boxes_xyxy[image], query_index[image], strict=True):
            cx, cy, w, h = boxes_cxcywh[image, query].tolist()
            corners = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
            scales = (width, height, width, height)
            expected = torch.tensor([c * s for c, s in zip(corners, scales, strict=True)])
            torch.testing.assert_close(box, expected, rtol=1e-5, atol=1e-4)
    relative = run(path, logits, boxes_cxcywh, k=4)[2]
    scale = torch.tensor([640.0, 480.0, 640.0, 480.0])
    torch.testing.assert_close(relative[0] * scale, boxes_xyxy[0])
    if sizes != "list":  # where the logits are, and strided
        there = given_sizes.to(path[1])
        apart = torch.stack((there, there), dim=2)[..., 0]
        for tensor in (there, apart):
            again = run(path, logits, boxes_cxcywh, tensor, k=4)
            assert all(torch.equal(x, y) for x, y in zip(again, found, strict=True))


@each_implementation
@pytest.mark.parametrize("boxes_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_accuracy(path, dtype, boxes_dtype):
    """At most twice the error of the reference in the same dtypes, against fp64."""
    if not takes(path, dtype):
        return
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(2, 40, 9, generator=generator)).to(dtype)
    boxes_cxcywh = torch.rand(2, 40, 4, generator=generator).to(boxes_dtype)
    got = run(path, logits, boxes_cxcywh, [(801, 1333), (7, 5)], k=200)
    sizes = torch.tensor([(801, 1333), (7, 5)])
    torchs = reference.detection_topk(logits, boxes_cxcywh, sizes, 200, 0.5)
    exact = reference.detection_topk(logits.double(), boxes_cxcywh.double(), sizes, 200, 0.5)
    for i in (0, 2):  # scores, boxes
        assert got[i].dtype == torchs[i].dtype
        floor = 2 * torch.finfo(got[i].dtype).eps * exact[i].abs().max()
        error = (got[i] - exact[i]).abs().max()
        assert error <= 2 * (torchs[i] - exact[i]).abs().max() + floor
    for i in (1, 3):
        assert torch.equal(got[i], torchs[i])


@each_implementation
def test_half_precision_boxes_are_scaled_in_fp32(path):
    boxes_cxcywh = torch.full((1, 1, 4), 0.3333).bfloat16()
    _, _, boxes_xyxy, _ = run(path, torch.zeros(1, 1, 1), boxes_cxcywh, [(800, 1333)], k=1)
    exact = boxes_cxcywh[0, 0, 0].double().item()
    assert boxes_xyxy[0, 0, 2].item() == pytest.approx(1.5 * exact * 1333, abs=1e-3)


@each_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_and_misaligned_inputs_and_inputs_unchanged(path, dtype):
    backend, device = path
    generator = torch.Generator().manual_seed(0)
    buffer = torch.randn(3, 91, 40, generator=generator).to(device, dtype)
    boxes = torch.rand(4, 40, 3, generator=generator).to(device).permute(2, 1, 0)
    odd = torch.randn(3 * 40 * 7 + 3, generator=generator).to(device, dtype)[3:].view(3, 40, 7)
    for logits in (buffer.transpose(1, 2), odd, odd[..., 1:], odd[::2], odd.expand(3, -1, -1)):
        boxes_cxcywh = boxes[: len(logits)]
        versions = logits._version, boxes_cxcywh._version
        strided = detection_topk(logits, boxes_cxcywh, k=7, backend=backend)
        assert (logits._version, boxes_cxcywh._version) == versions
        packed = detection_topk(
            logits.contiguous(), boxes_cxcywh.contiguous(), k=7, backend=backend
        )
        assert all(torch.equal(x, y) for x, y in zip(strided, packed, strict=True))


@each_implementation
def test_gradients(path):
    """Of scores and boxes, to the reference's in fp64."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, 3, generator=generator)
    logits[0, 0, 0] = math.nan
    boxes_cxcywh = torch.rand(2, 6, 4, generator=generator)
    sizes = torch.tensor([[4.0, 6.0], [7.0, 5.0]])
    gradients = []
    for dtype, (backend, device) in ((torch.float32, path), (torch.float64, ("torch", "cpu"))):
        inputs = [x.to(device, dtype).requires_grad_() for x in (logits, boxes_cxcywh)]
        scores, _, boxes_xyxy, _ = detection_topk(*inputs, sizes, k=18, backend=backend)
        weights = torch.arange(18.0, device=device)
        loss = (scores * weights).sum() + (boxes_xyxy.square().sum(-1) * weights).sum()
        gradients.append([x.double().cpu() for x in torch.autograd.grad(loss, inputs)])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@each_implementation
def test_compiles_into_one_graph(path):
    backend, device = path
    arguments = torch.randn(2, 6, 4), torch.rand(2, 6, 4), torch.tensor([[5, 6], [7, 8]])
    arguments = [x.to(device) for x in arguments]
    compiled = torch.compile(detection_topk, fullgraph=True, backend="eager")
    for sizes in (arguments[2], None):
        for ours, expected in zip(
            compiled(*arguments[:2], sizes, k=5, backend=backend),
            detection_topk(*arguments[:2], sizes, k=5, backend=backend),
            strict=True,
        ):
            assert torch.equal(ours, expected)


@each_implementation
def test_exports_with_a_dynamic_batch(path):
    backend, device = path

    class Select(torch.nn.Module):
        def forward(self, logits, boxes_cxcywh, sizes_hw):
            return detection_topk(logits, boxes_cxcywh, sizes_hw, k=5, backend=backend)

    def arguments(batch):
        sizes = torch.full((batch, 2), 64.0)
        tensors = torch.randn(batch, 6, 4), torch.rand(batch, 6, 4), sizes
        return tuple(x.to(device) for x in tensors)

    batch = torch.export.Dim("batch")
    exported = torch.export.export(
        Select(), arguments(2), dynamic_shapes=({0: batch}, {0: batch}, {0: batch})
    )
    inputs = arguments(3)
    for ours, expected in zip(exported.module()(*inputs), Select()(*inputs), strict=True):
        assert torch.equal(ours, expected)


@implementations("native")
@pytest.mark.parametrize("sizes", [None, torch.int64, torch.float32])
def test_registration(path, sizes):
    from cdetr_kernels.ops.detection_topk import native as _registered  # noqa: F401

    device = path[1]
    arguments = torch.randn(2, 6, 4, device=device), torch.rand(2, 6, 4, device=device)
    for tensor in arguments:
        tensor.requires_grad_()
    sizes_hw = None if sizes is None else torch.tensor([[4, 5], [6, 7]], dtype=sizes, device=device)
    torch.library.opcheck(
        torch.ops.cdetr_fast.detection_topk.default, (*arguments, sizes_hw, 5, 0.5)
    )


@implementations("native")
def test_the_operator_itself_refuses_what_it_cannot_read(path):
    from cdetr_kernels.ops.detection_topk import native as _registered  # noqa: F401

    device = path[1]
    operator = torch.ops.cdetr_fast.detection_topk
    logits, boxes = torch.zeros(2, 3, 4, device=device), torch.zeros(2, 3, 4, device=device)
    for arguments in (
        (logits, boxes[:1], None, 3, 0.5),
        (logits[0], boxes, None, 3, 0.5),
        (logits, boxes, torch.ones(1, 2), 3, 0.5),
        (logits, boxes, torch.ones(2, 2, dtype=torch.bool), 3, 0.5),
        (logits, boxes, None, 0, 0.5),
        (logits, boxes, None, 13, 0.5),
        (logits.int(), boxes, None, 3, 0.5),
        (logits, boxes.bool(), None, 3, 0.5),
    ):
        with pytest.raises(RuntimeError, match=r"expected|not supported"):
            operator(*arguments)


def test_auto_takes_the_extension_on_a_cpu_where_it_is_built():
    choice = registry.operator("detection_topk").choice()
    if native.UNAVAILABLE["cpu"] is None:
        assert choice.path == "native"
    else:
        assert choice.path == "torch"
        assert "cdetr-fast build-native" in choice.reason
    if os.environ.get("CI") and os.environ.get("CDETR_FAST_NATIVE") != "0":
        assert native.UNAVAILABLE["cpu"] is None


@pytest.mark.parametrize("backend", ["native", "cuda"])
def test_without_the_extension(backend, monkeypatch):
    """Everything works but what is asked for by name, and that says what is missing."""
    absent = "the C++ part of the extension is not built: run `cdetr-fast build-native`"
    monkeypatch.setitem(native.UNAVAILABLE, "cpu", absent)
    arguments = torch.randn(1, 4, 3), torch.rand(1, 4, 4)
    detection_topk(*arguments, k=2)
    with pytest.raises(RuntimeError, match=re.escape(f"{backend!r} cannot run: {absent}")):
        detection_topk(*arguments, k=2, backend=backend)


@pytest.mark.skipif(native.UNAVAILABLE["cpu"] is not None, reason="needs the extension")
def test_what_the_extension_does_not_take():
    logits, boxes = torch.randn(1, 4, 3), torch.rand(1, 4, 4)
    with pytest.raises(RuntimeError, match="'cuda' cannot run: the tensors are on cpu"):
        detection_topk(logits, boxes, k=2, backend="cuda")
    with pytest.raises(RuntimeError, match=r"takes boxes in .*, not torch\.float8"):
        detection_topk(logits, boxes.to(torch.float8_e5m2), k=2, backend="native")
    with pytest.raises(RuntimeError, match="for CPUs and CUDA, and the tensors are on meta"):
        detection_topk(logits.to("meta"), boxes.to("meta"), k=2, backend="native")


@each_implementation
def test_an_empty_batch(path):
    found = run(path, torch.zeros(0, 3, 4), torch.zeros(0, 3, 4), [], k=2, threshold=0.5)
    assert [list(x.shape) for x in found] == [[0, 2], [0, 2], [0, 2, 4], [0, 2], [0]]


LOGITS, BOXES = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((LOGITS.int(), BOXES), TypeError, r"logits: expected a floating point.*torch\.int32"),
        ((LOGITS, BOXES.long()), TypeError, r"boxes_cxcywh: expected a floating point"),
        ((LOGITS[0], BOXES), ValueError, r"logits: expected \[B, Q, K\], got \[3, 4\]"),
        ((LOGITS, BOXES[:1]), ValueError, r"boxes_cxcywh: expected \[2, 3, 4\], got \[1, 3, 4\]"),
        ((LOGITS, BOXES.to("meta")), ValueError, r"boxes_cxcywh: expected cpu as logits, got meta"),
        (
            (LOGITS, BOXES, [(5, 5)], 3),
            ValueError,
            r"target_sizes: expected \[2, 2\].*got \[1, 2\]",
        ),
        (
            (LOGITS, BOXES, torch.ones(2, 3), 3),
            ValueError,
            r"target_sizes: expected \[2, 2\].*got \[2, 3\]",
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
        (
            (LOGITS, BOXES, [(5, math.nan), (4, 6)], 3),
            ValueError,
            r"target_sizes\[0\]: expected a positive height and width, got \[5, nan\]",
        ),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        detection_topk(*arguments)
