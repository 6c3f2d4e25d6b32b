"""Every benchmark runs, at sizes that take no time, and reports no speed over a failed check."""

import json

import pytest

from benchmarks import results, run
from benchmarks.registry import BENCHMARKS
from benchmarks.suite import loss

IMAGE = "--backbone resnet18 --size 64 96"
SMALL = {
    "model": f"{IMAGE} --padded --batch 2 --steps",
    "stages": IMAGE,
    "decoder": "--map 3 4 --batch 2 --padded --backward",
    "mask_head": "--size 128 160 --queries 10",
    "precision": "--count 3 --precisions bf16",
    "patching": f"{IMAGE} --training-size 64 96",
    "preprocessing": "--batch 1 2 --steps",
    "folder": "--images 2 --edges 64 96 --backbone resnet18",
    "training": "--size 64 96 --batch 2 --layers 2 --targets 3",
    "loss": "--batch 2 --targets 3",
    "loading": "--images 4 --workers 0",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    return tmp_path


def measured(folder, name, options):
    """The rows of a run, and its exit status."""
    common = ["--threads", "1", "--repeats", "1", "--output", "trial"]
    status = run.main([name, *options.split(), *common])
    return json.loads((folder / "trial.json").read_text())["rows"], status


def test_every_benchmark_has_a_small_form():
    assert set(SMALL) == {entry.name for entry in BENCHMARKS}


@pytest.mark.parametrize("name", SMALL)
def test_it_measures_checks_and_saves(name, folder, capsys):
    rows, status = measured(folder, name, SMALL[name])
    assert status == 0
    for row in rows:
        assert row["benchmark"] == name
        assert row["ms"] > 0
        # Every benchmark has a gate; other images than the peer's have nothing to be compared with.
        assert row["accuracy"] or row["provider"] == "cdetr_fast, augmented"
    environment = json.loads((folder / "trial.json").read_text())["environment"]
    assert environment["torch"]
    assert environment["command"].startswith(f"python -m benchmarks {name} --")
    assert "written to" in capsys.readouterr().out


def test_disagreeing_losses_are_not_reported(folder, monkeypatch, capsys):
    detection_loss = loss.detection_loss

    def wrong(*arguments):
        value, names, auxiliary = detection_loss(*arguments)
        return 1.01 * value, names, auxiliary

    monkeypatch.setattr(loss, "detection_loss", wrong)
    rows, status = measured(folder, "loss", "--batch 2 --targets 3")
    assert status == 1
    theirs, ours = rows
    assert theirs["ms"] > 0
    assert "ms" not in ours
    assert "speed-up" not in ours
    assert "loss error is 0.01" in ours["not measured"]
    assert "loss error is 0.01" in capsys.readouterr().err


def test_what_does_not_go_together_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(["precision", "--annotations", "test.json"])
    assert stop.value.code == 2
    assert "expected --calibration FOLDER" in capsys.readouterr().err
