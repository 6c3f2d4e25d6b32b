"""Runs from the first step to the model folder, and what happens when something goes wrong."""

import dataclasses
import json
import math
import os
import resource
import shutil
import signal
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from support.accelerate_state import forget_accelerate_state

from cdetr_fast import ConditionalDetrForObjectDetection, ConditionalDetrImageProcessor
from cdetr_fast.loss import assignment
from cdetr_fast.training import DataError, TrainingConfig, TrainingStopped, train
from cdetr_fast.training.engine import Engine
from cdetr_fast.training.evaluation.detection import evaluate_detections
from cdetr_fast.training.run.log import RunLog, read_rows
from cdetr_fast.training.run.signals import StopSignals
from cdetr_fast.training.run.state import checkpoint_files, load_checkpoint, save_checkpoint
from cdetr_fast.training.step import StepReport, TrainingStep


def rows(config, kind="train"):
    lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def losses(config):
    return [row["loss"] for row in rows(config)]


def final_state(config):
    return load_checkpoint(checkpoint_files(Path(config.output) / "checkpoints")[-1])


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


@pytest.mark.parametrize("where", ["loss", "boxes", "gradient"])
def test_non_finite_steps_are_skipped(settings, monkeypatch, where, caplog):
    config = TrainingConfig(**settings(epochs=1, ema_decay=0.0))
    engine = Engine(config, StopSignals())
    model = engine.accelerator.unwrap_model(engine.model)
    backward = type(engine.training_step)._backward
    snapshots = []

    def spoiled(self, batch, num_boxes):
        snapshots.append([p.detach().clone() for p in model.parameters()])
        if len(snapshots) != 2:
            return backward(self, batch, num_boxes)
        nan = float("nan")
        if where == "loss":
            num_boxes = num_boxes * nan
        forward = type(model).forward

        def wrong(*args, **kwargs):
            output = forward(model, *args, **kwargs)
            output.pred_boxes = output.pred_boxes.index_fill(0, torch.tensor([1]), nan)
            return output

        if where == "boxes":
            model.forward, kept = wrong, model.forward
        if where == "gradient":
            handle = model.bbox_predictor.layers[0].weight.register_hook(lambda g: g * nan)
        result = backward(self, batch, num_boxes)
        if where == "boxes":
            model.forward = kept
        if where == "gradient":
            handle.remove()
        return result

    monkeypatch.setattr(TrainingStep, "_backward", spoiled)
    result = engine.run()
    assert result["step"] == 4
    same = [all(map(torch.equal, a, b)) for a, b in pairwise(snapshots)]
    assert same == [False, True, False]
    assert rows(config)[-1]["skipped"] == 1
    assert all(p.isfinite().all() for p in model.parameters())
    message = "\n".join(record.getMessage() for record in caplog.records)
    assert "step 2 skipped, not finite" in message
    expected = {"loss": "gradient of", "boxes": "pred_boxes of decoder layer 1, image ids ["}
    assert expected.get(where, "gradient of bbox_predictor.layers.0.weight, image ids") in message


def test_stops_after_many_non_finite_steps(settings, monkeypatch):
    config = TrainingConfig(**settings(max_nonfinite=3, epochs=8))
    backward = TrainingStep._backward

    def spoiled(self, batch, num_boxes):
        return backward(self, batch, num_boxes * float("inf") * 0)

    monkeypatch.setattr(TrainingStep, "_backward", spoiled)
    with pytest.raises(TrainingStopped, match="3 steps in a row were not finite"):
        train(config)
    state = final_state(config)
    assert all(v.isfinite().all() for v in state["model"].values() if v.is_floating_point())
    assert not state["optimizer"]["state"] or all(
        s["step"] == 0 for s in state["optimizer"]["state"].values()
    )
    with pytest.raises(TrainingStopped, match="steps in a row were not finite"):
        train(dataclasses.replace(config, resume=True))
    assert final_state(config)["step"] <= state["step"] + 2


@pytest.mark.parametrize("precision", ["bf16", "bf16-pure"])
def test_half_precision_and_batches_without_objects(settings, scenes, tmp_path, precision):
    content = json.loads((scenes / "train" / "annotations.json").read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] < 2]
    path = tmp_path / "few.json"
    path.write_text(json.dumps(content))
    config = TrainingConfig(
        **settings(
            train_annotations=str(path),
            train_images=str(scenes / "train"),
            precision=precision,
            batch_size=1,
            accumulate=2,
            epochs=1,
            gradient_checkpointing=precision == "bf16",
        )
    )
    train(config)
    assert len(losses(config)) == 7
    assert all(map(torch.isfinite, map(torch.tensor, losses(config))))
    assert rows(config)[-1]["skipped"] == 0
    dtype = final_state(config)["model"]["class_labels_classifier.weight"].dtype
    assert dtype == (torch.bfloat16 if precision == "bf16-pure" else torch.float32)


