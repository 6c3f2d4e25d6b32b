"""Model outputs to results, against transformers where it is right, and where it is not."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from cdetr_fast.images import BatchFeature, ConditionalDetrImageProcessor

OURS = ConditionalDetrImageProcessor()
COMPATIBLE = ConditionalDetrImageProcessor(compat="transformers")
THEIRS = transformers.ConditionalDetrImageProcessor()
SIZES = [(60, 80), (33, 47)]


def detection_outputs(dtype=torch.float32, queries=50, classes=13) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, queries, classes, generator=generator) * 2 - 2
    boxes = torch.rand(2, queries, 4, generator=generator)
    return SimpleNamespace(logits=logits.to(dtype), pred_boxes=boxes.to(dtype))


def segmentation_outputs(queries=12, classes=5, seed=0) -> SimpleNamespace:
    """Smooth random masks, confident classes, the last class among them."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, queries, classes, generator=generator) * 4
    masks = torch.randn(2, queries, 5, 6, generator=generator) * 6
    masks = torch.nn.functional.interpolate(masks, (20, 25), mode="bilinear")
    return SimpleNamespace(logits=logits, pred_masks=masks)


def scene(logits: list[list[float]], masks: list[list[int]]) -> SimpleNamespace:
    """One image of one row of pixels; mask value 1 is inside, 0 is outside."""
    masks = torch.tensor(masks, dtype=torch.float32)[None, :, None]
    return SimpleNamespace(logits=torch.tensor([logits]), pred_masks=masks * 20 - 10)


# --- detection --------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.999])
@pytest.mark.parametrize("top_k", [1, 100, 10_000])
@pytest.mark.parametrize(
    "sizes", [None, SIZES, torch.tensor(SIZES), [torch.tensor(s) for s in SIZES]]
)
def test_detection_equals_transformers(threshold, top_k, sizes):
    outputs = detection_outputs()
    ours = OURS.post_process_object_detection(outputs, threshold, sizes, top_k)
    theirs = THEIRS.post_process_object_detection(outputs, threshold, sizes, top_k)
    assert len(ours) == len(theirs) == 2
    for mine, expected in zip(ours, theirs, strict=True):
        assert set(mine) == set(expected)
        for key in mine:
            assert mine[key].dtype == expected[key].dtype
            torch.testing.assert_close(mine[key], expected[key], rtol=1e-6, atol=1e-6)


def test_nan_is_no_detection():
    outputs = detection_outputs()
    outputs.logits[0, 3] = float("nan")
    results = OURS.post_process_object_detection(outputs, threshold=0.0, top_k=10_000)
    assert len(results[0]["scores"]) == 49 * 13
    assert not results[0]["scores"].isnan().any()
    theirs = THEIRS.post_process_object_detection(outputs, threshold=0.5, top_k=10)
    assert len(theirs[0]["scores"]) == 0  # there, NaN ranks first and pushes detections out
    assert len(OURS.post_process_object_detection(outputs, 0.5, top_k=10)[0]["scores"]) == 10


def test_half_precision_scores_are_fp32():
    outputs = detection_outputs(torch.bfloat16)
    result = OURS.post_process_object_detection(outputs, 0.0, SIZES)[0]
    assert result["scores"].dtype == result["boxes"].dtype == torch.float32


def test_scalars_of_numpy_and_torch():
    outputs = detection_outputs()
    function = OURS.post_process_object_detection
    expected = function(outputs, 0.25, top_k=5)
    for threshold, top_k in (
        (np.float32(0.25), np.int64(5)),
        (torch.tensor(0.25), torch.tensor(5)),
    ):
        got = function(outputs, threshold, top_k=top_k)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_detection_errors():
    outputs = detection_outputs()
    function = OURS.post_process_object_detection
    with pytest.raises(ValueError, match=r"target_sizes: expected \[2, 2\] .* got \[1, 2\]"):
        function(outputs, target_sizes=SIZES[:1])
    for bad in (0, -1):
        with pytest.raises(ValueError, match=f"top_k: expected an integer >= 1, got {bad}"):
            function(outputs, top_k=bad)
    for bad in (1.0, True, None):
        with pytest.raises(TypeError, match="top_k: expected an integer"):
            function(outputs, top_k=bad)
    for flat in ((60, 80), [(60, 80), None], [(60, 80), (1, 2, 3)], "ab"):
        with pytest.raises(TypeError, match=r"target_sizes: expected \[2, 2\] \(height, width\)"):
            function(outputs, target_sizes=flat)
    for bad in ([(60, 80), (0, 3)], torch.tensor([(60, 80), (5, -3)])):
        with pytest.raises(ValueError, match=r"target_sizes\[1\]: expected a positive"):
            function(outputs, target_sizes=bad)
    with pytest.raises(ValueError, match="return_tensors: expected None or 'pt', got 'np'"):
        function(outputs, return_tensors="np")


