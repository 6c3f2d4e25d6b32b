"""Boxes are drawn where the objects are, on turned photographs too."""

import numpy as np
import pytest
from PIL import Image

from cdetr_fast.training.data.index import CocoIndex
from cdetr_fast.training.evaluation.detection import Detections, Evaluation
from cdetr_fast.training.evaluation.pictures import draw_images
from cdetr_fast.training.evaluation.scored import Scored

QUARTER = 6  # EXIF: to be turned by 90 degrees
NO_FIGURES = Evaluation({}, [], np.zeros((101, 1)), np.zeros(0))
GAPS = 10  # pixels of the sheets before the first picture


def index_of(folder, names, size_hw, boxes_xywh):
    count = len(names)
    return CocoIndex(
        path=folder / "labels.json",
        images=folder,
        masks=None,
        image_ids=np.arange(count),
        file_names=names,
        sizes_hw=np.array([size_hw] * count),
        offsets=np.arange(count + 1),
        object_ids=np.arange(count),
        boxes_xywh=np.array(boxes_xywh, dtype=float),
        areas=np.ones(count),
        labels=np.zeros(count, np.int64),
        crowd=np.zeros(count, bool),
        classes=("disc",),
        category_ids=np.array([1]),
    )


def nothing_found(count):
    none = np.zeros(0, np.int64)
    scores, boxes = np.zeros(0, np.float32), np.zeros((0, 4), np.float32)
    return Detections(none, none, scores, boxes, [], np.arange(count))


@pytest.mark.parametrize("on_turned", [True, False])
def test_turned_photograph(tmp_path, on_turned):
    """The file of annotations has the size of the turned picture, or of the stored one."""
    shown = np.zeros((120, 80, 3), np.uint8)  # upright
    shown[90:110, 10:30] = 255
    stored = np.rot90(shown)  # turning it by a quarter to the right gives `shown`
    exif = Image.Exif()
    exif[0x0112] = QUARTER
    Image.fromarray(stored).save(tmp_path / "a.jpg", exif=exif, quality=95)
    rows, columns = np.nonzero((shown if on_turned else stored)[..., 0])
    box = [columns.min(), rows.min(), 20, 20]
    size = (120, 80) if on_turned else (80, 120)
    index = index_of(tmp_path, ["a.jpg"], size, [box])
    draw_images(Scored(index, nothing_found(1), NO_FIGURES), [0], tmp_path / "drawn.png")

    sheet = np.asarray(Image.open(tmp_path / "drawn.png").convert("RGB")).astype(int)
    height, width = 4 * size[0], 4 * size[1]  # the longest edge is 480 pixels
    assert sheet.shape[0] >= height
    truth = sheet[GAPS : GAPS + height, GAPS : GAPS + width]
    left, top = 4 * box[0], 4 * box[1]
    assert truth[top + 20 : top + 60, left + 20 : left + 60].min() > 230  # the white square
    coloured = np.ptp(truth, axis=-1) > 60
    frame = np.zeros_like(coloured)
    frame[top - 14 : top + 82, left - 2 : left + 82] = True  # with its caption
    assert coloured[frame].sum() > 200
    assert coloured[~frame].sum() == 0


def test_file_that_has_gone(tmp_path, caplog):
    Image.new("RGB", (80, 120)).save(tmp_path / "a.png")
    index = index_of(tmp_path, ["none.png", "a.png"], (120, 80), [[10, 10, 20, 20]] * 2)
    draw_images(Scored(index, nothing_found(2), NO_FIGURES), [0, 1], tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").exists()
    assert "not drawn: " in caplog.text
    assert "none.png (image id 0): cannot be read" in caplog.text
