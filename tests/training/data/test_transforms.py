"""Boxes, labels and masks follow the picture; evaluation sees what the image processor makes."""

import multiprocessing

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision import tv_tensors

from cdetr_fast import ConditionalDetrImageProcessor
from cdetr_fast.training.data.coco import read_coco
from cdetr_fast.training.data.dataset import Collate, DetectionDataset
from cdetr_fast.training.data.loader import make_loader
from cdetr_fast.training.data.sampling import ImageRequest, TrainingSampler
from cdetr_fast.training.data.transforms import EvaluationTransform, Sample, TrainingTransform
from cdetr_fast.training.setup import evaluation_loader, pixel_statistics

HEIGHT, WIDTH = 60, 90


def painted(seed):
    """An image whose rectangles are each of a grey of their own, with masks."""
    rng = np.random.default_rng(seed)
    image = torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint8)
    masks, boxes = [], []
    for k in range(3):
        x, y = 30 * k + rng.integers(2, 10), rng.integers(2, 30)
        w, h = rng.integers(10, 18), rng.integers(10, 28)
        image[:, y : y + h, x : x + w] = 80 * (k + 1)
        mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.uint8)
        mask[y : y + h, x : x + w] = 1
        masks.append(mask)
        boxes.append([x, y, x + w, y + h])
    return Sample(
        image,
        tv_tensors.BoundingBoxes(
            torch.tensor(boxes, dtype=torch.float32), format="XYXY", canvas_size=(HEIGHT, WIDTH)
        ),
        torch.arange(3),
        tv_tensors.Mask(torch.stack(masks)),
    )


@given(seed=st.integers(0, 10_000))
def test_boxes_and_masks_are_where_the_object_is(seed):
    transform = TrainingTransform([48, 60, 100], 140, 0.5, 0.7, [60, 80], (30, 60))
    sample = transform(painted(seed), (seed, 0), (seed,))
    assert len(sample.boxes) == len(sample.labels) == len(sample.masks)
    height, width = sample.image.shape[1:]
    assert min(height, width) in (48, 60, 100) or max(height, width) <= 140
    for box, label, mask in zip(sample.boxes, sample.labels, sample.masks, strict=True):
        grey = sample.image[0].float()
        inside = (grey - 80.0 * (label + 1)).abs() < 25
        where = mask.bool()
        assert mask.any()
        rows, columns = torch.nonzero(mask, as_tuple=True)
        extent = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert (extent - box).abs().max() <= 4  # a pixel before a crop is 3.3 after it
        if (box[2:] - box[:2]).min() >= 12:  # the edges are blurred
            assert inside[where].float().mean() > 0.5


def test_images_of_a_step_share_scale_and_crop_but_not_the_flip():
    transform = TrainingTransform([48, 60, 100], 140, 0.5, 0.5, [60, 80], (30, 60))
    flips = set()
    for step in range(8):
        samples = [transform(painted(0), (step, i), (step,)) for i in range(6)]
        assert len({tuple(s.image.shape) for s in samples}) == 1
        flips |= {s.image.numpy().tobytes() for s in samples}
    assert len(flips) > 16


@pytest.fixture
def index(scenes):
    return read_coco(scenes / "train" / "annotations.json")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"size": {"longest_edge": 64}},
        {"rescale_factor": 1 / 127.5, "image_mean": 0.5, "image_std": (0.5, 0.6, 0.7)},
        {"do_normalize": False, "do_convert_annotations": True},
        {"do_rescale": False, "image_mean": (120, 110, 100), "image_std": 60},
        {"do_rescale": False, "do_normalize": False, "do_convert_annotations": True},
    ],
    ids=str,
)
def test_evaluation_is_that_of_the_image_processor(index, settings):
    size = {"shortest_edge": 50, "longest_edge": 70}
    processor = ConditionalDetrImageProcessor(**{"size": size} | settings)
    dataset = DetectionDataset(index, EvaluationTransform(processor.size))
    batch = Collate()([dataset[ImageRequest(0)], dataset[ImageRequest(3)]])
    device = torch.device("cpu")
    inputs = batch.model_inputs(device, *pixel_statistics(processor, device))
    paths = [index.image_path(i) for i in (0, 3)]
    from PIL import Image

    annotations = [
        {
            "image_id": 0,
            "annotations": [
                {"bbox": b.tolist(), "category_id": int(c), "area": 1.0, "iscrowd": 0}
                for b, c in zip(
                    index.boxes_xywh[index.objects(i)], index.labels[index.objects(i)], strict=True
                )
            ],
        }
        for i in (0, 3)
    ]
    expected = processor(
        images=[Image.open(path) for path in paths], annotations=annotations, return_tensors="pt"
    )
    expected_values = expected["pixel_values"].float()  # uint8 if nothing is done to them
    torch.testing.assert_close(inputs["pixel_values"], expected_values, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(inputs["labels"], expected["labels"], strict=True):
        assert torch.equal(ours["class_labels"], theirs["class_labels"])
        torch.testing.assert_close(ours["boxes"], theirs["boxes"])


def test_batches_do_not_depend_on_workers(index):
    """And leave the random numbers of the process alone."""
    sampler = TrainingSampler(index.sizes_hw[:, 1] / index.sizes_hw[:, 0], 3)
    transform = TrainingTransform([48, 64], 96, 0.5, 0.5, [64], (40, 60))
    dataset = DetectionDataset(index, transform)
    state = torch.get_rng_state()
    alone, shared = (list(make_loader(dataset, sampler, workers, 16, False)) for workers in (0, 2))
    assert torch.equal(state, torch.get_rng_state())
    for a, b in zip(alone, shared, strict=True):
        assert torch.equal(a.pixels, b.pixels)
        assert a.image_ids == b.image_ids
        assert a.pixels.shape[2] % 16 == a.pixels.shape[3] % 16 == 0
        for x, y in zip(a.labels, b.labels, strict=True):
            assert torch.equal(x["boxes"], y["boxes"])


def test_workers_of_a_loader_that_is_read_once_end_with_it(index):
    """While the loader lives: a garbage collector that finds it later would wait for them."""
    size = {"shortest_edge": 48, "longest_edge": 64}
    before = multiprocessing.active_children()
    loader = evaluation_loader(index, 2, size, 2)
    assert sum(len(batch.indices) for batch in loader) == len(index)
    assert multiprocessing.active_children() == before


def test_padding_is_masked():
    items = [
        {
            "pixels": torch.full((3, h, w), 9, dtype=torch.uint8),
            "label": {
                "class_labels": torch.zeros(0, dtype=torch.int64),
                "boxes": torch.zeros(0, 4),
            },
            "image_id": 0,
            "index": 0,
            "counted": True,
            "orig_size_hw": (h, w),
            "segment_map": None,
        }
        for h, w in [(20, 30), (25, 10)]
    ]
    batch = Collate(16)(items)
    assert batch.pixels.shape == (2, 3, 32, 32)
    assert torch.equal(batch.pixels[:, 0] > 0, batch.pixel_mask)
    values = batch.model_inputs(torch.device("cpu"), torch.ones(3, 1, 1), torch.ones(3, 1, 1))
    assert torch.equal(values["pixel_values"] != 0, batch.pixel_mask[:, None].expand(2, 3, 32, 32))
    assert Collate()(items[:1]).pixel_mask is None