@pytest.mark.parametrize(("batch", "queries"), [(0, 5), (2, 0)])
@pytest.mark.parametrize("sizes", [None, SIZES])
def test_detection_of_nothing(batch, queries, sizes):
    outputs = SimpleNamespace(
        logits=torch.zeros(batch, queries, 3), pred_boxes=torch.zeros(batch, queries, 4)
    )
    sizes = sizes and sizes[:batch]
    results = OURS.post_process_object_detection(outputs, 0.1, sizes)
    assert [len(r["scores"]) for r in results] == [0] * batch
    assert all(r["boxes"].shape == (0, 4) for r in results)
    tensors = OURS.post_process_object_detection(outputs, 0.1, sizes, return_tensors="pt")
    assert tensors["boxes"].shape == (batch, min(100, queries * 3), 4)
    assert tensors["counts"].tolist() == [0] * batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_tensors_of_the_batch_hold_the_lists(dtype, threshold):
    outputs = detection_outputs(dtype)
    outputs.logits[1] -= 1.0  # images with different counts
    lists = OURS.post_process_object_detection(outputs, threshold, SIZES, 60)
    tensors = OURS.post_process_object_detection(outputs, threshold, SIZES, 60, return_tensors="pt")
    assert isinstance(tensors, BatchFeature)
    assert tensors.counts.tolist() == [len(result["scores"]) for result in lists]
    for image, result in enumerate(lists):
        count = len(result["scores"])
        for key in ("scores", "labels", "boxes"):
            assert torch.equal(tensors[key][image, :count], result[key])
        assert (tensors.scores[image, count:] <= threshold).all()
        logits = outputs.logits[image, tensors.query_index[image], tensors.labels[image]]
        torch.testing.assert_close(logits.float().sigmoid(), tensors.scores[image])


# --- segmentation, compat="transformers" ----------------------------------------------------------


@pytest.mark.parametrize("sizes", [None, SIZES])
def test_compatible_semantic_maps(sizes):
    outputs = segmentation_outputs()
    ours = COMPATIBLE.post_process_semantic_segmentation(outputs, sizes)
    theirs = THEIRS.post_process_semantic_segmentation(outputs, sizes)
    for mine, expected in zip(ours, theirs, strict=True):
        assert torch.equal(mine, expected)
    scored = COMPATIBLE.post_process_semantic_segmentation(outputs, sizes, True)
    expected = THEIRS.post_process_semantic_segmentation(outputs, sizes, True)
    torch.testing.assert_close(scored[1].segmentation_scores, expected[1].segmentation_scores)
    assert torch.equal(scored[1]["segmentation"], theirs[1])


@pytest.mark.parametrize("sizes", [None, SIZES, torch.tensor(SIZES)])
@pytest.mark.parametrize("threshold", [0.3, 0.8, 0.99999])
@pytest.mark.parametrize("overlap", [0.0, 0.8])
def test_compatible_instances_and_panoptic(sizes, threshold, overlap):
    outputs = segmentation_outputs()
    their_sizes = sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes
    their_sizes = their_sizes and [tuple(size) for size in their_sizes]
    arguments = {"threshold": threshold, "overlap_mask_area_threshold": overlap}
    for name, extra in (("instance", {}), ("panoptic", {"label_ids_to_fuse": {0, 2}})):
        function = f"post_process_{name}_segmentation"
        ours = getattr(COMPATIBLE, function)(outputs, target_sizes=sizes, **arguments, **extra)
        theirs = getattr(THEIRS, function)(outputs, target_sizes=their_sizes, **arguments, **extra)
        for mine, expected in zip(ours, theirs, strict=True):
            assert mine["segments_info"] == expected["segments_info"]
            if (threshold, overlap) == (0.3, 0.0):
                assert len(mine["segments_info"]) > 1
            assert mine["segmentation"].dtype == torch.int32
            assert mine["segmentation"].tolist() == expected["segmentation"].tolist()


