"""Every benchmark runs, at sizes that take no time, and reports no speed over a failed check."""

import argparse
import importlib.util
import json
import pickle
import re

import pytest
import torch

from benchmarks import results, run
from benchmarks.registry import BENCHMARKS
from benchmarks.suite import folder as folder_benchmark
from benchmarks.suite import growth, loss, mask_head, post_processing, runtimes, topk

IMAGE = "--backbone test_resnet --size 64 96"
SMALL = {
    "model": f"{IMAGE} --padded --batch 2 --layers 1 --steps",
    "runtimes": "--backbone test_resnet --layers 1 --shapes 2x64x96p --only VINO.fp32",
    "stages": IMAGE,
    "growth": f"--axis size --values 64 96 --layers 1 {IMAGE} --only forward.*(sdpa|cdetr)",
    "decoder": "--map 3 4 --batch 2 --padded --backward",
    "mask_head": "--size 64 96 --queries 3",
    "precision": "--count 3 --precisions bf16",
    "patching": f"{IMAGE} --training-backbone test_resnet --training-size 64 96 --layers 1",
    "preprocessing": "--batch 1 2 --steps",
    "folder": "--images 2 --edges 64 96 --backbone test_resnet --only ^cdetr.*[da]$|model",
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

    def calls(make, values, *arguments):
        make, arguments = pickle.loads(pickle.dumps((make, arguments)))
        prepare = make(*arguments)
        for value in values:
            prepare(value)()
            yield 10.0 * value

    for module in (mask_head, post_processing):
        monkeypatch.setattr(module, "peak_mib_of_process", call)
    monkeypatch.setattr(growth, "peaks_mib_of_process", calls)


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


def find_without(monkeypatch, *missing):
    """Let packages seem not to be installed."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name in missing else found(name, *rest),
    )


def test_a_missing_runtime_is_named(folder, monkeypatch):
    find_without(monkeypatch, "openvino", "onnx")
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


GROWTH = f"{IMAGE} --layers 1 --axis"


def grown(rows):
    """Values, and those of them that have times, by work and provider."""
    found = {}
    for row in rows:
        values = found.setdefault((row["work"], row["provider"]), ([], []))
        values[0].append(row["value"])
        if "ms" in row:
            values[1].append(row["value"])
    return found


@pytest.mark.parametrize(
    ("options", "works"),
    [
        ("batch --values 3 1 --only sdpa", [("forward", "transformers sdpa")]),
        ("queries --values 1 3 --only (mask|outputs).*cdetr",
         [("mask head", "cdetr_fast"), ("outputs to detections", "cdetr_fast")]),
        ("queries --values 1 3 --only optimize", [("forward", "optimize(cdetr_fast)")]),
        ("targets --values 1 3",
         [("matching and loss", "transformers"), ("matching and loss", "cdetr_fast")]),
    ],
)  # fmt: skip
def test_each_axis_grows(options, works, folder, in_this_process):
    rows, status = measured(folder, "growth", f"{GROWTH} {options}")
    assert status == 0
    assert grown(rows) == dict.fromkeys(works, ([1, 3], [1, 3]))
    assert {row["peak MiB"] for row in rows} == {10.0, 30.0}
    assert {row["axis"] for row in rows} == {options.split()[0]}


def test_threads_grow(folder, in_this_process):
    rows, status = measured(folder, "growth", f"{GROWTH} threads --values 1 2 --only optimize")
    assert status == 0
    assert [row["shape"][-10:] for row in rows] == ["threads: 1", "threads: 2"]
    assert torch.get_num_threads() == 1  # as before


def test_what_does_not_fit_is_not_tried(folder, in_this_process):
    """10 and 20 MiB fit into 25; 40 is expected to be more, before it is tried."""
    options = f"{GROWTH} batch --values 1 2 4 8 --only sdpa|optimize --memory {45 / 1024}"
    rows, status = measured(folder, "growth", options)
    assert status == 0
    reasons = {(row["provider"], row["value"]): row.get("not measured", "") for row in rows}
    for provider in ("transformers sdpa", "optimize(cdetr_fast)"):
        assert reasons[provider, 1] == reasons[provider, 2] == ""
        for value in (4, 8):
            assert (
                "needs about 0.0 GiB, more than the 0.0 that may be used"
                in (reasons[provider, value])
            )


def test_models_that_do_not_fit_beside_others_are_not_timed(folder, in_this_process):
    options = f"{GROWTH} batch --values 1 2 --only sdpa|optimize --memory {35 / 1024}"
    rows, _ = measured(folder, "growth", options)
    assert [row["value"] for row in rows if "ms" in row] == [1, 1, 2]
    (left_out,) = [row for row in rows if "ms" not in row]
    assert left_out["not measured"].startswith("with those that take less memory needs about")


def test_openvino_grows_with_open_sizes(folder, monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.setattr(
        growth, "peaks_mib_of_process", lambda make, values, *_: (1.0 for _ in values)
    )
    rows, status = measured(folder, "growth", f"{GROWTH} size --values 64 96")
    assert status == 0
    assert grown(rows)["forward", "OpenVINO"] == ([64, 96], [64, 96])


def test_a_missing_openvino_is_named(folder, in_this_process, monkeypatch):
    find_without(monkeypatch, "openvino")
    rows, status = measured(folder, "growth", f"{GROWTH} size --values 64 --only optimize|VINO")
    assert status == 0
    assert rows[0]["ms"] > 0
    assert rows[1]["not measured"] == "needs openvino: pip install 'cdetr-fast[peers]'"


def test_workers_share_what_was_loaded_before_they_forked(folder):
    rows, status = measured(
        folder, "growth", f"{IMAGE} --axis workers --values 2 --images 1 --only forked"
    )
    assert status == 0
    (row,) = rows
    assert (row["provider"], row["workers"], row["images"]) == (
        "optimize(cdetr_fast), forked",
        2,
        2,
    )
    assert row["images/s"] == pytest.approx(2e3 / row["ms"])
    assert row["RSS MiB"] > row["PSS MiB"] > row["anonymous PSS MiB"] > 10
    assert row["RSS MiB"] > row["own MiB"]
    assert row["accuracy"]["lost"] == 0


FOLDER = "--images 2 --edges 64 96 --backbone test_resnet"


def test_other_runtimes_get_transformers_processor(folder):
    for package in ("openvino", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    rows, status = measured(folder, "folder", f"{FOLDER} --only processor")
    assert status == 0
    assert [row["provider"] for row in rows] == [
        "transformers", "ONNX Runtime, transformers' processor",
        "OpenVINO, transformers' processor",
    ]  # fmt: skip
    assert all(row["images/s"] > 0 and row["accuracy"]["lost"] == 0 for row in rows)


def test_runtimes_that_are_missing_are_named(folder, monkeypatch):
    find_without(monkeypatch, "openvino", "onnxruntime")
    rows, status = measured(folder, "folder", f"{FOLDER} --only processor|engine")
    assert status == 0
    reasons = {row["provider"]: row.get("not measured") for row in rows}
    assert reasons == {
        "transformers": None,
        "ONNX Runtime, transformers' processor":
            "needs onnxruntime: pip install 'cdetr-fast[peers]'",
        "OpenVINO, transformers' processor": "needs openvino: pip install 'cdetr-fast[peers]'",
        'cdetr_fast, engine="openvino"':
            'engine: "openvino" needs openvino: pip install \'cdetr-fast[openvino]\'',
    }  # fmt: skip


def test_boxes_that_differ_are_not_reported(folder, monkeypatch):
    predict = folder_benchmark._predict

    def shifted(model, threshold):
        def detect(paths):
            found = predict(model, threshold)(paths)
            for one in found:
                one.boxes_xyxy.add_(1)
            return found

        return detect

    monkeypatch.setattr(folder_benchmark, "_predict", shifted)
    rows, status = measured(folder, "folder", f"{FOLDER} --only cdetr_fast$")
    assert status == 1
    assert re.search("max box error, px is .*, expected at most 0.5", rows[1]["not measured"])


def test_precisions_that_do_not_run_are_named(folder, monkeypatch):
    find_without(monkeypatch, "openvino")
    command = ["precision", "--count", "2", "--precisions", "openvino fp32", "--threads", "1"]
    assert run.main([*command, "--output", "trial"]) == 0
    rows = json.loads((folder / "trial.json").read_text())["rows"]
    assert [row["provider"] for row in rows] == ["fp32", "openvino fp32"]
    assert "needs openvino" in rows[1]["not measured"]


def test_openvino_has_the_ap_of_the_model(folder):
    pytest.importorskip("openvino")
    command = ["precision", "--count", "3", "--precisions", "openvino fp32", "--threads", "1"]
    assert run.main([*command, "--output", "trial"]) == 0
    rows = json.loads((folder / "trial.json").read_text())["rows"]
    assert rows[1]["AP"] == pytest.approx(rows[0]["AP"], abs=0.1)
    assert rows[1]["accuracy"]["max score error"] < 1e-3


def test_training_in_two_precisions_is_one_run(folder):
    rows, status = measured(folder, "training", f"{SMALL['training']} --precision fp32 bf16")
    assert status == 0
    steps = [row for row in rows if row["work"] == "whole step"]
    assert [row["provider"] for row in steps] == [
        f"{name} {precision}" for precision in ("fp32", "bf16")
        for name in ("transformers sdpa", "cdetr_fast", "cdetr_fast, paper")
    ]  # fmt: skip
    errors = {row["provider"]: row["accuracy"]["loss error"] for row in steps}
    assert errors["cdetr_fast fp32"] < 1e-4 < errors["cdetr_fast bf16"] < 5e-2