def test_losses_in_bf16_follow_those_in_fp32(settings, tmp_path, monkeypatch):
    """Boxes and costs are in fp32, whatever the layers before them are in."""
    seen = set()
    cost = assignment.matching_cost

    def spied(logits, boxes, *rest, **options):
        found = cost(logits, boxes, *rest, **options)
        seen.add((boxes.dtype, found.dtype))
        return found

    monkeypatch.setattr(assignment, "matching_cost", spied)
    curves = {}
    for precision in ("fp32", "bf16"):
        config = TrainingConfig(
            **settings(
                precision=precision,
                output=str(tmp_path / precision),
                model_options=settings()["model_options"] | {"dropout": 0.0},
            )
        )
        train(config)
        curves[precision] = losses(config)
        forget_accelerate_state()  # its precision is that of the process
    assert len(curves["fp32"]) == len(curves["bf16"]) > 3
    assert curves["bf16"] != curves["fp32"]
    assert curves["bf16"] == pytest.approx(curves["fp32"], rel=0.05)
    assert seen == {(torch.float32, torch.float32)}


def test_accumulation_is_one_large_batch(settings, tmp_path):
    """Boxes are counted over all batches of a step, however many each of them has."""
    gradients = []
    for batch_size, accumulate in ((4, 1), (1, 4)):
        config = TrainingConfig(
            **settings(
                batch_size=batch_size,
                accumulate=accumulate,
                max_steps=1,
                max_grad_norm=0.0,
                output=str(tmp_path / str(batch_size)),
                model_options=settings()["model_options"] | {"dropout": 0.0},
            )
        )
        train(config)
        moments = final_state(config)["optimizer"]["state"]
        gradients.append([moments[i]["exp_avg"] for i in sorted(moments)] + losses(config))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


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


def test_full_disk_loses_nothing(tmp_path, caplog):
    old = save_checkpoint(tmp_path, 1, {"x": torch.ones(10)}, keep=1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limit[1]))
    try:
        assert save_checkpoint(tmp_path, 2, {"x": torch.ones(100_000)}, keep=1) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert "could not be written" in caplog.text
    assert list(tmp_path.iterdir()) == [old]
    assert torch.equal(load_checkpoint(old)["x"], torch.ones(10))
    new = save_checkpoint(tmp_path, 3, {"x": torch.ones(100_000)}, keep=1)
    assert list(tmp_path.iterdir()) == [new]


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


def test_broken_checkpoint(tmp_path):
    path = tmp_path / "step-00000001.pt"
    path.write_bytes(b"PK half of it")
    with pytest.raises(DataError, match=r"step-00000001.pt: broken .* remove it"):
        load_checkpoint(path)


def test_a_variable_of_accelerate_does_not_scale_gradients(settings, tmp_path, monkeypatch):
    runs = []
    for steps in ("1", "4"):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", steps)
        config = TrainingConfig(**settings(max_steps=2, output=str(tmp_path / steps)))
        train(config)
        runs.append([row["grad_norm"] for row in rows(config)])
    assert runs[0] == runs[1]


def test_trackers(settings, tmp_path, monkeypatch):
    config = TrainingConfig(**settings(max_steps=1, trackers=["tensorboard"], ema_decay=0.5))
    train(config)
    (path,) = (tmp_path / "run" / "training").rglob("hparams.yml")
    text = path.read_text()
    assert "ema_decay: 0.5" in text
    assert "learning_rate: 0.001" in text
    monkeypatch.setattr("accelerate.tracking._available_trackers", ["tensorboard"])
    with pytest.raises(DataError, match=r"trackers: wandb not installed .* pip install wandb"):
        train(TrainingConfig(**settings(trackers=["wandb", "tensorboard"])))
    with pytest.raises(DataError, match=r"trackers.*nonsense"):
        train(TrainingConfig(**settings(trackers=["nonsense"])))


def test_rate_is_not_that_of_two_reports_at_once(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    log = RunLog(tmp_path / "metrics.jsonl", 1, 10, lambda *a, **k: None)
    report = StepReport(0, {"loss": 1.0}, 1.0, False, False, 8, 3, [])
    rates = []
    for number, seconds in enumerate((3.0, 1e-4, 1.0, 1.0)):
        now[0] += seconds
        log.add(dataclasses.replace(report, step=number), {})
        rates.append(log.rate)
    assert rates == [None, None, pytest.approx(16, rel=1e-3), pytest.approx(16, rel=1e-3)]
    written = [row["images_per_second"] for row in read_rows(tmp_path / "metrics.jsonl")]
    assert written[:2] == [None, None]
    assert written[2] == pytest.approx(16, rel=1e-2)


def test_compiled(settings, tmp_path, monkeypatch):
    """The losses of a run without. Torch traces it; code generation is left out, for its time."""
    compiled = []

    def compile_quickly(model, original=torch.nn.Module.compile):
        compiled.append(model)
        original(model, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_quickly)
    found = []
    for compile in (False, True):
        config = TrainingConfig(
            **settings(max_steps=2, compile=compile, output=str(tmp_path / str(compile)))
        )
        train(config)
        found.append(losses(config))
    assert len(compiled) == 1
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    ConditionalDetrForObjectDetection.from_pretrained(tmp_path / "True" / "model", strict=True)


def test_fp16_on_a_cpu_is_refused(settings):
    """Accelerate would train in fp32 without a word."""
    with pytest.raises(DataError, match="precision: fp16 needs a GPU, the device is cpu"):
        train(TrainingConfig(**settings(precision="fp16")))


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