def test_compatible_run_lengths():
    outputs = segmentation_outputs()
    for overlap in (0.2, 0.99):  # some segments; queries, but no segment
        arguments = {"overlap_mask_area_threshold": overlap, "return_coco_annotation": True}
        ours = COMPATIBLE.post_process_instance_segmentation(outputs, **arguments)
        theirs = THEIRS.post_process_instance_segmentation(outputs, **arguments)
        assert [r["segmentation"] for r in ours] == [r["segmentation"] for r in theirs]
        assert ours[0]["segmentation"]
    maps = COMPATIBLE.post_process_instance_segmentation(outputs, return_coco_annotation=None)
    assert maps[0]["segmentation"].shape == outputs.pred_masks.shape[-2:]
    nothing = scene([[-9.0, -9.0]], [[1, 1, 0, 0]])
    kept = COMPATIBLE.post_process_instance_segmentation(nothing, return_coco_annotation=True)
    assert kept[0]["segmentation"].tolist() == [[-1, -1, -1, -1]]


# --- segmentation as it should be; each test shows what transformers does instead -----------------


def test_the_last_class_is_returned():
    outputs = scene([[-5.0, -5.0, 4.0]], [[1, 1, 0, 0]])
    ours = OURS.post_process_instance_segmentation(outputs)[0]
    assert ours["segments_info"] == [
        {
            "id": 1,
            "label_id": 2,
            "was_fused": False,
            "score": round(torch.tensor(4.0).sigmoid().item(), 6),
        }
    ]
    assert OURS.post_process_panoptic_segmentation(outputs)[0]["segments_info"][0]["label_id"] == 2
    for name in ("instance", "panoptic"):
        theirs = getattr(THEIRS, f"post_process_{name}_segmentation")(outputs)[0]
        assert theirs["segments_info"] == []


def test_scores_are_sigmoids():
    # A query that is sure of nothing: its softmax is as good as certain.
    outputs = scene([[-4.0, -9.0, -9.0]], [[1, 1, 0, 0]])
    assert OURS.post_process_instance_segmentation(outputs)[0]["segments_info"] == []
    theirs = THEIRS.post_process_instance_segmentation(outputs)[0]
    assert theirs["segments_info"][0]["score"] > 0.98


def test_a_single_object_does_not_fill_the_picture():
    outputs = scene([[4.0, -5.0, -5.0]], [[1, 1, 0, 0]])
    for name in ("instance", "panoptic"):
        function = f"post_process_{name}_segmentation"
        assert getattr(OURS, function)(outputs)[0]["segmentation"].tolist() == [[1, 1, 0, 0]]
        assert getattr(THEIRS, function)(outputs)[0]["segmentation"].tolist() == [[1, 1, 1, 1]]


def test_the_score_does_not_shrink_the_mask():
    # Score 0.62, mask probability 0.73: both above one half, their product is not.
    outputs = scene([[0.5, -9.0, -9.0]], [[1, 1, 0, 0]])
    outputs.pred_masks = outputs.pred_masks / 10  # logits +1 and -1
    assert len(OURS.post_process_instance_segmentation(outputs)[0]["segments_info"]) == 1
    outputs.logits = torch.tensor([[[0.5, 0.0, -9.0]]])  # softmax 0.62
    assert THEIRS.post_process_instance_segmentation(outputs)[0]["segments_info"] == []


def test_a_pixel_goes_to_a_query_whose_mask_has_it():
    outputs = scene([[9.0, -9.0], [0.5, -9.0]], [[1, 1, 0, 0], [0, 0, 1, 0]])
    outputs.pred_masks[0, 0, 0, 2] = -0.1  # 0.475 of a certain query; 0.62 * 1 of the other
    outputs.pred_masks[0, 1, 0, 2] = 0.4  # 0.6 * 0.62 = 0.37
    segmentation = OURS.post_process_instance_segmentation(outputs)[0]["segmentation"]
    assert segmentation.tolist() == [[1, 1, 2, 0]]


def test_a_hidden_segment_is_dropped():
    outputs = scene([[9.0, -9.0], [4.0, -9.0]], [[1, 1, 1, 0], [1, 1, 1, 1]])
    result = OURS.post_process_instance_segmentation(outputs)[0]
    assert len(result["segments_info"]) == 1
    assert result["segmentation"].tolist() == [[1, 1, 1, 0]]
    result = OURS.post_process_instance_segmentation(outputs, overlap_mask_area_threshold=0.2)[0]
    assert result["segmentation"].tolist() == [[1, 1, 1, 2]]


