"""The benchmarks run, at sizes that take no time, and the README shows what they gave last."""

import json
import subprocess
import sys

import pytest

from benchmarks import loss, mask_head, measure, model, post_processing, tables


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        (model, "--backbone resnet18 --size 64 96 --padded --batch 2 --threads 1 --repeats 1"),
        (mask_head, "--size 128 160 --queries 10 --threads 1 --repeats 1"),
        (loss, "--batch 2 --targets 3 --threads 1 --repeats 1"),
        (
            post_processing,
            "--size 60 80 --input 80 100 --queries 20 --classes 9 --kept 4 --threads 1 --repeats 1",
        ),
    ],
)
def test_a_benchmark_measures_and_saves(script, arguments, results, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments.split(), "--output", "trial"])
    assert script.main() == 0
    content = json.loads((results / "trial.json").read_text())
    assert content["environment"]["torch"]
    assert all(row["ms"] > 0 for row in content["rows"])
    assert "cdetr_fast" in capsys.readouterr().out


def test_disagreeing_losses_are_not_reported(results, monkeypatch, capsys):
    detection_loss = loss.detection_loss

    def wrong(*arguments):
        value, names, auxiliary = detection_loss(*arguments)
        return 1.01 * value, names, auxiliary

    monkeypatch.setattr(loss, "detection_loss", wrong)
    arguments = "--batch 2 --targets 3 --threads 1 --repeats 1 --output trial"
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments.split()])
    assert loss.main() == 1
    assert "disagree" in capsys.readouterr().err
    assert not list(results.iterdir())


def test_the_readme_shows_the_results(root):
    command = [sys.executable, "-m", tables.__name__, "--check"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
