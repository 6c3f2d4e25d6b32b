"""The report of an evaluation: any set, any detections, any names; and two evaluations compared."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from support.html import read_page

from cdetr_fast.training.data.index import CocoIndex
from cdetr_fast.training.data.label_checks import check_labels
from cdetr_fast.training.errors import DataError
from cdetr_fast.training.evaluation.comparison import changed_images, compare
from cdetr_fast.training.evaluation.detection import Detections, evaluate_detections
from cdetr_fast.training.evaluation.labels import label_section
from cdetr_fast.training.evaluation.report import Report, write_report
from cdetr_fast.training.evaluation.scored import Scored, read_saved, write_evaluation

EVIL = "</td><script>alert(1)</script>&\"' グラス 🐱"
CPU = torch.device("cpu")


def make_index(folder, classes=("a", "b"), images=3, boxes_each=2):
    """Images of 64 x 48 pixels with boxes of 10 x 8 in a row; ids start at 1000, classes at 7."""
    folder.mkdir(exist_ok=True)
    count = images * boxes_each
    for i in range(images):
        Image.new("RGB", (64, 48), "green").save(folder / f"{i} & <b>.png")
    column = np.arange(count) % max(boxes_each, 1)
    boxes = np.column_stack([3 + 12.0 * column, np.full((count, 3), [5.0, 10.0, 8.0])])
    return CocoIndex(
        path=folder / "labels.json",
        images=folder,
        masks=None,
        image_ids=np.arange(1000, 1000 + images),
        file_names=[f"{i} & <b>.png" for i in range(images)],
        sizes_hw=np.array([[48, 64]] * images),
        offsets=np.arange(images + 1) * boxes_each,
        object_ids=np.arange(count),
        boxes_xywh=boxes.reshape(count, 4),
        areas=np.full(count, 80.0),
        labels=np.arange(count) % len(classes),
        crowd=np.zeros(count, bool),
        classes=tuple(classes),
        category_ids=np.arange(7, 7 + len(classes)),
    )


def perfect(index, score=0.9):
    """Detections that are the truth."""
    boxes = index.boxes_xywh.astype(np.float32)
    boxes[:, 2:] += boxes[:, :2]
    scores = np.full(len(boxes), score, np.float32)
    owner = index.image_of_object()
    return Detections(owner, index.labels.copy(), scores, boxes, [], np.arange(len(index)))


def scored(index, found, threshold=0.5):
    return Scored(index, found, evaluate_detections(index, found), threshold)


def report_of(content, tmp_path, **more):
    index, checked = check_labels(content.index, "drop")
    report = Report("title", {"x": 1}, CPU, [("Labels", index, checked)], content, **more)
    write_report(report, tmp_path / "report.html")
    return read_page(tmp_path / "report.html")


@pytest.mark.parametrize("classes", [1, 91, 120])
@pytest.mark.parametrize("count", [0, 1, 100])
def test_any_number_of_classes_and_detections(tmp_path, classes, count):
    names = [f"class {i} {'long ' * (i % 40)}" for i in range(classes)]
    index = make_index(tmp_path / "set", names, images=2, boxes_each=4)
    rng = np.random.default_rng(count)
    left = rng.uniform(0, 30, (count, 2)).astype(np.float32)
    found = Detections(
        np.zeros(count, np.int64),
        rng.integers(0, classes, count),
        np.sort(rng.random(count).astype(np.float32))[::-1],
        np.concatenate([left, left + 9], 1),
        failures=[],
        evaluated=np.arange(2),
    )
    page = report_of(scored(index, found), tmp_path)
    if count == 0:
        assert page.texts["b"][0] == "0.000"
    assert "nan" not in " ".join(page.texts["td"])
    assert len(page.of("image")) == 2  # both have objects that were missed
    assert len(page.texts["h2"]) == 6


def test_names_are_text(tmp_path):
    index = make_index(tmp_path / "set", (EVIL, "b"))
    content = scored(index, perfect(index))
    content.found.labels[0] = 1  # an error, so that there is a worst image
    page = report_of(scored(index, content.found), tmp_path, against=(EVIL, content))
    assert len(page.texts["script"]) == 1
    assert "alert" not in page.texts["script"][0]
    assert f"Comparison with {EVIL}" in page.texts["h2"]
    assert page.texts["td"].count(EVIL) == 3  # classes, comparison, labels
    assert any(text.startswith(EVIL) for text in page.texts["title"])


def test_figures_charts_and_pictures(tmp_path):
    index = make_index(tmp_path / "set")
    found = perfect(index)
    found.labels[0] = 1
    found.scores[1] = 0.1
    rows = [{"kind": "train", "step": s, "loss": 9.0 / s, "lr_rest": 1e-4} for s in (1, 2, 3)]
    rows += [{"kind": "eval", "step": 3, "AP": 0.4, "AP50": None}]
    page = report_of(scored(index, found), tmp_path, rows=rows)
    text = " ".join(page.texts["div"])
    assert "0.800precision" in text  # four of five above the threshold
    assert "0.667recall" in text  # four of six objects
    assert "3images" in text
    (name,) = [caption for caption in page.texts["figcaption"] if "error" in caption]
    assert name == "0 & <b>.png id 1000, 2 errors"
    assert len(page.of("image")) == len(page.of("use")) == 1
    assert page.of("use")[0]["href"] == "#" + page.of("image")[0]["id"]
    assert {"Training loss", "Validation", "Learning rates"} <= set(page.texts["figcaption"])
    confusion = [cells["title"] for cells in page.of("td") if "title" in cells]
    assert "a, found as b: 1" in confusion
    assert "b, found as nothing: 1" in confusion


@pytest.mark.parametrize(("score", "threshold"), [(0.31, 0.5), (0.5, 0.5), (0.31, 0.3)])
def test_a_threshold_above_all_scores_is_noted(tmp_path, score, threshold):
    index = make_index(tmp_path / "set")
    page = report_of(scored(index, perfect(index, score), threshold), tmp_path)
    notes = [text for text in page.texts["p"] if text.startswith("Nothing has a score from 0.50")]
    assert len(notes) == (score < threshold)
    assert all("the highest is 0.31." in text for text in notes)


def test_outcomes_of_detections(tmp_path):
    """One match per object, that of the highest score; none on a crowd."""
    index = make_index(tmp_path / "set", ("a",), images=1, boxes_each=3)
    index.crowd[2] = True
    first = [3, 5, 13, 13]
    boxes = [first, [3, 5, 13, 12], [0, 30, 9, 40], [27, 5, 37, 13], [15, 5, 25, 13]]
    found = Detections(
        np.zeros(5, np.int64),
        np.zeros(5, np.int64),
        np.array([0.6, 0.8, 0.7, 0.5, 0.4], np.float32),
        np.array(boxes, np.float32),
        failures=[],
        evaluated=np.arange(1),
    )
    assert evaluate_detections(index, found).outcomes.tolist() == [0, 1, 0, -1, 1]


def test_saved_evaluations_are_read_back(tmp_path):
    index = make_index(tmp_path / "set", ("a", "b", "c"))
    index.category_ids[2] = -1  # a class of the model that the file does not have
    found = perfect(index)
    found.scores[:3] = [0.51, 0.49, 0.500001]
    content = scored(index, found)
    write_evaluation(content, tmp_path / "run" / "evaluation")
    rows = json.loads((tmp_path / "run" / "evaluation" / "detections.json").read_text())
    assert {row["category_id"] for row in rows} == {7, 8}
    assert {row["image_id"] for row in rows} == {1000, 1001, 1002}
    table = (tmp_path / "run" / "evaluation" / "images.csv").read_text().splitlines()
    assert table[:2] == ["image_id,file_name,objects,errors", "1000,0 & <b>.png,2,1"]
    for folder in (tmp_path / "run", tmp_path / "run" / "evaluation"):
        again = read_saved(folder, index, 0.5)
        kept = found.labels != 2
        assert np.array_equal(again.found.images, found.images[kept])
        assert np.array_equal(again.found.labels, found.labels[kept])
        np.testing.assert_allclose(again.found.scores, found.scores[kept], atol=1e-6)
        np.testing.assert_allclose(again.found.boxes_xyxy, found.boxes_xyxy[kept], atol=1e-3)


def test_an_image_without_saved_detections_was_evaluated_all_the_same(tmp_path):
    """All of its hundred may be of classes that the file does not have."""
    index = make_index(tmp_path / "set")
    found = perfect(index)
    kept = found.images != 1
    columns = ("images", "labels", "scores", "boxes_xyxy")
    found = dataclasses.replace(found, **{name: getattr(found, name)[kept] for name in columns})
    write_evaluation(scored(index, found), tmp_path / "out")
    assert read_saved(tmp_path / "out", index, 0.5).errors.tolist() == [0, 2, 0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "detections.json").unlink(), "has no detections.json; write it by"),
        (lambda f: (f / "metrics.json").write_text("{}"), "is not what cdetr-fast evaluate writes"),
        (lambda f: (f / "detections.json").write_text("[{}]"), "is not what .* writes"),
        (
            lambda f: (f / "images.csv").write_text("image_id,file_name\n1000,0 & <b>.png\n"),
            "other images: it has nothing on 2 of 3 images",
        ),
        (
            lambda f: (f / "images.csv").write_text(
                (f / "images.csv").read_text().replace("0 & <b>", "of another set")
            ),
            "other images: it has nothing on 1 of 3 images",
        ),
        (lambda f: (f / "images.csv").write_text("id\n1000\n"), "is not what .* writes"),
    ],
)
def test_what_cannot_be_compared_with(tmp_path, damage, message):
    index = make_index(tmp_path / "set")
    write_evaluation(scored(index, perfect(index)), tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(DataError, match=f"against: .*{message}"):
        read_saved(tmp_path / "out", index, 0.5)


def test_comparison(tmp_path):
    index = make_index(tmp_path / "set", images=4)
    before, now = perfect(index), perfect(index)
    before.scores[[0, 1, 2]] = 0.2  # image 0 misses both of its objects, image 1 one
    now.scores[[2, 3, 4]] = 0.2  # image 1 both, image 2 one
    ours, theirs = scored(index, now), scored(index, before)
    assert changed_images(ours, theirs, 5) == ([0], [2, 1])
    assert changed_images(ours, theirs, 1) == ([0], [2])
    found = compare(ours, theirs)
    assert (found["better"], found["worse"], found["same"]) == (1, 2, 1)
    now.labels[:] = 0  # class b is lost
    found = compare(scored(index, now), theirs)
    assert [row["name"] for row in found["classes"]] == ["b", "a"]
    assert found["classes"][0]["shown"] == "-1.000"
    same = compare(ours, ours)
    assert {row["shown"] for row in same["classes"] + same["figures"]} <= {"+0.000", "-"}
    page = report_of(ours, tmp_path, against=("first", theirs))
    assert "2 errors before, 0 now" in " ".join(page.texts["figcaption"])
    assert len(page.of("image")) == 3 + 2  # changed, and worst


def test_suspicious_labels(tmp_path):
    index = make_index(tmp_path / "set", images=3, boxes_each=3)
    index.boxes_xywh[0] = [0, 0, 64, 48]  # the whole image
    index.boxes_xywh[2] = index.boxes_xywh[1]  # not of the same class
    index.boxes_xywh[4, 2] = 1  # tiny
    index.labels[7:] = 1
    index.boxes_xywh[8] = index.boxes_xywh[7]  # twice
    kept, report = check_labels(index)
    section = label_section("Labels", kept, report)
    found = {row["kind"]: (row["count"], row["ids"]) for row in section["findings"]}
    assert found == {
        "boxes with a side below 2 pixels, of images": (1, "1001"),
        "boxes of the whole image, of images": (1, "1000"),
        "boxes that come twice, of images": (1, "1002"),
    }
    assert [row["objects"] for row in section["classes"]] == np.bincount(kept.labels).tolist()
    assert sum(row["share"] for row in section["classes"]) == pytest.approx(1)


def test_a_set_without_objects(tmp_path):
    index = make_index(tmp_path / "set", boxes_each=0)
    nothing = dataclasses.replace(perfect(index), evaluated=np.arange(3))
    page = report_of(scored(index, nothing), tmp_path)
    assert "No image has an error." in page.texts["p"]
    assert page.texts["b"][0] == "-"
