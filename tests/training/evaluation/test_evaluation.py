"""AP and AR as pycocotools has them; each image once; confusion by hand."""

import argparse
import contextlib
import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from support.html import read_page

from cdetr_fast import ConditionalDetrForObjectDetection, ConditionalDetrImageProcessor
from cdetr_fast.checkpoints.key_maps import to_authors
from cdetr_fast.training import DataError, TrainingConfig, evaluate
from cdetr_fast.training.data.coco import read_coco
from cdetr_fast.training.evaluation.detection import (
    Detections,
    confusion_matrices,
    evaluate_detections,
    predict,
)
from cdetr_fast.training.initial_weights import build_model
from cdetr_fast.training.setup import evaluation_loader, make_processor


def noisy(index, seed=0):
    """Detections around the truth: shifted, missed, of other classes, and made up."""
    rng = np.random.default_rng(seed)
    owner = np.concatenate([index.image_of_object(), rng.integers(0, len(index), 30)])
    boxes = np.concatenate([index.boxes_xywh, rng.uniform(1, 30, (30, 4))])
    boxes += rng.normal(0, 1.5, boxes.shape)
    boxes[:, 2:] = boxes[:, :2] + boxes[:, 2:].clip(1)
    labels = np.concatenate([index.labels, rng.integers(0, len(index.classes), 30)])
    swapped = rng.random(len(labels)) < 0.2
    labels[swapped] = rng.integers(0, len(index.classes), swapped.sum())
    order = np.argsort(owner, kind="stable")
    scores = rng.random(len(owner)).astype(np.float32)
    return Detections(
        owner[order],
        labels[order],
        scores[order],
        boxes[order].astype(np.float32),
        failures=[],
        evaluated=np.arange(len(index)),
    )


@pytest.fixture
def index(scenes):
    index = read_coco(scenes / "train" / "annotations.json")
    index.crowd[::7] = True
    return index


def test_figures_are_those_of_pycocotools(index):
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    found = noisy(index)
    ours = evaluate_detections(index, found)
    x0, y0, x1, y1 = found.boxes_xyxy.astype(np.float64).T
    rows = np.stack([found.images, x0, y0, x1 - x0, y1 - y0, found.scores, found.labels], 1)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco.COCO()
        truth.dataset = index.coco_dictionary()
        truth.createIndex()
        theirs = cocoeval.COCOeval(truth, truth.loadRes(rows), "bbox")
        theirs.evaluate()
        theirs.accumulate()
        theirs.summarize()
    expected = np.where(theirs.stats < 0, np.nan, theirs.stats)
    np.testing.assert_allclose(list(ours.stats.values()), expected, atol=1e-9)
    assert 0.2 < ours.stats["AP50"] < 0.95
    per_class = theirs.eval["precision"][:, :, :, 0, -1].mean((0, 1))
    np.testing.assert_allclose([c["AP"] for c in ours.classes], per_class, atol=1e-9)


def test_no_detections(index):
    found = noisy(index)
    names = ("images", "labels", "scores", "boxes_xyxy")
    none = dataclasses.replace(found, **{name: getattr(found, name)[:0] for name in names})
    assert evaluate_detections(index, none).stats["AP"] == 0


def test_confusion():
    from cdetr_fast.training.data.index import CocoIndex

    index = CocoIndex(
        *(None, None, None),
        image_ids=np.array([1, 2]),
        file_names=["a", "b"],
        sizes_hw=np.array([[50, 50]] * 2),
        offsets=np.array([0, 3, 3]),
        object_ids=np.arange(3),
        boxes_xywh=np.array([[0, 0, 10, 10], [20, 20, 10, 10], [35, 35, 9, 9]], dtype=float),
        areas=np.ones(3),
        labels=np.array([0, 1, 1]),
        crowd=np.zeros(3, bool),
        classes=("a", "b"),
        category_ids=np.array([0, 1]),
    )
    found = Detections(
        np.array([0, 0, 0, 1]),
        np.array([0, 0, 1, 1]),
        np.array([0.9, 0.8, 0.3, 0.7], np.float32),
        np.array(
            [[0, 0, 10, 9], [20, 20, 30, 30], [35, 35, 44, 44], [1, 1, 5, 5]], dtype=np.float32
        ),
        failures=[],
        evaluated=np.arange(2),
    )
    first, second = confusion_matrices(index, found)
    assert first.tolist() == [[1, 0, 0], [1, 0, 1], [0, 0, 0]]  # the third was below the threshold
    assert second.tolist() == [[0, 0, 0], [0, 0, 0], [0, 1, 0]]


