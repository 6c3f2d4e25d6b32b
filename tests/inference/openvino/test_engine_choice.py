"""`engine="auto"`: which engine runs a model, by a record that `cdetr-fast benchmark` writes."""

import copy
import importlib.util
import json
import re

import pytest
import torch
from support.openvino import assert_same, images, needs_bf16, random_model

from cdetr_fast import optimize
from cdetr_fast.inference import engine_records, runner
from cdetr_fast.inference import openvino as module
from cdetr_fast.inference.engine_trial import Shape, try_engines
from cdetr_fast.inference.int8 import int8_unsupported_reason
from cdetr_fast.inference.openvino import OpenVinoCall
from cdetr_fast.inference.runner import Runner

pytest.importorskip("openvino")


@pytest.fixture
def record(model, tmp_path, monkeypatch):
    """Writes a record of this machine in which OpenVINO takes a number of ms, and PyTorch 10."""
    monkeypatch.setenv("CDETR_FAST_CACHE", str(tmp_path / "cache"))
    name = engine_records.architecture(model)

    def write(ms=5.0, precision="fp32", verdict=engine_records.RIGHT):
        findings = [
            engine_records.Finding(name, precision, "1x64x96", engine, right, taken)
            for engine, right, taken in (("torch", "right", 10.0), ("openvino", verdict, ms))
        ]
        engine_records.write(engine_records.machine(), findings)

    return write


def engine_of(model):
    """The engine that runs a model, by what is there and by what the model says."""
    text = model.explain()  # prepares a copied model
    engine = "torch" if model.runner._openvino is None else "openvino"
    assert f"chosen           {engine}: " in text
    return engine


def test_auto_goes_by_the_record(model, record):
    fast = optimize(model, engine="auto")
    assert engine_of(fast) == "torch"
    assert "there is no record of this machine" in fast.explain()
    assert_same(fast(*images()), model(*images()))
    record(5.0)
    fast = optimize(model, engine="auto")
    assert engine_of(fast) == "openvino"
    assert "openvino takes 5 ms, torch 10 ms at 1x64x96" in fast.explain()
    assert_same(fast(*images()), model(*images()))
    assert engine_of(copy.deepcopy(fast)) == "openvino"
    assert type(optimize(model).runner) is Runner  # the default asks no record
    record(20.0)
    assert engine_of(optimize(model, engine="auto")) == "torch"
    record(1.0, verdict="boxes are off")
    fast = optimize(model, engine="auto")
    assert engine_of(fast) == "torch"
    assert "openvino at 1x64x96: boxes are off" in fast.explain()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": torch.float64}, "expected float32 or bfloat16, got torch.float64"),
        ({"dtype": torch.float16}, "expected float32 or bfloat16, got torch.float16"),
        ({"compile": True}, 'expected False, as engine="openvino" compiles itself'),
    ],
)
def test_auto_is_pytorch_where_openvino_cannot(model, record, options, reason):
    record(5.0)
    fast = optimize(model, engine="auto", **options)
    assert engine_of(fast) == "torch"
    assert reason in fast.explain()
    with pytest.raises((RuntimeError, ValueError), match=re.escape(reason)):
        optimize(model, engine="openvino", **options)


def test_auto_is_pytorch_for_segmentation(record):
    model = random_model("segmentation")
    fast = optimize(model, engine="auto")
    assert engine_of(fast) == "torch"
    assert "runs no segmentation" in fast.explain()
    assert_same(fast(*images()), model(*images()))


@needs_bf16
def test_auto_goes_by_the_precision(model, record):
    record(5.0)
    assert engine_of(optimize(model, engine="auto", dtype="bfloat16")) == "torch"
    record(5.0, "bf16")
    assert engine_of(optimize(model, engine="auto", dtype="bfloat16")) == "openvino"


@needs_bf16
@pytest.mark.skipif(int8_unsupported_reason() is not None, reason=str(int8_unsupported_reason()))
@pytest.mark.parametrize(("dtype", "name"), [("float32", "int8"), ("bfloat16", "int8-bf16")])
def test_precisions_of_int8(model, record, dtype, name):
    pytest.importorskip("nncf")
    calibration = [images(1)[0]]
    for recorded in ("fp32", "bf16", "int8", "int8-bf16"):
        record(5.0, recorded)
        fast = optimize(model, engine="auto", dtype=dtype, int8_calibration=calibration)
        assert engine_of(fast) == ("openvino" if recorded == name else "torch")
        record(20.0, recorded)


@pytest.mark.skipif(int8_unsupported_reason() is not None, reason=str(int8_unsupported_reason()))
def test_auto_in_int8_is_that_of_pytorch_without_nncf(model, record, monkeypatch):
    record(5.0, "int8")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "nncf" else found(name)
    )
    fast = optimize(model, engine="auto", int8_calibration=[images(1)[0]])
    assert engine_of(fast) == "torch"
    assert "needs nncf" in fast.explain()
    with pytest.raises(ValueError, match="int8_calibration: expected a model in float32 or"):
        optimize(model, engine="auto", dtype="float16", int8_calibration=[images(1)[0]])


