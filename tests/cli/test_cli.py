"""The command line, run as users run it: arguments in, exit code, output and files out."""

import json
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import cdetr_fast
from cdetr_fast import ConditionalDetrForObjectDetection, ConditionalDetrImageProcessor
from cdetr_fast.checkpoints.key_maps import to_authors


@pytest.fixture(scope="module")
def authors_file(checkpoint, tmp_path_factory) -> Path:
    """The weights of `checkpoint` in a file as the paper's authors save them."""
    model = ConditionalDetrForObjectDetection.from_pretrained(checkpoint)
    path = tmp_path_factory.mktemp("authors") / "checkpoint.pth"
    args = Namespace(dilation=False, nheads=8)
    torch.save({"model": to_authors(model.state_dict()), "args": args}, path)
    (path.parent / "preprocessor_config.json").write_text(
        (checkpoint / "preprocessor_config.json").read_text()
    )
    return path


def read(path: Path) -> object:
    return json.loads(path.read_text(encoding="utf-8"))


def test_help_is_quick_and_names_the_commands():
    code = (
        "import sys\n"
        "from cdetr_fast import cli\n"
        "sys.argv[1:] = ['--help']\n"
        "try: cli.main()\n"
        "except SystemExit: print([m for m in ('torch', 'numpy', 'PIL') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for command in ("detect", "demo", "train", "evaluate", "convert", "info"):
        assert re.search(rf"^\s+{command} ", done.stdout, flags=re.MULTILINE)


def test_authors_file(run, checkpoint, authors_file, pictures):
    """Detections are those of the folder with the same weights."""
    found = {}
    for model in (checkpoint, authors_file):
        arguments = ("--model", model, "--threshold", 0.0, "--device", "cpu")
        done = run("detect", pictures / "a.png", *arguments, "--output", "found")
        assert done.code == 0, done.err
        found[model] = read(pictures.parent / "work" / "found" / "detections.json")
    assert len(found[checkpoint]) == 21
    for ours, theirs in zip(found[authors_file], found[checkpoint], strict=True):
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-5)
        assert ours["bbox"] == pytest.approx(theirs["bbox"], abs=1e-3)


def test_file_that_is_no_checkpoint(run, pictures):
    done = run("detect", pictures / "a.png", "--model", pictures / "notes.txt")
    assert done.code == 1
    assert f"--model {pictures / 'notes.txt'}: {pictures / 'notes.txt'}: broken" in done.err


def test_module_is_the_same_command(root):
    command = [sys.executable, "-m", "cdetr_fast", "detect"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 2
    assert "Usage: cdetr-fast detect" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["detect"],
        ["detect", "a.png", "--threshold", "1.5"],
        ["detect", "a.png", "--threshold", "nan"],
        ["serve", "--max-wait", "nan"],
        ["serve", "--timeout", "inf"],
        ["detect", "a.png", "--batch-size", "0"],
        ["detect", "a.png", "--top-k", "many"],
        ["demo", "--seed", "-1"],
        ["demo", "--count", "0"],
        ["unknown"],
    ],
)
def test_wrong_usage_exits_with_2(run, arguments):
    done = run(*arguments)
    assert done.code == 2
    assert "Error:" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("model", "--model .*no-such-folder"),
        ("model file", "--model .*empty: expected"),
        ("config.json", "--model .*: num_queries: expected an integer >= 1, got '300'"),
        ("preprocessor_config.json", "--model .*: do_resize: expected True or False, got 1"),
        ("filter", "--model .*: resample: expected .* got BOX"),
        ("no image", "none of 1 images could be read"),
        ("empty folder", "no images in this folder"),
        ("device", "--device: 'frobnicator' cannot be used"),
        ("device without memory", "--device: 'meta' computes nothing"),
        ("output", "--output .*: (File exists|Not a directory)"),
    ],
)
def test_errors_are_one_line(run, checkpoint, pictures, tmp_path, case, message):
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copytree(checkpoint, tmp_path / "filter")
    ConditionalDetrImageProcessor(resample=4).save_pretrained(tmp_path / "filter")
    for name, wrong in (
        ("config.json", {"num_queries": "300"}),
        ("preprocessor_config.json", {"do_resize": 1}),
    ):
        shutil.copytree(checkpoint, tmp_path / name)
        (tmp_path / name / name).write_text(json.dumps(read(checkpoint / name) | wrong))
    arguments = {
        "model": [pictures, "--model", tmp_path / "no-such-folder"],
        "model file": [pictures, "--model", empty],
        "config.json": [pictures, "--model", tmp_path / "config.json"],
        "preprocessor_config.json": [pictures, "--model", tmp_path / "preprocessor_config.json"],
        "filter": [pictures, "--model", tmp_path / "filter"],
        "no image": [pictures / "notes.txt", "--model", checkpoint],
        "empty folder": [empty, "--model", checkpoint],
        "device": [pictures, "--model", checkpoint, "--device", "frobnicator"],
        "device without memory": [pictures, "--model", checkpoint, "--device", "meta"],
        "output": [pictures, "--model", checkpoint, "--output", pictures / "notes.txt"],
    }[case]
    done = run("detect", *arguments)
    assert done.code == 1
    last = done.err.strip().splitlines()[-1]
    assert last.startswith("cdetr-fast: ")
    assert re.search(message, last)
    assert "Traceback" not in done.err


def test_version(run):
    done = run("--version")
    assert (done.code, done.out) == (0, f"cdetr-fast {cdetr_fast.__version__}\n")


def test_quiet_leaves_results_and_errors(run, checkpoint, pictures, tmp_path):
    (pictures / "b.png").write_bytes(b"nothing")
    common = [pictures, "--model", checkpoint, "--output", tmp_path]
    done = run("detect", *common, "--quiet")
    assert done.code == 1
    assert done.out.startswith("2 images, ")
    (line,) = done.err.splitlines()
    assert line.startswith(f"cdetr-fast: skipped: {pictures / 'b.png'}")
    done = run("detect", *common, "--verbose", "--device", "frobnicator")
    assert done.code == 1
    assert "Traceback" in done.err
    assert done.err.splitlines()[-1].startswith("cdetr-fast: --device: ")