@pytest.fixture
def checkpoint(index, settings, tmp_path):
    config = TrainingConfig(**settings())
    model = build_model(config, index.classes)
    model.save_pretrained(tmp_path / "model")
    make_processor(config, model).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_batches_change_nothing(index, checkpoint):
    model = ConditionalDetrForObjectDetection.from_pretrained(checkpoint).eval()
    statistics = (torch.full((3, 1, 1), 127.0), torch.full((3, 1, 1), 60.0))
    size = {"shortest_edge": 64, "longest_edge": 96}
    results = []
    for batch_size in (1, 3):
        loader = evaluation_loader(index, batch_size, size, workers=0)
        results.append(predict(model, loader, *statistics))
    alone, batched = results
    assert np.array_equal(alone.images, batched.images)
    assert len(alone.images) == len(index) * 12 * 6  # fewer than 100: all of 12 queries, 6 classes
    np.testing.assert_allclose(alone.scores, batched.scores, atol=1e-5)


def test_evaluates_a_checkpoint(scenes, checkpoint, tmp_path):
    evaluation = evaluate(
        checkpoint,
        scenes / "val" / "annotations.json",
        output=tmp_path / "result",
        batch_size=2,
        num_workers=0,
        device="cpu",
    )
    assert evaluation.stats["AP"] >= 0
    written = {path.name for path in (tmp_path / "result").iterdir()}
    tables = {"metrics.json", "classes.csv", "images.csv", "detections.json"}
    assert written == tables | {"report.html"}
    again = evaluate(
        checkpoint,
        scenes / "val" / "annotations.json",
        output=tmp_path / "again",
        num_workers=0,
        device="cpu",
        against=tmp_path / "result",
    )
    assert again.stats == pytest.approx(evaluation.stats, abs=1e-4, nan_ok=True)
    page = read_page(tmp_path / "again" / "report.html")
    assert f"Comparison with {tmp_path / 'result'}" in page.texts["h2"]
    assert any("5 have as many errors as before" in text for text in page.texts["p"])
    nowhere = tmp_path / "nowhere"
    with pytest.raises(DataError, match=f"model: {nowhere}"):
        evaluate(nowhere, scenes / "val" / "annotations.json", device="cpu")


def test_figures_are_not_lost_with_a_full_disk(scenes, checkpoint, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cdetr_fast.training.evaluation.report.write_text", full)
    with pytest.raises(DataError, match=r"output: .*No space left on device.*; AP 0\.\d+, AP50 "):
        evaluate(
            checkpoint,
            scenes / "val" / "annotations.json",
            output=tmp_path / "out",
            num_workers=0,
            device="cpu",
        )


@pytest.mark.parametrize("batch_size", [1, 2])
def test_unreadable_images(checkpoint, damage, tmp_path, caplog, batch_size):
    """They are an error, or left out of the figures: not objects that were missed."""
    path = damage("val", "000003.png")
    options = {"batch_size": batch_size, "num_workers": 0, "device": "cpu"}
    message = r"1 of 5 images .*\n.*000003.png \(image id 3\): cannot be read .*--bad-images skip"
    with pytest.raises(DataError, match=message):
        evaluate(checkpoint, path, **options)
    skipped = evaluate(checkpoint, path, output=tmp_path / "out", bad_images="skip", **options)
    assert "1 of 5 images could not be read" in caplog.text
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert written["images"] == 4
    assert len(written["not_evaluated"]) == 1

    content = json.loads(path.read_text())
    content["images"] = [image for image in content["images"] if image["id"] != 3]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 3]
    path.write_text(json.dumps(content))
    without = evaluate(checkpoint, path, **options)
    assert skipped.stats == pytest.approx(without.stats, abs=1e-6, nan_ok=True)
    assert [c["objects"] for c in skipped.classes] == [c["objects"] for c in without.classes]


def test_not_one_readable_image(checkpoint, scenes, tmp_path):
    content = json.loads((scenes / "val" / "annotations.json").read_text())
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(content))
    for image in content["images"]:
        (tmp_path / image["file_name"]).write_text("no picture")
    with pytest.raises(
        DataError, match=r"annotations.json: not one image could be read; the first"
    ):
        evaluate(checkpoint, path, bad_images="skip", num_workers=0, device="cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected an integer >= 1, got 0"),
        ({"num_workers": -1}, "num_workers: expected an integer >= 0, got -1"),
        ({"threshold": 7.0}, r"threshold: expected a number in \[0, 1\], got 7.0"),
        ({"bad_images": "drop"}, "bad_images: expected one of 'stop', 'skip', got 'drop'"),
        ({"output": __file__}, "output: .*test_evaluation.py cannot be made"),
        ({"against": "x"}, "against: is for the report; expected output with it, got none"),
    ],
)
def test_bad_arguments(checkpoint, scenes, arguments, message):
    with pytest.raises(DataError, match=message):
        evaluate(checkpoint, scenes / "val" / "annotations.json", **arguments)


