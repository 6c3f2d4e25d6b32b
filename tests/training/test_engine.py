"""Runs from the first step to the model folder, and what happens when something goes wrong."""

import dataclasses
import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from support.training_settings import final_state, losses, rows

from cdetr_fast import ConditionalDetrForObjectDetection, ConditionalDetrImageProcessor
from cdetr_fast.demo.scenes import CLASSES
from cdetr_fast.training import DataError, TrainingConfig, TrainingStopped, train
from cdetr_fast.training.engine import Engine
from cdetr_fast.training.evaluation.detection import evaluate_detections
from cdetr_fast.training.initial_weights import build_model
from cdetr_fast.training.run.signals import StopSignals
from cdetr_fast.training.step import TrainingStep


def assert_same(state, expected):
    """Bitwise, through dictionaries and lists; the log has wall time in it."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(state, expected)
    elif isinstance(expected, dict):
        assert state.keys() == expected.keys()
        for key, value in expected.items():
            if key != "seconds":
                assert_same(state[key], value)
    elif isinstance(expected, (list, tuple)):
        for a, b in zip(state, expected, strict=True):
            assert_same(a, b)
    else:
        assert state == expected


@pytest.fixture
def fails_at(monkeypatch):
    """Lets the step of a number raise an exception, as a crash does."""

    def arrange(step):
        monkeypatch.undo()
        original = TrainingStep.__call__

        def call(self, number, *args):
            if number == step:
                raise RuntimeError("crash")
            original(self, number, *args)

        monkeypatch.setattr(TrainingStep, "__call__", call)

    yield arrange
    monkeypatch.undo()


def test_trains_and_writes_what_users_look_at(settings, scenes, tmp_path):
    config = TrainingConfig(
        **settings(
            val_annotations=str(scenes / "val" / "annotations.json"),
            ema_decay=0.9,
            schedule="cosine",
            warmup_steps=2,
            trackers=["tensorboard"],
            num_workers=1,
            evaluate_every=1,
        )
    )
    result = train(config)
    assert result["step"] == 8
    assert set(result) > {"AP", "AP50", "AR100"}
    run = tmp_path / "run"
    for name in (
        *("config.yaml", "labels.txt", "metrics.jsonl", "report.html", "samples/epoch_0001.jpg"),
        *("evaluation/metrics.json", "evaluation/classes.csv", "evaluation/detections.json"),
        *("model/README.md", "best/model.safetensors", "training"),
    ):
        assert (run / name).exists(), name
    assert TrainingConfig.from_yaml(run / "config.yaml") == config
    rates = [row["lr_rest"] for row in rows(config)]
    assert rates[0] == pytest.approx(1e-3 / 3)
    assert rates[-1] < rates[2] == max(rates) == pytest.approx(1e-3)
    assert [row["lr_backbone"] for row in rows(config)] == pytest.approx([r / 10 for r in rates])
    assert len(rows(config, "eval")) == 2

    # The folder is the averaged model, and transformers' pipeline of loading works on it.
    model = ConditionalDetrForObjectDetection.from_pretrained(run / "model", strict=True)
    assert model.config.id2label[5] == "cross"
    assert ConditionalDetrImageProcessor.from_pretrained(run / "model").size == {
        "shortest_edge": 64,
        "longest_edge": 96,
    }
    state = final_state(config)
    trained = dict(model.named_parameters())
    current = state["model"]["class_labels_classifier.weight"]
    average = trained["class_labels_classifier.weight"]
    assert any(torch.equal(average, x) for x in state["average"]["average"])
    assert not torch.equal(average, current)

    with pytest.raises(DataError, match=r"run has a run already; pass --resume"):
        train(config)


def test_learns(settings):
    config = TrainingConfig(
        **settings(
            epochs=25, crop_probability=0.0, flip_probability=0.0, scales=[64], batch_size=14
        )
    )
    train(config)
    assert losses(config)[-1] < 0.8 * losses(config)[0]


@pytest.mark.parametrize("crash", [1, 3, 6])
def test_resumes_bitwise(settings, fails_at, tmp_path, crash):
    """After a crash at any step: the same losses, weights, moments, average, random numbers."""
    options = {"save_every": 2, "ema_decay": 0.9, "precision": "fp32", "log_every": 2}
    options["model_options"] = settings()["model_options"] | {"dropout": 0.1}
    whole = TrainingConfig(**settings(**options, output=str(tmp_path / "whole")))
    train(whole)
    config = TrainingConfig(**settings(**options))
    fails_at(crash)
    with pytest.raises(RuntimeError, match="crash"):
        train(config)
    fails_at(-1)
    config.resume = True
    config.num_workers = 1
    train(config)
    assert losses(config) == losses(whole)
    assert_same(final_state(config), final_state(whole))


def test_sigterm_saves_and_ends(settings, monkeypatch):
    config = TrainingConfig(**settings())
    original = TrainingStep.__call__

    def call(self, step, *args):
        original(self, step, *args)
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(TrainingStep, "__call__", call)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TrainingStopped, match=r"continue with --resume") as stopped:
        train(config)
    assert stopped.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    assert final_state(config)["step"] == 2  # in which it came
    monkeypatch.undo()
    config.resume = True
    assert train(config)["step"] == 8
    assert len(losses(config)) == 8


@pytest.fixture
def damaged(settings, damage):
    """Settings of a run in which one image is cut short."""
    return settings(train_annotations=str(damage("train", "000003.png")), epochs=1)


def test_unreadable_image_stops_with_a_saved_state(damaged):
    config = TrainingConfig(**damaged)
    with pytest.raises(
        TrainingStopped, match=r"000003.png \(image id 3\): cannot be read .*\n.* is saved in"
    ):
        train(config)
    assert final_state(config)["step"] >= 1


def test_unreadable_image_is_skipped(damaged, caplog):
    config = TrainingConfig(**damaged | {"bad_images": "skip", "batch_size": 1})
    assert train(config)["step"] == 14
    assert "000003.png (image id 3): cannot be read" in caplog.text


def test_unreadable_validation_image(settings, scenes, damage, caplog):
    """Stops with the state saved, and a resumed run evaluates before all else; or is left out."""
    path = damage("val", "000002.png")
    options = {"val_annotations": str(path), "epochs": 2, "evaluate_every": 1}
    config = TrainingConfig(**settings(**options, output=str(path.parent / "run")))
    message = r"1 of 5 images could not be read:\n.*000002.png \(image id 2\): .*\nStep 4 is saved"
    with pytest.raises(TrainingStopped, match=message):
        train(config)
    assert rows(config, "eval") == []

    skipping = TrainingConfig(**settings(**options, bad_images="skip"))
    train(skipping)
    assert "they are left out of the figures" in caplog.text

    shutil.copy(scenes / "val" / "000002.png", path.parent)
    train(dataclasses.replace(config, resume=True))
    assert [row["step"] for row in rows(config, "eval")] == [4, 8]
    assert losses(config) == losses(skipping)  # the figures alone differ

    content = json.loads(path.read_text())
    content["images"] = [image for image in content["images"] if image["id"] != 2]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 2]
    path.write_text(json.dumps(content))
    without = TrainingConfig(**settings(**options, output=str(path.parent / "without")))
    train(without)
    skipped, whole, expected = (
        json.loads((Path(c.output) / "evaluation" / "metrics.json").read_text())
        for c in (skipping, config, without)
    )
    assert len(skipped["not_evaluated"]) == 1
    for name in ("images", "stats", "classes"):
        assert skipped[name] == expected[name]
    assert (whole["images"], skipped["images"]) == (5, 4)


@pytest.mark.parametrize("broken", ["samples", "evaluation", "report", "model"])
def test_what_cannot_be_written_is_written_after_resume(
    settings, scenes, tmp_path, monkeypatch, caplog, broken
):
    """A full disk while results are written ends neither training nor its exit code well."""
    raised = {
        "samples": (
            "cdetr_fast.training.evaluation.pictures.draw_images",
            OSError(28, "No space left"),
        ),
        "evaluation": (
            "cdetr_fast.training.evaluation.scored.write_json",
            OSError(28, "No space"),
        ),
        "report": (
            "cdetr_fast.training.evaluation.report.render",
            ZeroDivisionError("No space between lines"),  # whatever it is
        ),
        "model": ("safetensors.torch.save_file", SafetensorError("No space left on device")),
    }
    place, error = raised[broken]
    val = str(scenes / "val" / "annotations.json")
    config = TrainingConfig(**settings(val_annotations=val, evaluate_every=1, save_every=100))

    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(place, full)
    with pytest.raises(TrainingStopped, match=f"to the last step, but .*{broken}.*--resume"):
        train(config)
    assert "No space" in caplog.text
    assert final_state(config)["step"] == 8
    monkeypatch.undo()
    result = train(dataclasses.replace(config, resume=True))
    assert result["step"] == 8
    run = tmp_path / "run"
    names = ("samples/epoch_0002.jpg", "evaluation/detections.json", "report.html")
    for name in (*names, "model/model.safetensors", "model/README.md", "best/model.safetensors"):
        assert (run / name).exists(), name


def test_a_best_model_that_could_not_be_written_is_not_the_best(
    settings, scenes, tmp_path, monkeypatch
):
    """Else `best/` would keep an older one until a still better one comes."""
    val = str(scenes / "val" / "annotations.json")
    config = TrainingConfig(**settings(val_annotations=val, evaluate_every=1))
    figures, export = iter([0.5, 0.4]), Engine._export

    def scored(*args):
        evaluation = evaluate_detections(*args)
        evaluation.stats["AP"] = next(figures)
        return evaluation

    def full_at_first(engine, weights, folder):
        if folder.name == "best" and engine.epoch == 1:
            raise OSError(28, "No space left on device")
        export(engine, weights, folder)

    monkeypatch.setattr("cdetr_fast.training.engine.evaluate_detections", scored)
    monkeypatch.setattr(Engine, "_export", full_at_first)
    train(config)
    assert final_state(config)["best"] == 0.4
    assert (tmp_path / "run" / "best" / "model.safetensors").exists()


@pytest.mark.parametrize(("start", "queries"), [("new", 300), ("options", 12), ("checkpoint", 3)])
@pytest.mark.filterwarnings("ignore:.*images are prepared with default settings:UserWarning")
def test_images_with_more_objects_than_queries_are_noted(
    settings, scenes, tmp_path, start, queries
):
    content = json.loads((scenes / "train" / "annotations.json").read_text())
    first = content["annotations"][0]
    content["annotations"] = [first | {"id": i} for i in range(queries + 1)]
    path = tmp_path / "full.json"
    path.write_text(json.dumps(content))
    changes = {"train_annotations": str(path), "train_images": str(scenes / "train")}
    options = settings()["model_options"]
    if start == "new":
        changes["model_options"] = {k: v for k, v in options.items() if k != "num_queries"}
    elif start == "checkpoint":
        config = TrainingConfig(**settings(model_options=options | {"num_queries": 3}))
        build_model(config, CLASSES).save_pretrained(tmp_path / "start")
        changes |= {"model": str(tmp_path / "start"), "model_options": {}}
    config = TrainingConfig(**settings(**changes))
    Engine(config, StopSignals())
    expected = f"with more objects than the model's {queries} queries, ids ({first['image_id']})"
    assert expected in (Path(config.output) / "labels.txt").read_text()


def test_validation_set_without_objects(settings, scenes, tmp_path, caplog):
    """AP cannot be measured: that is logged once, and `best` is the newest model."""
    content = json.loads((scenes / "val" / "annotations.json").read_text())
    path = tmp_path / "empty.json"
    path.write_text(json.dumps(content | {"annotations": []}))
    config = TrainingConfig(
        **settings(val_annotations=str(path), val_images=str(scenes / "val"), evaluate_every=1)
    )
    caplog.set_level("INFO")
    result = train(config)
    assert math.isnan(result["AP"])
    assert [row["AP"] for row in rows(config, "eval")] == [None, None]
    said = [
        r for r in caplog.records if "can neither be trained on nor measure AP" in r.getMessage()
    ]
    assert len(said) == 1
    assert "empty.json" in said[0].getMessage()
    run = Path(config.output)
    assert "can neither be trained on nor measure AP" in (run / "labels.txt").read_text()
    weights = {name: (run / name / "model.safetensors").read_bytes() for name in ("model", "best")}
    assert weights["best"] == weights["model"]

    path.write_text(json.dumps(content))  # with objects, the figure counts from here on
    train(dataclasses.replace(config, resume=True, epochs=3))
    assert final_state(config)["best"] >= 0
