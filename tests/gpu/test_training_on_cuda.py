"""`train` on a GPU: every precision learns, graphs too, and an interrupted run resumes."""

import dataclasses
from pathlib import Path

import pytest
import torch
from support.accelerate_state import forget_accelerate_state
from support.training_settings import rows, short_run, write_scenes

pytest.importorskip("accelerate")
pytest.importorskip("faster_coco_eval")

from cdetr_fast.training import TrainingConfig, TrainingStopped, train
from cdetr_fast.training.run.state import checkpoint_files, load_checkpoint
from cdetr_fast.training.step import TrainingStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(autouse=True)
def _own_accelerate_state():
    """Also where the tests' conftest.py cannot be imported."""
    yield
    forget_accelerate_state()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"))


def config_of(scenes, output, **changes):
    """40 steps on whole images, evaluated at the end."""
    values = short_run(scenes, output)
    values |= {"device": "auto", "epochs": 20, "batch_size": 7, "num_workers": 1}
    values |= {"scales": [64], "crop_probability": 0.0, "flip_probability": 0.0}
    values |= {"val_annotations": str(scenes / "val" / "annotations.json")}
    return TrainingConfig(**values | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "fp32"},
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"precision": "bf16-pure"},
        {"precision": "bf16", "cuda_graphs": True},
        {"precision": "fp16", "cuda_graphs": True},
        {"precision": "bf16", "gradient_checkpointing": True, "accumulate": 2, "batch_size": 3},
        {"precision": "bf16", "ema_decay": 0.9},
    ],
    ids=lambda changes: "-".join(f"{k}={v}" for k, v in changes.items()),
)
def test_learns_and_evaluates(scenes, tmp_path, changes):
    config = config_of(scenes, tmp_path / "run", **changes)
    result = train(config)
    assert result["step"] == len(rows(config)) > 40 - 1
    assert {"AP", "AP50"} < set(result)
    written = rows(config)
    early, late = ([row["loss"] for row in part] for part in (written[:5], written[-5:]))
    assert sum(late) < 0.9 * sum(early)
    # The scaler of fp16 finds its factor by steps that overflow.
    assert written[-1]["skipped"] <= (8 if config.precision == "fp16" else 0)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_stopped_run_goes_on(scenes, tmp_path, monkeypatch, precision):
    """With the same images; sums on a GPU may be taken in another order each time."""
    whole = config_of(scenes, tmp_path / "whole", epochs=4, precision=precision)
    train(whole)
    broken = dataclasses.replace(whole, output=str(tmp_path / "broken"))
    original = TrainingStep.__call__

    def told_to_end(self, step, batches, stop=False):
        original(self, step, batches, stop or step == 3)

    monkeypatch.setattr(TrainingStep, "__call__", told_to_end)
    with pytest.raises(TrainingStopped, match="continue with --resume"):
        train(broken)
    monkeypatch.undo()
    train(dataclasses.replace(broken, resume=True))
    ours, expected = ([row["loss"] for row in rows(x)] for x in (broken, whole))
    assert ours == pytest.approx(expected, rel=2e-2)
    state = load_checkpoint(checkpoint_files(Path(broken.output) / "checkpoints")[-1])
    assert "cuda" in state["random"][0]
    assert ("scaler" in state) == (precision == "fp16")
