"""Annotations of every form become labels and masks, or are refused by image, object and key."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from transformers import ConditionalDetrImageProcessor as Theirs

from cdetr_fast import ConditionalDetrImageProcessor
from cdetr_fast.images.coco import object_mask

SIZE_HW = (50, 70)
GOOD = {
    "id": 4711,
    "bbox": [10, 5, 20, 30],
    "area": 600,
    "category_id": 1,
    "iscrowd": 0,
    "segmentation": [[10, 5, 30, 5, 30, 35, 10, 35]],
}


def labels(annotation, masks=True, image_id=3):
    image = Image.new("RGB", SIZE_HW[::-1])
    processor = ConditionalDetrImageProcessor(do_resize=False)
    content = {"image_id": image_id, "annotations": [copy.deepcopy(GOOD), annotation]}
    return processor(image, annotations=content, return_segmentation_masks=masks).labels[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("category_id", "1"),
        ("category_id", 1.5),
        ("category_id", None),
        ("category_id", True),
        ("bbox", ["10", "5", "20", "30"]),
        ("bbox", [10, 5, 20]),
        ("bbox", [10, 5, 20, float("nan")]),
        ("bbox", "10 5 20 30"),
        ("bbox", {"x": 1}),
        ("area", "600"),
        ("area", None),
        ("iscrowd", "0"),
        ("iscrowd", 2),
        ("keypoints", ["a", 2, 3]),
        ("keypoints", 7),
        ("segmentation", []),
        ("segmentation", [[]]),
        ("segmentation", None),
        ("segmentation", [10, 5, 30, 5, 30, 35]),
        ("segmentation", [[10, 5, 30, 35]]),
        ("segmentation", [[10, 5, 30, 5, 30, 35], [1, 2, 3, 4]]),
        ("segmentation", [[10, 5, 30, 5, 30, 35, 7]]),
        ("segmentation", [[10, 5, 30, 5, 30, "35"]]),
        ("segmentation", [[10, 5, 30, 5, 30, float("inf")]]),
        ("segmentation", [[10, 5, 30, 5, 30, 35], [10, 5, -1e30, 5, 30, 35]]),
        ("segmentation", "polygon"),
        ("segmentation", {"counts": [3500]}),
        ("segmentation", {"size": [70, 50], "counts": [3500]}),
        ("segmentation", {"size": [50, 70]}),
        ("segmentation", {"size": [50, 70], "counts": [3499]}),
        ("segmentation", {"size": [50, 70], "counts": [3501]}),
        ("segmentation", {"size": [50, 70], "counts": [3600, -100]}),
        ("segmentation", {"size": [50, 70], "counts": ["3500"]}),
        ("segmentation", {"size": [50, 70], "counts": [1750.5, 1749.5]}),
        ("segmentation", {"size": [50, 70], "counts": ""}),
        ("segmentation", {"size": [50, 70], "counts": "é"}),
        ("segmentation", {"size": [50, 70], "counts": "oo"}),
    ],
)
def test_refusals_name_image_annotation_and_key(key, value):
    place = rf"annotations\[0\]\['annotations'\]\[1\] \(image id 3, annotation id 4711\): {key}: "
    with pytest.raises((ValueError, TypeError), match=place + "(counts: )?expected .*, got "):
        labels(GOOD | {key: value})
    if key == "segmentation":
        labels(GOOD | {key: value}, masks=False)  # nobody reads it


@pytest.mark.parametrize("value", ["3", 3.5, None])
def test_image_ids_that_are_no_numbers(value):
    with pytest.raises((ValueError, TypeError), match=r"annotations\[0\]: image_id: expected a wh"):
        labels(GOOD, image_id=value)


def test_panoptic_refusals(tmp_path):
    segment = {"id": 1, "category_id": "1", "area": 9}
    content = {"image_id": 3, "file_name": "a.png", "segments_info": [segment]}
    with pytest.raises(TypeError, match=r"\(image id 3, segment id 1\): category_id: expected a"):
        ConditionalDetrImageProcessor(format="coco_panoptic")(
            Image.new("RGB", (9, 9)), annotations=content, masks_path=tmp_path
        )


@pytest.mark.parametrize(
    "change",
    [
        {"category_id": np.int64(1), "bbox": np.array([10, 5, 20, 30]), "area": np.float32(600)},
        {"category_id": torch.tensor(1), "bbox": torch.tensor([10.0, 5, 20, 30])},
        {"category_id": 1.0, "bbox": (10, 5, 20, 30), "iscrowd": False},
        {"bbox": [np.float32(v) for v in (10, 5, 20, 30)], "iscrowd": np.int64(0)},
        {"segmentation": [np.array([10, 5, 30, 5, 30, 35, 10, 35])]},
        {"segmentation": ((10, 5, 30, 5, 30, 35, 10, 35),)},
    ],
)
def test_numbers_of_numpy_and_torch_are_taken(change):
    found = labels(GOOD | change)
    for value in found.values():
        if value.shape[:1] == (2,) and value is not found.size and value is not found.orig_size:
            assert torch.equal(value[0], value[1])


@st.composite
def masks(draw):
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    bits = draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    return np.array(bits, dtype=np.uint8).reshape(height, width)


def runs_of(mask):
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate(([0], edges, [flat.size]))).tolist()
    return [0, *runs] if flat[0] else runs


@settings(max_examples=200, deadline=None)
@given(mask=masks())
def test_run_lengths_in_every_form_decode_as_pycocotools_encodes(mask):
    compressed = coco_mask.encode(np.asfortranarray(mask))
    size = list(mask.shape)
    runs = runs_of(mask)
    forms = [
        compressed,
        compressed | {"counts": compressed["counts"].decode()},
        {"size": size, "counts": runs},
        {"size": tuple(size), "counts": np.array(runs)},
        {"size": np.array(size), "counts": [float(n) for n in runs]},
        [{"size": size, "counts": runs}],
        [compressed, {"size": size, "counts": [mask.size]}],  # the second is empty
    ]
    for form in forms:
        assert np.array_equal(object_mask(form, mask.shape).numpy(), mask.astype(bool))


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=12) | st.binary(max_size=12))
def test_any_text_of_runs_is_decoded_or_refused(text):
    try:
        mask = object_mask({"size": [4, 5], "counts": text}, (4, 5))
    except ValueError as error:
        refusal = str(error)
    else:
        assert mask.shape == (4, 5)
        return
    assert refusal.startswith("segmentation: counts: expected runs of 20 pixels")


@settings(max_examples=100, deadline=None)
@given(
    points=st.lists(st.tuples(st.floats(-9, 80), st.floats(-9, 60)), min_size=3, max_size=7),
    parts=st.integers(1, 3),
)
def test_polygons_are_filled_as_pycocotools_fills_them(points, parts):
    polygon = [value for point in points for value in point]
    polygons = [[v + 3 * i for v in polygon] for i in range(parts)]
    expected = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, *SIZE_HW)))
    assert np.array_equal(object_mask(polygons, SIZE_HW).numpy(), expected.astype(bool))


@pytest.mark.parametrize("do_resize", [True, False])
@pytest.mark.parametrize("png_hw", [(50, 70), (100, 140), (25, 35), (40, 90)])
def test_panoptic_files_of_another_size_as_in_transformers(tmp_path, png_hw, do_resize):
    ids = np.zeros(png_hw, dtype=np.uint8)
    ids[3:20, 4:30], ids[20:] = 7, 9
    Image.fromarray(np.stack([ids, ids * 0, ids * 0], -1)).save(tmp_path / "a.png")
    segments = [{"id": i, "category_id": i, "area": 50, "iscrowd": 0} for i in (7, 9)]
    call = {
        "annotations": {"image_id": 1, "file_name": "a.png", "segments_info": segments},
        "masks_path": tmp_path,
        "return_segmentation_masks": True,
    }
    image = Image.new("RGB", SIZE_HW[::-1])
    options = {
        "format": "coco_panoptic",
        "do_resize": do_resize,
        "size": {"height": 60, "width": 80},
    }
    expected = Theirs(**options)(image, return_tensors="pt", **call)["labels"][0]
    processor = ConditionalDetrImageProcessor(**options)
    if png_hw == SIZE_HW:
        found = processor(image, **call)["labels"][0]
    else:
        with pytest.warns(UserWarning, match=r"a.png: expected \[50, 70\], the size of the image"):
            found = processor(image, **call)["labels"][0]
    assert set(found) == set(expected)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name].to(value.dtype), rtol=0, atol=1e-6)