def test_fused_parts_are_one_segment_and_ids_stay_unique():
    stuff, thing = [4.0, -9.0, -9.0], [-9.0, 5.0, -9.0]
    outputs = scene(
        [stuff, thing, [6.0, -9.0, -9.0], thing],
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]],
    )
    ours = OURS.post_process_panoptic_segmentation(outputs, label_ids_to_fuse={0})[0]
    assert ours["segmentation"].tolist() == [[1, 2, 1, 3]]
    assert [info["id"] for info in ours["segments_info"]] == [1, 2, 3]
    assert ours["segments_info"][0]["was_fused"]
    assert ours["segments_info"][0]["score"] == round(torch.tensor(6.0).sigmoid().item(), 6)
    theirs = THEIRS.post_process_panoptic_segmentation(outputs, label_ids_to_fuse={0})[0]
    assert theirs["segmentation"].tolist() == [[1, 2, 1, 2]]  # two things, one id


def test_every_pixel_is_assigned_as_in_detr_without_thresholds():
    outputs = segmentation_outputs()
    results = OURS.post_process_panoptic_segmentation(
        outputs, mask_threshold=0.0, overlap_mask_area_threshold=0.0, target_sizes=SIZES
    )
    for result, size in zip(results, SIZES, strict=True):
        assert result["segmentation"].shape == size
        assert (result["segmentation"] > 0).all()


def test_empty_queries_do_not_outvote_a_certain_one():
    certain, empty = [6.0, -9.0], [-8.0, -5.0]
    outputs = scene([certain, empty, empty], [[1, 1], [1, 1], [1, 1]])
    assert OURS.post_process_semantic_segmentation(outputs)[0].tolist() == [[0, 0]]
    assert THEIRS.post_process_semantic_segmentation(outputs)[0].tolist() == [[1, 1]]


def test_nothing_found():
    outputs = scene([[-9.0, -9.0]], [[1, 1, 0, 0]])
    for sizes, shape in ((None, (1, 4)), ([(3, 5)], (3, 5))):
        result = OURS.post_process_instance_segmentation(outputs, target_sizes=sizes)[0]
        assert result["segments_info"] == []
        assert result["segmentation"].shape == shape
        assert (result["segmentation"] == -1).all()
    runs = OURS.post_process_instance_segmentation(outputs, return_coco_annotation=True)[0]
    assert runs == {"segmentation": [], "segments_info": []}


def test_run_lengths_follow_the_segments():
    outputs = segmentation_outputs(seed=1)
    arguments = {"target_sizes": SIZES, "overlap_mask_area_threshold": 0.3}
    maps = OURS.post_process_instance_segmentation(outputs, **arguments)
    coded = OURS.post_process_instance_segmentation(
        outputs, return_coco_annotation=True, **arguments
    )
    assert sum(len(result["segments_info"]) for result in maps) > 3
    for expected, result, size in zip(maps, coded, SIZES, strict=True):
        assert result["segments_info"] == expected["segments_info"]
        decoded = np.zeros(size[0] * size[1], dtype=np.int32)
        for info, code in zip(result["segments_info"], result["segmentation"], strict=True):
            for start, length in zip(code[::2], code[1::2], strict=True):
                decoded[start - 1 : start - 1 + length] = info["id"]
        assert np.array_equal(decoded.reshape(size), expected["segmentation"].numpy())


def test_segmentation_of_half_precision_and_its_inputs_unchanged():
    outputs = segmentation_outputs()
    half = SimpleNamespace(
        logits=outputs.logits.bfloat16(), pred_masks=outputs.pred_masks.bfloat16()
    )
    masks = half.pred_masks.clone()
    upcast = SimpleNamespace(logits=half.logits.float(), pred_masks=masks.float())
    for name in ("instance", "panoptic"):
        function = getattr(OURS, f"post_process_{name}_segmentation")
        for mine, expected in zip(function(half), function(upcast), strict=True):
            assert mine["segments_info"] == expected["segments_info"]
            assert torch.equal(mine["segmentation"], expected["segmentation"])
    scores = OURS.post_process_semantic_segmentation(half, return_segmentation_scores=True)
    assert isinstance(scores[0], BatchFeature)
    assert scores[0].segmentation_scores.dtype == torch.float32
    assert torch.equal(half.pred_masks, masks)


@pytest.mark.parametrize("name", ["semantic", "instance", "panoptic"])
def test_segmentation_errors(name):
    function = getattr(OURS, f"post_process_{name}_segmentation")
    with pytest.raises(ValueError, match=r"target_sizes: expected 2 .* got 1"):
        function(segmentation_outputs(), target_sizes=SIZES[:1])


