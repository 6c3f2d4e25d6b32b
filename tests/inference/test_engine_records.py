"""Records of engines: files, and what "auto" makes of them."""

import dataclasses
import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.oracle import SMALL_MODEL, make_ours, make_theirs

from cdetr_fast.inference import engine_records as records
from cdetr_fast.inference.engine_records import RIGHT, Choice, Finding
from cdetr_fast.integrations.transformers import convert


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of the user."""
    monkeypatch.setenv("CDETR_FAST_CACHE", str(tmp_path))
    return tmp_path


def finding(engine="torch", ms=10.0, shape="1x64x96", **changes):
    fields = {"model": "small", "precision": "fp32", "verdict": RIGHT, "date": "2026-11-27"}
    return Finding(**fields | {"engine": engine, "ms": ms, "shape": shape} | changes)


def test_findings_come_back(cache):
    machine = records.machine()
    findings = (finding(), finding("openvino", 5.0, logits_error=1e-6, boxes_error=2e-6))
    path = records.write(machine, findings)
    assert path.parent == cache / "engines"
    assert records.read(machine) == (findings, str(path))


def test_work_that_is_measured_again_replaces_its_findings():
    machine = records.machine()
    records.write(machine, [finding(), finding("openvino", 5.0)])
    records.write(machine, [finding(shape="2x64x96")])
    records.write(machine, [finding(ms=4.0)])
    found, _ = records.read(machine)
    assert found == (finding(shape="2x64x96"), finding(ms=4.0))


def test_many_may_write_at_once():
    machine = records.machine()
    shapes = [f"{i}x64x96" for i in range(1, 25)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda shape: records.write(machine, [finding(shape=shape)]), shapes))
    found, _ = records.read(machine)
    assert {x.shape for x in found} == set(shapes)
    assert [path.suffix for path in sorted(machine.file.parent.iterdir())] == [".json", ".lock"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"threads": 3}, r"is about threads \d+ instead of 3; run cdetr-fast benchmark again"),
        ({"openvino": "1.0"}, r"is about openvino \S+ instead of 1\.0"),
        ({"kernels": "none"}, r"is about kernels with\w* the C\+\+ extension, .* instead of none"),
        ({"sources": "0"}, r"is about sources [0-9a-f]{16} instead of 0"),
    ],
)
def test_a_record_of_something_else_is_ignored(change, reason):
    machine = records.machine()
    path = records.write(machine, [finding()])
    found, why = records.read(dataclasses.replace(machine, **change))
    assert why.startswith(str(path))
    assert found == ()
    assert re.search(reason, why)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda text: text[:100], "cannot be read"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "has format 2, expected 1"),
        (lambda text: text.replace('"torch",\n   "verdict"', '"tpu",\n   "verdict"'), "engine: "),
        (lambda text: text.replace('"ms": 10.0', '"ms": "fast"'), "findings[0].ms: expected"),
        (lambda text: "[]", "expected"),
    ],
)
def test_a_record_that_cannot_be_read_is_ignored(spoil, reason):
    machine = records.machine()
    path = records.write(machine, [finding()])
    spoilt = spoil(path.read_text())
    assert spoilt != path.read_text()
    path.write_text(spoilt)
    found, why = records.read(machine)
    assert found == ()
    assert why.startswith(str(path))
    assert reason in why
    records.write(machine, [finding()])  # takes its place
    assert records.read(machine) == ((finding(),), str(path))


def test_a_record_of_other_bytes_is_ignored():
    machine = records.machine()
    records.write(machine, [finding()]).write_bytes(b"\xff\xfe")
    assert records.choose("small", "fp32").engine == "torch"


def test_a_user_without_a_home_has_no_record(monkeypatch):
    monkeypatch.setenv("CDETR_FAST_CACHE", "~nobody-of-this-name/cache")
    findings, source = records.read(records.machine())
    assert findings == ()
    assert "there is no home folder" in source


def test_nothing_is_chosen_without_a_record():
    engine, reason = records.choose("small", "fp32")
    assert engine == "torch"
    assert reason == "there is no record of this machine; run cdetr-fast benchmark"
    records.write(records.machine(), [finding(), finding("openvino", 5.0)])
    assert records.choose("small", "fp32").engine == "openvino"
    assert records.choose("small", "bf16") == Choice(
        "torch", "nothing is recorded of small in bf16; run cdetr-fast benchmark"
    )
    assert records.choose("large", "fp32").engine == "torch"


OFF = "boxes are off by 1.0e-01"


@pytest.mark.parametrize(
    ("findings", "engine", "reason"),
    [
        ([finding(), finding("openvino", 5.0)], "openvino",
         "openvino takes 5 ms, torch 10 ms at 1x64x96 (2026-11-27)"),
        ([finding(), finding("openvino", 10.0)], "torch", "openvino takes 10 ms, torch 10 ms"),
        ([finding(), finding("openvino", 12.5)], "torch", "openvino takes 12.5 ms, torch 10 ms"),
        # Slower at one shape, but faster over all of them, and the reverse.
        ([finding(), finding("openvino", 12.0), finding(shape="2x64x96"),
          finding("openvino", 5.0, "2x64x96")], "openvino", "; openvino takes 5 ms"),
        ([finding(), finding("openvino", 9.0), finding(shape="2x64x96"),
          finding("openvino", 12.0, "2x64x96")], "torch", "; openvino takes 12 ms"),
        # Nothing faster over a failed check, at whatever shape.
        ([finding(), finding("openvino", 5.0, verdict=OFF)], "torch",
         f"openvino at 1x64x96: {OFF} (2026-11-27)"),
        ([finding(), finding("openvino", 1.0), finding(shape="2x64x96"),
          finding("openvino", None, "2x64x96", verdict=OFF)], "torch", "openvino at 2x64x96"),
        ([finding(ms=None, verdict="no VNNI"), finding("openvino", 5.0)], "torch",
         "has not two times"),
        ([finding("openvino", 5.0)], "torch", "has not two times"),
        ([finding("openvino", float("nan")), finding()], "torch", "nan"),
        ([finding()], "torch", "no other engine was measured"),
    ],
)  # fmt: skip
def test_the_faster_engine_is_chosen_if_it_is_right(findings, engine, reason):
    (choice,) = records.choices(findings).values()
    assert choice.engine == engine
    assert reason in choice.reason


def named(**changes):
    return records.architecture(make_ours("detection", **SMALL_MODEL | changes))


def test_architecture_is_what_decides_the_time():
    name = named()
    assert name.startswith("test_resnet, 1 + 2 layers, 5 queries (")
    assert named() == named(num_labels=20) == name  # other weights and classes
    changes = ({"num_queries": 8}, {"decoder_layers": 1}, {"encoder_attention_heads": 4},
               {"backbone": "resnet18"})  # fmt: skip
    assert len({named(**change) for change in changes} | {name}) == 5


def test_a_model_of_transformers_has_the_architecture_of_ours():
    theirs = make_theirs("detection", **SMALL_MODEL).eval()
    ours = make_ours("detection", **SMALL_MODEL)
    assert records.architecture(convert(theirs)) == records.architecture(ours)


def test_the_file_says_what_it_holds_for():
    path = records.write(records.machine(), [finding()])
    content = json.loads(path.read_text())
    assert content["machine"]["threads"] == torch.get_num_threads()
    assert content["machine"]["torch"] == torch.__version__
    assert content["machine"]["processor"]
