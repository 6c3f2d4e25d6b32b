"""`cdetr-fast demo`: scenes drawn, detected and scored, and a photograph of the user's."""

import re
import sys

import pytest
from PIL import Image

from cdetr_fast.cli.demo import SCENES_PER_SEED, _program
from cdetr_fast.demo.scenes import CLASSES, TRAIN_SEED


def test_demo_scores_unseen_scenes(run, tmp_path):
    pytest.importorskip("faster_coco_eval")
    done = run("demo", "--output", tmp_path, "--device", "cpu")
    assert done.code == 0, done.err
    values = dict(line.split(maxsplit=1) for line in done.out.splitlines())
    assert values["scenes"].startswith("200 unseen")
    assert float(values["AP50"]) >= 0.80
    assert 0.3 <= float(values["AP"]) <= float(values["AP50"])
    assert re.match(r"\d+\.\d ms per image", values["time"])
    assert Image.open(tmp_path / "contact_sheet.png").size > (640, 480)
    assert len(list(tmp_path.glob("scene_*.png"))) == 6
    commands = re.findall(r"^  cdetr-fast (.*?)  +# .+$", done.err, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["detect", "serve", "train"]


def test_demo_names_commands_as_it_was_started(monkeypatch, tmp_path):
    """`make demo` starts .venv/bin/cdetr-fast, which is on nobody's PATH."""
    program = tmp_path / "bin" / "cdetr-fast"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bin/cdetr-fast", "demo"])
    assert _program() == "bin/cdetr-fast"
    monkeypatch.setenv("PATH", str(program.parent))
    assert _program() == "cdetr-fast"
    monkeypatch.setattr(sys, "argv", ["cdetr_fast/__main__.py", "demo"])
    assert _program() == "python -m cdetr_fast"


def test_demo_depends_on_the_seed_alone(run, tmp_path):
    pytest.importorskip("faster_coco_eval")
    sheets = {}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run("demo", "--count", 2, "--seed", seed, "--output", tmp_path / name, "--device", "cpu")
        sheets[name] = (tmp_path / name / "contact_sheet.png").read_bytes()
    assert sheets["a"] == sheets["b"] != sheets["c"]


def test_demo_never_draws_a_training_scene():
    largest = 99_999 * SCENES_PER_SEED + SCENES_PER_SEED - 1
    assert largest < TRAIN_SEED


def test_demo_on_a_photograph_with_any_model(run, checkpoint, photo, tmp_path):
    photo.save(tmp_path / "p.png")
    done = run(
        *["demo", "--image", tmp_path / "p.png", "--model", checkpoint],
        *["--threshold", 0, "--output", tmp_path / "o"],
    )
    assert done.code == 0, done.err
    assert "remote at" in done.out
    assert Image.open(tmp_path / "o" / "p.jpg").size == photo.size


def test_demo_refuses_to_score_a_model_of_other_classes(run, checkpoint, tmp_path):
    done = run("demo", "--model", checkpoint, "--output", tmp_path)
    assert done.code == 1
    assert ", ".join(CLASSES) in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_demo_without_the_package_that_scores(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    done = run("demo", "--count", 1, "--output", tmp_path)
    assert done.code == 0, done.err
    assert "AP         not measured: pip install 'cdetr-fast[eval]'\n" in done.out
    assert (tmp_path / "contact_sheet.png").is_file()
