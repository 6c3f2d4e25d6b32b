"""Results of `predict`: text, selection, other formats and pictures."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny import NAMES

from cdetr_fast.images.results import DetectionResult, SegmentationResult


def example(kind: str) -> DetectionResult:
    common = (
        torch.tensor([0.9, 0.6]),
        torch.tensor([2, 7]),
        torch.tensor([[1.0, 2.0, 11.0, 6.0], [0.0, 0.0, 3.0, 3.0]]),
        (8, 12),
        NAMES,
    )
    if kind == "detection":
        return DetectionResult(*common)
    segmentation = torch.zeros(8, 12, dtype=torch.int32)
    segmentation[2:6, 1:11] = 1
    segmentation[:2, :3] = 4
    return SegmentationResult(*common, segmentation, [1, 4])


@pytest.mark.parametrize("kind", ["detection", "segmentation"])
def test_text_and_selection(kind):
    result = example(kind)
    assert result.names == ["remote", "7"]
    assert str(result).splitlines() == [
        "0.90 remote at 1, 2, 10 x 4 pixels",
        "0.60 7 at 0, 0, 3 x 3 pixels",
    ]
    assert "2 objects in 12 x 8 pixels" in repr(result)
    one = result.above(0.6)
    assert (len(one), type(one)) == (1, type(result))
    assert one.names == ["remote"]
    assert str(result.above(0.9)) == "nothing found"
    if kind == "segmentation":
        assert one.masks.sum().item() == 40


@pytest.mark.parametrize("kind", ["detection", "segmentation"])
def test_coco_results(kind):
    result = example(kind)
    objects = json.loads(json.dumps(result.to_coco(5)))
    assert [item["bbox"] for item in objects] == [[1, 2, 10, 4], [0, 0, 3, 3]]
    assert [item["category_id"] for item in objects] == [2, 7]
    assert [item["score"] for item in objects] == [0.9, 0.6]
    assert {item["image_id"] for item in objects} == {5}
    if kind == "segmentation":
        coco_mask = pytest.importorskip("pycocotools.mask")
        for item, mask in zip(objects, result.masks, strict=True):
            assert np.array_equal(coco_mask.decode(item["segmentation"]), mask.numpy())


@pytest.mark.filterwarnings("ignore:OpenCV")
@pytest.mark.parametrize("kind", ["detection", "segmentation"])
def test_supervision(kind):
    supervision = pytest.importorskip("supervision")
    result = example(kind)
    detections = result.to_supervision()
    assert isinstance(detections, supervision.Detections)
    assert np.array_equal(detections.xyxy, result.boxes_xyxy.numpy())
    assert np.array_equal(detections.confidence, result.scores.numpy())
    assert detections.class_id.tolist() == [2, 7]
    assert detections["class_name"].tolist() == ["remote", "7"]
    kept = detections[detections.confidence > 0.7]
    assert len(kept) == 1
    if kind == "segmentation":
        assert np.array_equal(kept.mask[0], result.masks[0].numpy())
    assert len(result.above(0.95).to_supervision()) == 0


def test_without_the_libraries(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match="pip install supervision"):
        example("detection").to_supervision()
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ImportError, match=r"pip install 'cdetr-fast\[eval\]'"):
        example("segmentation").to_coco(1)
    assert len(example("detection").to_coco(1)) == 2


@pytest.mark.parametrize("kind", ["detection", "segmentation"])
def test_pictures(kind):
    image = Image.new("RGB", (12, 8), "white")
    drawn = example(kind).draw(image)
    assert drawn.size == image.size
    assert np.array(drawn).min() < 255
    assert np.array(image).min() == 255
    if kind == "detection":
        assert example(kind).draw(image.resize((24, 16))).size == (24, 16)


def test_pictures_of_what_predict_takes(tmp_path):
    """Files, arrays and floats from 0 to 1; a photograph is turned by its EXIF orientation."""
    result = example("detection")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8))
    expected = np.asarray(result.draw(image))
    path = tmp_path / "image.png"
    image.save(path)
    pixels = np.asarray(image)
    kinds = (str(path), path, path.read_bytes(), pixels, pixels / 255, torch.tensor(pixels))
    for one in (*kinds, torch.tensor(pixels).permute(2, 0, 1) / 255):
        assert np.array_equal(np.asarray(result.draw(one)), expected)

    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn to the right
    turned = tmp_path / "turned.png"
    image.transpose(Image.Transpose.ROTATE_90).save(turned, exif=exif)
    for one in (turned, Image.open(turned)):
        assert np.array_equal(np.asarray(result.draw(one)), expected)
    with path.open("rb") as opened:
        for _ in range(2):  # `predict` has read it before
            assert np.array_equal(np.asarray(result.draw(opened)), expected)
    with pytest.raises(ValueError, match="image: expected one image, got 2"):
        result.draw([image, image])
    with pytest.raises(FileNotFoundError, match=r"none.jpg: cannot be read"):
        result.draw("none.jpg")


def test_results_are_checked():
    with pytest.raises(ValueError, match=r"expected \[n\], \[n\], \[n, 4\], got \[\[2\], \[1\]"):
        DetectionResult(torch.zeros(2), torch.zeros(1), torch.zeros(1, 4), (3, 3), {})
