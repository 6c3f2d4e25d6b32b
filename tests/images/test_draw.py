"""Drawing: what is drawn where, in which colour, and what stays as it was."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from cdetr_fast.images.draw import class_colour, contact_sheet, draw_detections, draw_masks

NAMES = {0: "cat", 1: "remote control"}


def grey(width: int = 64, height: int = 48, mode: str = "RGB") -> Image.Image:
    return Image.new("RGB", (width, height), (90, 90, 90)).convert(mode)


def changed(before: Image.Image, after: Image.Image) -> np.ndarray:
    return (np.asarray(before.convert("RGB")) != np.asarray(after)).any(-1)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "CMYK"])
@pytest.mark.parametrize("size", [(1, 1), (7, 300), (640, 480)])
def test_draws_on_any_mode_and_size(mode, size):
    image = grey(*size, mode=mode)
    copy = image.copy()
    result = draw_detections(image, [[0, 0, *size]], [1], [0.5], NAMES)
    assert (result.mode, result.size) == ("RGB", size)
    assert changed(image, result).any()
    assert image.tobytes() == copy.tobytes()


def test_box_is_outlined_in_the_colour_of_its_class():
    image = grey(200, 200)
    result = np.asarray(draw_detections(image, [[40, 60, 160, 180]], [1], None, NAMES))
    for y, x in [(60, 150), (180, 100), (120, 40), (120, 160)]:
        assert tuple(result[y, x]) == class_colour(1)
    assert tuple(result[120, 100]) == (90, 90, 90)


def test_caption_grows_with_the_image():
    heights = []
    for scale in (1, 8):
        image = grey(300 * scale, 300 * scale)
        box = [[100 * scale, 150 * scale, 280 * scale, 280 * scale]]
        above = changed(image, draw_detections(image, box, [0], [0.9], NAMES))[: 149 * scale]
        heights.append(int(above.any(1).sum()))
    assert heights[0] >= 8
    assert heights[1] > 4 * heights[0]


@pytest.mark.parametrize(
    "box", [[0, 0, 5, 5], [395, 0, 400, 5], [0, 295, 5, 300], [-50, -9, -2, -1]]
)
def test_caption_stays_inside_the_image(box):
    """A caption at the edge is moved, not cut: it covers as much as one in the middle."""

    def covered(box_xyxy: list[float]) -> int:
        image = grey(400, 300)
        drawn = np.asarray(draw_detections(image, [box_xyxy], [0], [0.5], NAMES))
        plate = (drawn == class_colour(0)).all(-1) | (drawn < 60).all(-1)
        return int(plate.sum())

    assert covered(box) >= 0.95 * covered([200, 150, 200, 150])


def test_captions_of_equal_boxes_do_not_hide_each_other():
    image = grey(400, 300)
    box = [100.0, 100.0, 300.0, 250.0]
    one = changed(image, draw_detections(image, [box], [0], [0.9], NAMES)).sum()
    two = changed(image, draw_detections(image, [box, box], [0, 0], [0.9, 0.8], NAMES)).sum()
    assert two > one + 100


def test_higher_score_is_drawn_on_top():
    boxes = torch.tensor([[10.0, 10.0, 90.0, 90.0], [10.0, 10.0, 90.0, 90.0]])
    for scores, top in (([0.9, 0.2], 0), ([0.2, 0.9], 1)):
        result = draw_detections(
            grey(100, 100), boxes, torch.tensor([0, 1]), torch.tensor(scores), NAMES
        )
        assert result.getpixel((90, 70)) == class_colour(top)


def test_no_detections_leave_the_picture_as_it_is():
    image = grey()
    empty = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0)
    result = draw_detections(image, *empty, NAMES)
    assert result is not image
    assert not changed(image, result).any()


def test_bfloat16_and_unknown_labels_are_taken():
    boxes = torch.tensor([[1.0, 2.0, 30.0, 40.0]], dtype=torch.bfloat16)
    result = draw_detections(
        grey(), boxes, torch.tensor([7]), torch.tensor([0.5], dtype=torch.bfloat16), NAMES
    )
    assert changed(grey(), result).any()


@pytest.mark.parametrize(
    ("boxes", "labels", "scores", "message"),
    [
        ([[0, 0, 1, 1]], [0, 1], [0.5], r"labels: expected \[1\], got \[2\]"),
        ([[0, 0, 1, 1]], [0], [0.5, 0.5], r"scores: expected \[1\], got \[2\]"),
        ([[0, 0, float("nan"), 1]], [0], [0.5], "boxes_xyxy: expected finite"),
        ([[5, 0, 1, 1]], [0], [0.5], "left <= right"),
    ],
)
def test_bad_detections_are_refused(boxes, labels, scores, message):
    with pytest.raises(ValueError, match=message):
        draw_detections(grey(), boxes, labels, scores, NAMES)


def test_colours_of_neighbouring_classes_are_far_apart():
    colours = [np.array(class_colour(label)) for label in range(8)]
    assert min(np.abs(a - b).sum() for a, b in itertools.combinations(colours, 2)) > 100
    assert all(0 <= c <= 255 for label in range(200) for c in class_colour(label))


def test_masks_tint_the_listed_segments_only():
    image = grey(200, 160)
    segmentation = torch.full((160, 200), -1)
    segmentation[40:120, 20:80] = 1
    segmentation[40:120, 120:180] = 2
    info = [{"id": 1, "label_id": 0, "score": 0.9}, {"id": 9, "label_id": 1}]
    result = draw_masks(image, segmentation, info, NAMES, opacity=0.5)
    touched = changed(image, result)
    assert touched[50:118, 25:75].all()
    assert not touched[:, 120:180].any()
    assert not touched[:38].any()
    expected = (np.array(class_colour(0)) + 90) / 2
    assert np.abs(np.asarray(result)[45, 25] - expected).max() <= 1
    assert result.getpixel((20, 100)) == class_colour(0)


def test_masks_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"segmentation: expected \[48, 64\], got \[64, 48\]"):
        draw_masks(grey(), torch.zeros(64, 48, dtype=torch.long), [], NAMES)


def test_contact_sheet_holds_every_picture():
    pictures = [Image.new("RGB", (20, 10), (i * 40, 0, 0)) for i in range(5)]
    sheet = contact_sheet(pictures, columns=3, gap=2)
    assert sheet.size == (3 * 22 + 2, 2 * 12 + 2)
    positions = [(2 + i % 3 * 22, 2 + i // 3 * 12) for i in range(5)]
    assert [sheet.getpixel(p) for p in positions] == [(i * 40, 0, 0) for i in range(5)]
    assert contact_sheet(pictures[:1], columns=3, gap=2).size == (24, 14)
    with pytest.raises(ValueError, match="images"):
        contact_sheet([], columns=3)
    with pytest.raises(ValueError, match="columns"):
        contact_sheet(pictures, columns=0)