def test_auto_is_pytorch_where_openvino_is_off(fast, record, monkeypatch, caplog):
    record(5.0)
    changed = random_model()
    changed.class_labels_classifier.bias.add_(1)
    compiled = fast.runner._openvino._compiled
    monkeypatch.setattr(module, "convert", lambda *arguments: None)
    monkeypatch.setattr(module, "compiled", lambda *arguments: compiled)
    chosen = optimize(changed, engine="auto")
    assert engine_of(chosen) == "torch"
    assert "is off by" in chosen.explain()
    assert "torch runs the model instead: engine: " in caplog.text
    assert_same(chosen(*images()), changed(*images()))


def test_auto_is_pytorch_where_weights_change_and_openvino_fails(record, monkeypatch):
    record(5.0)
    model = random_model()
    chosen = optimize(model, engine="auto")
    assert engine_of(chosen) == "openvino"

    def fail(*arguments):
        raise RuntimeError("no conversion")

    monkeypatch.setattr(module, "convert", fail)
    model.class_labels_classifier.bias.add_(1)
    assert_same(chosen(*images()), model(*images()))
    assert engine_of(chosen) == "torch"
    model.class_labels_classifier.bias.add_(1)
    assert_same(chosen(*images()), model(*images()))


def test_a_trial_compares_before_it_times(model, monkeypatch):
    shape = Shape.parse("2x64x96p")
    pixel_values = images()[0]
    found = {x.engine: x for x in try_engines(model, shape, pixel_values, ["fp32"], repeats=2)}
    assert [x.verdict for x in found.values()] == ["right", "right"]
    assert all(x.ms >= x.min_ms > 0 and x.logits_error < 1e-5 for x in found.values())
    assert {x.shape for x in found.values()} == {"2x64x96p"}
    other = random_model()
    other.class_labels_classifier.bias.add_(1)
    wrong = OpenVinoCall(other)
    monkeypatch.setattr(runner, "OpenVinoCall", lambda *arguments: wrong)
    found = {x.engine: x for x in try_engines(model, shape, pixel_values, ["fp32"], repeats=2)}
    assert found["openvino"].ms is None
    assert re.match("logits are off by .* expected at most 1.0e-04", found["openvino"].verdict)
    assert found["torch"].ms > 0
    (choice,) = engine_records.choices(found.values()).values()
    assert choice.engine == "torch"


def test_the_benchmark_decides_what_auto_is(run, checkpoint, tmp_path, monkeypatch, command_line):
    monkeypatch.setenv("CDETR_FAST_CACHE", str(tmp_path / "cache"))
    options = ("--shapes", "2x64x96p", "--precisions", "fp32", "--model", checkpoint)
    done = command_line("benchmark", *options, "--repeats", 2)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert [line.split()[:3] for line in lines[-4:-2]] == [
        ["2x64x96p", "fp32", engine] for engine in ("torch", "openvino")
    ]
    (file,) = (tmp_path / "cache/engines").glob("*.json")
    assert lines[-1] == f"record: {file}"
    chosen = re.match(r'engine="auto" in fp32 is (\w+): openvino takes', lines[-2])[1]
    facts = json.loads(command_line("info", "--json").out)["engines"]
    assert facts["source"] == str(file)
    assert len(facts["findings"]) == 2
    assert [x["engine"] for x in facts["chosen"]] == [chosen]
    record = json.loads(file.read_text())
    for finding in record["findings"]:
        finding["ms"] = {"torch": 10.0, "openvino": 5.0}[finding["engine"]]
    file.write_text(json.dumps(record))
    assert 'engine="auto"): openvino for fp32 of test_resnet' in " ".join(
        command_line("info").out.split()
    )
    used = []
    build = runner.OpenVinoCall
    monkeypatch.setattr(runner, "OpenVinoCall", lambda *x: used.append(x) or build(*x))
    found = ("detect", tmp_path / "a.png", "--threshold", 0, "--model", checkpoint, "--output")
    assert run(*found, tmp_path / "plain").code == 0
    assert not used
    assert run(*found, tmp_path / "auto", "--engine", "auto").code == 0
    assert used
    scores = [
        [result["score"] for result in json.loads((folder / "detections.json").read_text())]
        for folder in (tmp_path / "plain", tmp_path / "auto")
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--shapes", "64x96"), 2, "expected BxHxW or BxHxWp, got '64x96'"),
        (("--precisions", "fp8"), 2, "expected some of fp32, bf16, int8, int8-bf16, got fp8"),
        (("--images", "nowhere"), 1, "--images nowhere: expected a folder with images"),
    ],
)
def test_options_of_the_benchmark_are_checked(command_line, checkpoint, options, code, message):
    done = command_line("benchmark", "--model", checkpoint, *options)
    assert done.code == code
    assert message in " ".join(done.err.replace("│", "").split())
