"""A training step: precision, accumulation, compilation, and gradients that are not finite."""

import dataclasses
import json
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from support.accelerate_state import forget_accelerate_state
from support.training_settings import final_state, losses, rows

from cdetr_fast import ConditionalDetrForObjectDetection
from cdetr_fast.loss import assignment
from cdetr_fast.training import DataError, TrainingConfig, TrainingStopped, train
from cdetr_fast.training.engine import Engine
from cdetr_fast.training.run.signals import StopSignals
from cdetr_fast.training.step import TrainingStep


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


def test_a_variable_of_accelerate_does_not_scale_gradients(settings, tmp_path, monkeypatch):
    runs = []
    for steps in ("1", "4"):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", steps)
        config = TrainingConfig(**settings(max_steps=2, output=str(tmp_path / steps)))
        train(config)
        runs.append([row["grad_norm"] for row in rows(config)])
    assert runs[0] == runs[1]


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


def test_reports_wait_for_the_gpu_that_sends_them(monkeypatch):
    """Training may run on another GPU than the current one."""
    recorded, host = [], torch.empty(3)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: host)
    monkeypatch.setattr(host, "copy_", lambda *_, **__: host, raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=recorded.append))
    values = SimpleNamespace(device=torch.device("cuda", 1), shape=(3,), dtype=torch.float32)
    step = SimpleNamespace(pending=[], with_gradient=[])
    TrainingStep._send(step, 1, values, [], [])
    assert recorded == ["stream of cuda:1"]
    assert step.pending[0].arrived is not None
