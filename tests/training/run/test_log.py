"""The log of a run: trackers, images per second."""

import dataclasses

import pytest

from cdetr_fast.training import DataError, TrainingConfig, train
from cdetr_fast.training.run.log import RunLog, read_rows
from cdetr_fast.training.step import StepReport


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