@pytest.fixture
def authors(settings, scenes, tmp_path):
    """A folder and a file of the authors with the same weights, and one scene.

    As the authors have it, classes are category ids, here 1 to 6 of 9 classes.
    """
    config = TrainingConfig(**settings(backbone="resnet18"))
    model = build_model(config, [f"LABEL_{i}" for i in range(9)])
    args = argparse.Namespace(dilation=False, nheads=4)
    torch.save({"model": to_authors(model.state_dict()), "args": args}, tmp_path / "authors.pth")
    content = json.loads((scenes / "val" / "annotations.json").read_text())
    content["images"] = content["images"][:1]
    content["annotations"] = [
        a | {"category_id": a["category_id"] + 1}
        for a in content["annotations"]
        if a["image_id"] == content["images"][0]["id"]
    ]
    for category in content["categories"]:
        category["id"] += 1
    names = {category["id"]: category["name"] for category in content["categories"]}
    model.config.id2label = {i: names.get(i, "none") for i in range(9)}
    model.save_pretrained(tmp_path / "folder")
    ConditionalDetrImageProcessor().save_pretrained(tmp_path / "folder")
    path = tmp_path / "one.json"
    path.write_text(json.dumps(content))
    return tmp_path / "folder", tmp_path / "authors.pth", path


def test_evaluates_a_file_of_the_authors(authors, scenes):
    """As the folder with these weights and the default image processor."""
    folder, file, path = authors
    options = {"images": scenes / "val", "num_workers": 0, "device": "cpu"}
    expected = evaluate(folder, path, **options)
    with pytest.warns(UserWarning, match="images are prepared with default settings"):
        found = evaluate(file, path, **options)
    assert found.stats == pytest.approx(expected.stats, abs=1e-6, nan_ok=True)
    assert found.stats["AR100"] > 0
    named = {one["class"]: one["objects"] for one in expected.classes if one["objects"]}
    assert {one["class"]: one["objects"] for one in found.classes if one["objects"]} == named

    content = json.loads(path.read_text())
    content["categories"][-1]["id"] = 90
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"category 90 \(.*\): expected an id from 0 to 8, as"):
        evaluate(file, path, **options)


def test_processor_of_a_folder_has_to_be_there(authors, scenes):
    folder, _, path = authors
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(DataError, match=r"model: .*preprocessor_config.json"):
        evaluate(folder, path, scenes / "val", device="cpu")


@pytest.mark.parametrize(("name", "value"), [("resample", 3), ("do_resize", False)])
def test_a_processor_that_resizes_otherwise_is_refused(checkpoint, scenes, name, value):
    ConditionalDetrImageProcessor(**{name: value}).save_pretrained(checkpoint)
    with pytest.raises(DataError, match=f"model: .*its image processor has {name}={value}, but"):
        evaluate(checkpoint, scenes / "val" / "annotations.json", device="cpu")


@pytest.fixture(params=["folder", "file"])
def continued(request, checkpoint, index, settings):
    """Makes the image processor of a run that starts from the checkpoint."""
    source = checkpoint if request.param == "folder" else checkpoint / "model.safetensors"
    config = TrainingConfig(**settings(model=str(source), model_options={}))
    return lambda: make_processor(config, build_model(config, index.classes))


def test_training_normalises_as_its_checkpoint(continued, checkpoint, caplog):
    start = {"rescale_factor": 1 / 127.5, "image_mean": (0.5,) * 3, "image_std": (0.4,) * 3}
    start |= {"do_normalize": False, "resample": 3}
    ConditionalDetrImageProcessor(**start).save_pretrained(checkpoint)
    processor = continued()
    assert {name: getattr(processor, name) for name in start} == start | {"resample": 2}
    assert processor.size == {"shortest_edge": 64, "longest_edge": 96}
    assert "images resized bilinearly; its image processor has resample=3" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "expected a JSON file"), ('{"do_resize": 1}', "do_resize: expected True or False")],
)
def test_training_refuses_a_damaged_processor(continued, checkpoint, content, message):
    (checkpoint / "preprocessor_config.json").write_text(content)
    with pytest.raises(DataError, match=f"model: .*{message}"):
        continued()


def test_training_without_a_processor_warns(continued, checkpoint):
    (checkpoint / "preprocessor_config.json").unlink()
    with pytest.warns(UserWarning, match="images are prepared with default settings"):
        assert continued().rescale_factor == 1 / 255
