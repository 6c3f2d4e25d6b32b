"""Every benchmark runs, at sizes that take no time, and reports no speed over a failed check."""

import argparse
import json
import pickle

import pytest

from benchmarks import results, run
from benchmarks.registry import BENCHMARKS
from benchmarks.suite import loss, mask_head, post_processing, runtimes, topk

IMAGE = "--backbone test_resnet --size 64 96"
SMALL = {
    "model": f"{IMAGE} --padded --batch 2 --layers 1 --steps",
    "runtimes": "--backbone test_resnet --layers 1 --shapes 2x64x96p --only VINO.fp32",
    "stages": IMAGE,
    "decoder": "--map 3 4 --batch 2 --padded --backward",
    "mask_head": "--size 64 96 --queries 3",
    "precision": "--count 3 --precisions bf16",
    "patching": f"{IMAGE} --training-backbone test_resnet --training-size 64 96 --layers 1",
    "preprocessing": "--batch 1 2 --steps",
    "folder": "--images 2 --edges 64 96 --backbone test_resnet",
    "serve": "--requests 4 --clients 1 2",
    "topk": "--batch 1 3 --head 30x9 --k 20",
    "post_processing": "--size 60 80 --input 80 100 --queries 20 --classes 9 --kept 4",
    "training": f"{IMAGE} --batch 2 --layers 2 --targets 3",
    "loss": "--batch 2 --targets 3",
    "loading": "--images 4 --workers 0",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    return tmp_path


@pytest.fixture
def in_this_process(monkeypatch):
    """Make and call in this process what benchmarks measure the memory of; test_case starts one."""

    def call(make, *arguments):
        make, arguments = pickle.loads(pickle.dumps((make, arguments)))
        make(*arguments)()
        return 1.0

    for module in (mask_head, post_processing):
        monkeypatch.setattr(module, "peak_mib_of_process", call)


def measured(folder, name, options):
    """The rows of a run, and its exit status."""
    common = ["--threads", "1", "--repeats", "1", "--output", "trial"]
    status = run.main([name, *options.split(), *common])
    return json.loads((folder / "trial.json").read_text())["rows"], status


def test_every_benchmark_has_a_small_form():
    assert set(SMALL) == {entry.name for entry in BENCHMARKS}


@pytest.mark.parametrize("name", SMALL)
def test_it_measures_checks_and_saves(name, folder, in_this_process, capsys):
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


def test_detections_that_differ_are_not_reported(folder, monkeypatch, capsys):
    plain = topk.plain
    monkeypatch.setattr(topk, "plain", lambda *arguments: [1.01 * x for x in plain(*arguments)])
    rows, status = measured(folder, "topk", "--batch 1 --head 30x9 --k 20")
    assert status == 1
    assert [row["provider"] for row in rows if "ms" not in row] == [
        "detection_topk", "detection_topk, torch"
    ]  # fmt: skip
    assert "max |dscore| is" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["segmentation", "segments_info"])
def test_segments_that_differ_are_not_reported(part, folder, monkeypatch, capsys):
    make_call = post_processing.make_call

    def wrong(provider, *arguments):
        call = make_call(provider, *arguments)
        if provider != "cdetr_fast, its numbers":
            return call

        def changed():
            found = call()
            if not isinstance(found, dict):
                return found
            other = found[part] + 1 if part == "segmentation" else found[part][1:]
            return {**found, part: other}

        return changed

    monkeypatch.setattr(post_processing, "make_call", wrong)
    monkeypatch.setattr(post_processing, "peak_mib_of_process", lambda *_: 1.0)
    rows, status = measured(folder, "post_processing", SMALL["post_processing"])
    assert status == 1
    failed = [row for row in rows if "ms" not in row]
    assert [row["work"] for row in failed] == ["instance", "panoptic"]
    assert {row["provider"] for row in failed} == {"cdetr_fast, its numbers"}
    assert all("differ" in row["not measured"] for row in failed)


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


def test_a_missing_runtime_is_named(folder, monkeypatch):
    found = runtimes.importlib.util.find_spec
    missing = ("openvino", "onnx")
    monkeypatch.setattr(
        runtimes.importlib.util, "find_spec", lambda name: None if name in missing else found(name)
    )
    rows, status = measured(
        folder, "runtimes", "--backbone test_resnet --layers 1 --shapes 1x64x96 --only fp32"
    )
    assert status == 0
    reasons = {row["provider"]: row.get("not measured") for row in rows}
    assert reasons == {
        "transformers sdpa": None,
        "optimize(cdetr_fast) fp32": None,
        'engine="openvino" fp32': 'RuntimeError: engine: "openvino" needs openvino: '
        "pip install 'cdetr-fast[openvino]'",
        "ONNX Runtime fp32": "needs onnx: pip install 'cdetr-fast[peers]'",
        "OpenVINO fp32": "needs openvino: pip install 'cdetr-fast[peers]'",
    }


@pytest.mark.parametrize("text", ["1x64", "0x64x96", "1x64x96P", "p1x64x96", "1x64x96pp"])
def test_shapes_of_other_forms_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected BxHxW or BxHxWp, got"):
        runtimes.shape_of(text)