@pytest.mark.parametrize("name", ["semantic", "instance", "panoptic"])
@pytest.mark.parametrize("bad", [(0, 5), (5, -1), (5,)])
def test_segmentation_refuses_sizes(name, bad):
    function = getattr(OURS, f"post_process_{name}_segmentation")
    with pytest.raises(ValueError, match=r"target_sizes\[1\]: expected \(height, width\) above 0"):
        function(segmentation_outputs(), target_sizes=[(3, 4), bad])


# --- the maps against their plain definition ------------------------------------------------------


def plain_owners(masks, scores, size, mask_threshold):
    """All masks upsampled at once; the owner of each pixel and by how much it leads."""
    maps = torch.nn.functional.interpolate(masks[None].double(), size, mode="bilinear")[0].sigmoid()
    weighted = (maps * scores[:, None, None]).masked_fill(maps < mask_threshold, -1.0)
    weighted = torch.cat((weighted, torch.full((1, *size), -0.5, dtype=torch.float64)))
    best = weighted.topk(2, dim=0)
    near_threshold = ((maps - mask_threshold).abs() < 1e-5).any(dim=0)
    return best.indices[0], (best.values[0] - best.values[1] > 1e-5) & ~near_threshold


@given(
    small=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    large=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    queries=st.integers(1, 6),
    mask_threshold=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    spread=st.sampled_from([1.0, 8.0, 40.0]),
    seed=st.integers(0, 99),
)
def test_each_pixel_goes_to_the_best_query_that_has_it(
    small, large, queries, mask_threshold, spread, seed
):
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randn(queries, *small, generator=generator) * spread
    logits = torch.rand(queries, 1, generator=generator) * 6  # all above 0.5
    outputs = SimpleNamespace(logits=logits[None], pred_masks=masks[None])
    (result,) = OURS.post_process_instance_segmentation(
        outputs, 0.4, mask_threshold, -1.0, target_sizes=[large]
    )
    owners, clear = plain_owners(masks, logits[:, 0].double().sigmoid(), large, mask_threshold)
    # A share above -1 keeps every query with a pixel, numbered in the order of the queries.
    present = result["segmentation"].unique().tolist()
    assert [i for i in present if i > 0] == [info["id"] for info in result["segments_info"]]
    scores = logits[:, 0].sigmoid()
    for info in result["segments_info"]:
        (query,) = [q for q in range(queries) if abs(scores[q] - info["score"]) < 2e-6][:1]
        assert torch.equal((result["segmentation"] == info["id"])[clear], (owners == query)[clear])
    assert torch.equal((result["segmentation"] == 0)[clear], (owners == queries)[clear])


def test_many_queries_need_no_more_memory_than_one():
    tracer = LargestTensor()
    outputs = segmentation_outputs(queries=40)
    outputs.logits += 6  # all are kept
    size = (300, 400)
    for compat in ("paper", "transformers"):
        processor = ConditionalDetrImageProcessor(compat=compat)
        for name in ("instance", "panoptic", "semantic"):
            with tracer:
                getattr(processor, f"post_process_{name}_segmentation")(
                    outputs, target_sizes=[size] * 2
                )
    assert tracer.elements == 300 * 400


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_coco_run_lengths():
    coco_mask = pytest.importorskip("pycocotools.mask")
    outputs = segmentation_outputs(seed=1)
    arguments = {"target_sizes": SIZES, "overlap_mask_area_threshold": 0.3}
    for processor in (OURS, COMPATIBLE):
        maps = processor.post_process_instance_segmentation(outputs, **arguments)
        coded = processor.post_process_instance_segmentation(
            outputs, return_coco_annotation="rle", **arguments
        )
        assert sum(len(result["segments_info"]) for result in maps) > 3
        for expected, result in zip(maps, coded, strict=True):
            assert result["segments_info"] == expected["segments_info"]
            runs = json.loads(json.dumps(result["segmentation"]))
            for info, code in zip(result["segments_info"], runs, strict=True):
                mask = coco_mask.decode(code)
                assert np.array_equal(mask, expected["segmentation"] == info["id"])
    nothing = scene([[-9.0, -9.0]], [[1, 1, 0, 0]])
    kept = OURS.post_process_instance_segmentation(nothing, return_coco_annotation="rle")
    assert kept[0]["segmentation"] == []
    with pytest.raises(ValueError, match="return_coco_annotation: expected True, False or 'rle'"):
        OURS.post_process_instance_segmentation(outputs, return_coco_annotation="RLE")


def test_coco_run_lengths_without_pycocotools(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ImportError, match=r"pip install 'cdetr-fast\[eval\]'"):
        OURS.post_process_instance_segmentation(
            segmentation_outputs(), return_coco_annotation="rle"
        )
