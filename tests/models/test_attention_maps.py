"""`draw_attention`: the weights of the model's forward, at their place in the upright image."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.tiny import randomized, tiny_config

from cdetr_fast import (
    ConditionalDetrForObjectDetection,
    ConditionalDetrForSegmentation,
    ConditionalDetrImageProcessor,
    ConditionalDetrModel,
    draw_attention,
    optimize,
)
from cdetr_fast.images import draw
from cdetr_fast.images.draw import draw_heatmap
from cdetr_fast.models import attention_maps

SIZE = {"shortest_edge": 96, "longest_edge": 160}


def build(cls=ConditionalDetrForObjectDetection, pad_size=None, **changes):
    model = randomized(cls(tiny_config(decoder_layers=2, **changes)))
    model.image_processor = ConditionalDetrImageProcessor(size=SIZE, pad_size=pad_size)
    return model


@pytest.fixture(scope="module")
def model():
    return build()


def picture(width=150, height=90):
    cells = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)


def pixels_of(rows):
    return np.stack([[np.asarray(image, dtype=int) for image in row] for row in rows])


@pytest.fixture
def drawn(monkeypatch):
    """Collects the arguments of each picture."""
    calls = []

    def record(image, weights, extent, box_xyxy, point_xy, label, caption):
        calls.append((weights, extent, box_xyxy, point_xy, label, caption))
        return draw_heatmap(image, weights, extent, box_xyxy, point_xy, label, caption)

    monkeypatch.setattr(attention_maps, "draw_heatmap", record)
    return calls


@pytest.mark.parametrize("pad_size", [None, {"height": 192, "width": 224}])
@pytest.mark.parametrize(
    ("cls", "compat"),
    [
        (ConditionalDetrForObjectDetection, "paper"),
        (ConditionalDetrForSegmentation, "paper"),
        (ConditionalDetrForSegmentation, "transformers"),
    ],
)
def test_draws_what_forward_returns(cls, compat, pad_size, drawn):
    model = build(cls, pad_size, compat=compat)
    image = picture()
    rows = draw_attention(model, image, torch.tensor([3, 0]), layer=0, size=120)
    assert [len(row) for row in rows] == [8, 8]
    assert {picture.size for row in rows for picture in row} == {(120, 72)}
    inputs = model.image_processor(image, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs, output_attentions=True)
    height, width = 96, 160
    assert int(inputs["pixel_mask"].sum()) == height * width
    padded = inputs["pixel_values"].shape[-2:]
    cells = [side // 32 for side in padded]
    maps = outputs.cross_attentions[0][0].unflatten(-1, cells)[..., :3, :5]
    assert maps.sum((-2, -1)) == pytest.approx(1.0, abs=1e-4)  # all of it is on the image
    box = outputs.pred_boxes[0]
    for (weights, extent, box_xyxy, _, _, caption), (query, head) in zip(
        drawn, [(q, n) for q in (3, 0) for n in range(8)], strict=True
    ):
        torch.testing.assert_close(torch.tensor(weights)[:3, :5], maps[head, query])
        assert weights.shape == tuple(cells)
        assert (weights[3:] == np.pad(weights[2:3, :5], ((0, 0), (0, cells[1] - 5)), "edge")).all()
        assert extent == (5, 3)  # the picture is these cells, whatever the padding
        left, top, right, bottom = box_xyxy
        centre_and_size = [left + right, top + bottom, 2 * (right - left), 2 * (bottom - top)]
        expected = 2 * box[query] * torch.tensor([120, 72, 120, 72])
        assert centre_and_size == pytest.approx(expected.tolist(), abs=1e-3)
        assert caption.endswith(f", head {head}")


def test_threshold_takes_the_objects_of_predict_best_first(model, drawn):
    found = model.predict(picture(), threshold=0.6)
    rows = draw_attention(model, picture(), threshold=0.6, size=40)
    best = {}  # of a query, `predict` also returns classes but the first
    for score, box in zip(found.scores.tolist(), found.boxes_xyxy.tolist(), strict=True):
        best.setdefault(tuple(np.round(box, 2)), score)
    assert len(rows) == len(best) > 1
    captions = [call[-1] for call in drawn[::8]]
    assert [float(x.split()[1][:-1]) for x in captions] == [round(x, 2) for x in best.values()]
    assert draw_attention(model, picture(), threshold=1.0) == []
    assert draw_attention(model, picture(), []) == []


def test_images_of_all_kinds_are_one_image(model, tmp_path):
    image = picture()
    expected = pixels_of(draw_attention(model, image, [1], size=60))
    stored = image.transpose(Image.Transpose.ROTATE_90)  # which orientation 6 turns back
    exif = Image.Exif()
    exif[0x0112] = 6
    stored.save(tmp_path / "turned.png", exif=exif)
    array = np.asarray(image)
    for same in (tmp_path / "turned.png", (tmp_path / "turned.png").read_bytes(), array):
        assert (pixels_of(draw_attention(model, same, [1], size=60)) == expected).all()
    unit = torch.tensor(array).permute(2, 0, 1) / 255  # resized without rounding
    assert abs(pixels_of(draw_attention(model, unit, [1], size=60)) - expected).mean() < 3
    assert draw_attention(model, np.asarray(image.convert("L")), [1], size=60)[0][0].size == (
        60,
        36,
    )


def test_other_attention_and_optimised_models(model):
    expected = pixels_of(draw_attention(model, picture(), [1], size=60))
    for implementation in ("eager", "sdpa"):
        other = build(attn_implementation=implementation)
        assert abs(pixels_of(draw_attention(other, picture(), [1], size=60)) - expected).max() <= 2
    fast = optimize(model)
    assert abs(pixels_of(draw_attention(fast, picture(), [1], size=60)) - expected).max() <= 2


def test_training_mode_is_restored(model):
    expected = pixels_of(draw_attention(model, picture(), [1], size=60))
    model.train()
    try:
        assert (pixels_of(draw_attention(model, picture(), [1], size=60)) == expected).all()
        assert model.training
        assert model.model.decoder.training
    finally:
        model.eval()


def test_pixels_that_are_not_rescaled_are_stretched(model):
    stretched = build()
    stretched.image_processor = ConditionalDetrImageProcessor(
        size=SIZE, do_rescale=False, do_normalize=False
    )
    image = np.asarray(picture(), dtype=np.float32) / 40 - 3
    rows = pixels_of(draw_attention(stretched, image, [1], size=60))
    assert rows.std() > 10


@settings(max_examples=30)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
    st.data(),
)
def test_heat_is_where_the_weights_are(cells_hw, padding_hw, data):
    """A cell of the map covers its part of the picture, whatever the padding."""
    (rows, columns), size = cells_hw, 12
    image = Image.new("RGB", (columns * size, rows * size), (90, 90, 90))
    weights = np.zeros((rows + padding_hw[0], columns + padding_hw[1]), dtype=np.float32)
    row, column = data.draw(st.tuples(st.integers(0, rows - 1), st.integers(0, columns - 1)))
    weights[row, column] = 0.25
    with mock.patch("cdetr_fast.images.draw.ImageDraw"), mock.patch.object(draw, "_Captioner"):
        drawn = draw_heatmap(image, weights, (columns, rows), [0] * 4, [0, 0], 0, "")
    brightness = np.asarray(drawn, dtype=int).sum(-1)
    y, x = np.unravel_index(brightness.argmax(), brightness.shape)
    assert (y // size, x // size) == (row, column)
    assert (np.asarray(image) == 90).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 2), (640, 480)])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_heat_on_any_picture(mode, size):
    image = Image.new(mode, size)
    weights = np.zeros((3, 4), dtype=np.float32)
    outside = [-50.0, -50.0, 900.0, 900.0]
    drawn = draw_heatmap(image, weights, (4, 3), outside, [500.0, -3.0], 0, "cat 0.50, head 11")
    assert (drawn.mode, drawn.size) == ("RGB", size)
    if min(size) > 100:  # no weights: no heat
        assert (np.asarray(drawn)[200:220, 200:220] == 0).all()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"queries": [7]}, ValueError, "queries: expected indices from 0 to 6, got 7"),
        ({"queries": [-1]}, ValueError, "queries: expected indices from 0 to 6, got -1"),
        ({"queries": [0.5]}, TypeError, "queries"),
        ({"queries": 3}, TypeError, "queries: expected a list of indices, got 3"),
        ({"layer": 2}, ValueError, "layer: expected -2 to 1, got 2"),
        ({"layer": "last"}, TypeError, "layer"),
        ({"threshold": 2}, ValueError, "threshold"),
        ({"size": 0}, ValueError, "size"),
        ({"image": [picture()]}, ValueError, "image: expected one image, got several"),
        ({"model": ConditionalDetrModel(tiny_config())}, TypeError, "model: expected cdetr_fast"),
    ],
)
def test_errors_name_the_argument(model, changes, error, message):
    with pytest.raises(error, match=message):
        draw_attention(**({"model": model, "image": picture()} | changes))
