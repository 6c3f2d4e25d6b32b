"""Pages of detections: everything that was found, escaped, on as many pages as needed."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from support.html import mask_levels, read_page

from cdetr_fast.images.draw import inner_edge
from cdetr_fast.images.results import DetectionResult, SegmentationResult
from cdetr_fast.reports import detections
from cdetr_fast.reports.detections import DetectionReport
from cdetr_fast.reports.page import describe_environment
from cdetr_fast.reports.pictures import boxes_over, embed

EVIL = "<script>alert('1')</script>&\"🐱 グラス"
HERE = describe_environment(torch.device("cpu"), "1.2.3")


def result(count, names, image_hw=(48, 64)):
    generator = torch.Generator().manual_seed(count)
    corners = torch.rand(count, 4, generator=generator) * 24
    boxes = torch.cat([corners[:, :2], corners[:, :2] + corners[:, 2:]], 1)
    scores = torch.rand(count, generator=generator).sort(descending=True).values
    labels = torch.arange(count) % max(len(names), 1)
    return DetectionResult(scores, labels, boxes, image_hw, dict(enumerate(names)))


def image(size=(64, 48)):
    return Image.new("RGB", size, "green")


def test_names_are_text(tmp_path):
    report = DetectionReport(0.0)
    report.add(EVIL, image(), result(3, [EVIL, "x" * 300]), EVIL + ".jpg")
    (path,) = report.write(tmp_path, EVIL, HERE, {"note": EVIL})
    page = read_page(path)
    assert page.texts["script"] == page.texts["script"][:1]
    assert "alert" not in page.texts["script"][0]
    assert any(text.startswith(EVIL) for text in page.texts["figure"])
    assert EVIL in page.texts["option"]
    assert EVIL in [text.rsplit(" ", 1)[0] for text in page.texts["title"]]
    (link,) = [a["href"] for a in page.of("a")]
    assert re.fullmatch(r"[\w%./-]+", link)


@pytest.mark.parametrize("count", [0, 1, 300])
@pytest.mark.parametrize("classes", [1, 91])
def test_any_number_of_objects_and_classes(tmp_path, count, classes):
    names = [f"class {i}" for i in range(classes)]
    report = DetectionReport(0.25)
    found = result(count, names)
    report.add("a.jpg", image(), found)
    (path,) = report.write(tmp_path, "model", HERE, {"top_k": 100})
    page = read_page(path)
    assert len(page.of("rect")) == count + (10 if count else 0)  # with the histogram's bars
    scores = [float(g["data-score"]) for g in page.of("g") if "data-score" in g]
    assert sorted(scores, reverse=True) == pytest.approx(found.scores.tolist(), abs=1e-4)
    assert len(page.texts["option"]) == 1 + min(count, classes)


def test_masks_are_drawn_with_their_objects(tmp_path):
    """Each in the group of its box, so that the filters hide it too; none in the colour of two."""
    segmentation = torch.zeros(48, 64, dtype=torch.int32)
    segmentation[4:20, 8:40] = 3
    segmentation[30:40, 30:60] = 7
    segmentation[34:36, 40:50] = 0  # a hole
    found = SegmentationResult(
        torch.tensor([0.9, 0.6]),
        torch.tensor([0, 1]),
        torch.tensor([[8.0, 4, 40, 20], [30, 30, 60, 40]]),
        (48, 64),
        {0: "a", 1: "b"},
        segmentation,
        [3, 7],
    )
    report = DetectionReport(0.5)
    report.add("a.jpg", image(), found)
    (path,) = report.write(tmp_path, "model", HERE, {})
    page = read_page(path)
    edge = max(float(svg["viewbox"].split()[2]) for svg in page.of("svg") if "picture" in str(svg))
    zoom = round(edge / 64)
    lower, upper = mask_levels(page, 0, (64 * zoom, 48 * zoom))  # the highest score is on top
    for drawn, number in ((upper, 3), (lower, 7)):
        mask = np.kron((segmentation == number).numpy(), np.ones((zoom, zoom), bool))
        assert np.array_equal(drawn > 0, mask)
        assert np.array_equal(drawn == 2, inner_edge(mask))
    groups = [i for i, (tag, _) in enumerate(page.elements) if tag == "g"]
    assert all(page.elements[i + 1][0] == "image" for i in groups)


def test_pages_of_many_images(tmp_path, monkeypatch):
    monkeypatch.setattr(detections, "IMAGES_OF_PAGE", 4)
    report = DetectionReport(0.5, most_images=10)
    for i in range(12):
        report.add(f"{i}.jpg", image(), result(2, ["a", "b"]))
    paths = report.write(tmp_path, "model", HERE, {})
    assert [path.name for path in paths] == ["report.html", "report_2.html", "report_3.html"]
    pages = [read_page(path) for path in paths]
    assert [len(page.of("image")) for page in pages] == [4, 4, 2]
    for page in pages:
        assert page.texts["b"][:3] == ["12", "24", "2.0"]
        assert any(text.startswith("2 further images are not shown") for text in page.texts["p"])
        links = {a["href"] for a in page.of("a")}
        assert len(links) == 2
        assert links < {path.name for path in paths}


def test_a_page_is_not_too_large(monkeypatch):
    monkeypatch.setattr(detections, "_BYTES_OF_PAGE", 2000)
    report = DetectionReport(0.5)
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    for i in range(3):
        report.add(f"{i}.jpg", Image.fromarray(noise), result(0, []))
    assert [len(page) for page in report.pages] == [1, 1, 1]


def test_captions_do_not_cover_each_other():
    picture = embed(image((640, 480)), 320)
    found = result(100, ["a", "some class of a long name"], (480, 640))
    boxes = boxes_over(
        picture,
        found.boxes_xyxy.numpy() * 12,
        found.labels.numpy(),
        found.scores.numpy(),
        found.id2label,
    )
    assert len(boxes) == 100
    assert [box.score for box in boxes] == sorted(box.score for box in boxes)
    assert boxes[-1].caption is not None
    captions = [box.caption for box in boxes if box.caption]
    assert 5 < len(captions) < 100
    places = []
    for one in captions:
        width = 6.8 * len(one.text)
        left = one.x - width if one.ends else one.x
        assert 0 <= left <= left + width <= 320
        assert 10 <= one.y <= 238
        slack = 2  # from the picture's edge
        assert all(
            abs(one.y - y) >= 13 or left + width <= start + slack or end <= left + slack
            for start, end, y in places
        )
        places.append((left, left + width, one.y))
    assert any(one.ends for one in captions)
    covered = 13 * 6.8 * sum(len(one.text) for one in captions)
    assert covered < 0.3 * 320 * 240  # the picture is still to be seen


def test_boxes_that_are_not_finite_are_left_out():
    picture = embed(image(), 320)
    boxes = np.array([[1, 1, 9, 9], [np.nan, 0, 1, 1], [-5, 40, 99, 99]], np.float32)
    drawn = boxes_over(picture, boxes, np.zeros(3, int), None, {0: "a"})
    found = [(box.left, box.top, box.width, box.height) for box in drawn]
    assert found == [(5, 5, 40, 40), (0, 200, 320, 40)]


def test_sizes_in_the_page():
    small, large = embed(image((64, 48)), 320), embed(image((2000, 10)), 320)
    assert (small.width, small.height, small.scale) == (320, 240, 5)
    assert (large.width, large.height) == (320, 1.6)


def test_names_that_utf_8_does_not_have(tmp_path):
    """A file's name may be in Latin-1, and a class name from JSON half of a pair."""
    name = b"caf\xe9 1.jpg".decode("utf-8", "surrogateescape")
    report = DetectionReport(0.0)
    report.add(name, image(), result(2, ["\ud83d", "cat"]), name)
    (path,) = report.write(tmp_path, name, HERE, {"note": name})
    page = read_page(path)
    assert [a["href"] for a in page.of("a")] == ["caf%E9%201.jpg"]
    assert page.texts["option"] == ["all", "?", "cat"]
