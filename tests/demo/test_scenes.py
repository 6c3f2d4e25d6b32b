"""Procedural scenes: deterministic, within their stated limits, with boxes that fit the pixels."""

import json

import numpy as np
import pytest
from PIL import Image

from cdetr_fast.demo import scenes
from cdetr_fast.demo.scenes import CLASSES, coco_ground_truth, draw_scene, write_coco_dataset

SIZES = [(128, 128), (96, 160), (200, 120)]


def test_same_seed_same_scene():
    first, truth = draw_scene(7)
    again, truth_again = draw_scene(7)
    assert first.tobytes() == again.tobytes()
    np.testing.assert_array_equal(truth["boxes_xyxy"], truth_again["boxes_xyxy"])
    np.testing.assert_array_equal(truth["labels"], truth_again["labels"])
    assert draw_scene(8)[0].tobytes() != first.tobytes()


@pytest.mark.parametrize("size", SIZES)
def test_scene_keeps_its_limits(size):
    height, width = size
    counts = set()
    for seed in range(60):
        image, truth = draw_scene(seed, size)
        boxes, labels = truth["boxes_xyxy"], truth["labels"]
        assert image.mode == "RGB"
        assert image.size == (width, height)
        assert truth["size"] == size
        assert truth["seed"] == seed
        assert boxes.dtype == np.float32
        assert boxes.shape == (len(labels), 4)
        assert labels.dtype == np.int64
        assert set(labels.tolist()) <= set(range(len(CLASSES)))
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2:] <= [width, height]).all()
        sides = (boxes[:, 2:] - boxes[:, :2]).max(1) / min(size)
        # The edge of the image may cut off as much as the allowed overhang.
        low, high = scenes.OBJECT_SIZES
        assert sides.min() >= low * (1 - scenes._OVERHANG) - 1e-6
        assert sides.max() <= high + 1e-6
        counts.add(len(labels))
    assert counts == set(range(1, 11))


def test_all_classes_and_sizes_occur():
    truths = [draw_scene(seed)[1] for seed in range(150)]
    labels = np.concatenate([truth["labels"] for truth in truths])
    boxes = np.concatenate([truth["boxes_xyxy"] for truth in truths])
    assert len(CLASSES) >= 5
    shares = np.bincount(labels, minlength=len(CLASSES)) / len(labels)
    assert shares.min() > 0.5 / len(CLASSES)
    sides = (boxes[:, 2:] - boxes[:, :2]).max(1) / scenes.SIZE[0]
    assert sides.min() < 0.1
    assert sides.max() > 0.5


@pytest.mark.parametrize("seed", range(20))
def test_box_is_the_extent_of_the_changed_pixels(seed, monkeypatch):
    # One object in front of the background that the same seed draws, without texture and noise.
    drawn = []

    def plain(rng, colour, height, width, strength, period):
        drawn.append(colour)
        return np.broadcast_to(colour, (height, width, 3))

    class Quiet(np.random.Generator):
        def standard_normal(self, *args, **kwargs):
            return np.float32(0)

    monkeypatch.setattr(scenes, "_texture", plain)
    monkeypatch.setattr(np.random, "default_rng", lambda s: Quiet(np.random.PCG64(s)))
    image, truth = draw_scene(seed, (100, 140), max_objects=1)
    background = np.rint(drawn[0] * 255)
    changed = np.abs(np.asarray(image) - background).max(2) > 0.25 * 255 * scenes.MIN_CONTRAST
    y, x = changed.nonzero()
    extent = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])
    (box,) = truth["boxes_xyxy"]
    np.testing.assert_allclose(extent, box, atol=1.5)  # a sharp tip covers little of its pixel


def test_overlap_leaves_objects_visible(monkeypatch):
    # Paint every object in a colour of its own, then count what is left of each.
    fills = []

    def numbered(rng, colour, height, width, strength, period):
        fills.append((height, width))
        shade = np.float32((len(fills) - 1) * 20 / 255)
        return np.full((height, width, 3), shade, np.float32)

    alone = {}
    cover = scenes._coverage

    def solid(polygons, *corners):
        mask = (cover(polygons, *corners) > 0.5).astype(np.float32)
        alone[len(fills)] = mask.sum()  # attempts that are refused get overwritten
        return mask

    class Quiet(np.random.Generator):
        def standard_normal(self, *args, **kwargs):
            return np.float32(0)

    monkeypatch.setattr(scenes, "_texture", numbered)
    monkeypatch.setattr(scenes, "_coverage", solid)
    monkeypatch.setattr(np.random, "default_rng", lambda s: Quiet(np.random.PCG64(s)))
    hidden = 0
    for seed in range(30):
        fills.clear()
        alone.clear()
        image, truth = draw_scene(seed, min_objects=10)
        pixels = np.asarray(image)[..., 0]
        for index in range(1, len(truth["labels"]) + 1):
            visible = (pixels == 20 * index).sum() / alone[index]
            assert visible >= scenes.MIN_VISIBLE
            hidden += visible < 1
    assert hidden > 20  # overlap does occur


def test_coco_ground_truth():
    truths = [draw_scene(seed)[1] for seed in range(3)]
    coco = coco_ground_truth(truths)
    assert [c["name"] for c in coco["categories"]] == list(CLASSES)
    assert [i["id"] for i in coco["images"]] == [0, 1, 2]
    ids = [a["id"] for a in coco["annotations"]]
    assert len(set(ids)) == len(ids) == sum(len(t["labels"]) for t in truths)
    assert min(ids) > 0
    for image_id, truth in enumerate(truths):
        own = [a for a in coco["annotations"] if a["image_id"] == image_id]
        xywh = np.array([a["bbox"] for a in own])
        np.testing.assert_allclose(
            np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1),
            truth["boxes_xyxy"],
            rtol=1e-6,
        )
        assert [a["category_id"] for a in own] == truth["labels"].tolist()
        np.testing.assert_allclose([a["area"] for a in own], xywh[:, 2] * xywh[:, 3])


def test_write_coco_dataset(tmp_path):
    path = write_coco_dataset(tmp_path / "new", [3, 5], (64, 96))
    coco = json.loads(path.read_text())
    for entry, seed in zip(coco["images"], [3, 5], strict=True):
        with Image.open(path.parent / entry["file_name"]) as image:
            assert image.tobytes() == draw_scene(seed, (64, 96))[0].tobytes()
        assert (entry["height"], entry["width"]) == (64, 96)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": (16, 64)}, r"size: expected height and width of at least 32, got \(16, 64\)"),
        ({"min_objects": 3, "max_objects": 2}, "min_objects <= max_objects, got 3, 2"),
        ({"min_objects": 0}, "min_objects <= max_objects, got 0, 10"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw_scene(0, **arguments)
