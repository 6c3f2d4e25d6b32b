"""The check of a GPU, as far as it runs without one: stages, time limits, resuming, results."""

import json
import sys

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import FAILED, PARTIAL, PASSED, SKIPPED, Stage
from cdetr_kernels.evidence import Finding, Key, Record

QUICK = ["timeit", "-n", "1", "-r", "1", "pass"]
SLOW = ["timeit", "-n", "1", "-r", "1", "import time; time.sleep(60)"]
WRONG = ["timeit", "-n", "1", "-r", "1", "raise SystemExit(7)"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run given stages instead of the real ones; return the content of the results."""

    def run(time_limit=100.0, **stages):
        monkeypatch.setattr(gpu_check, "stages", lambda lines, rehearse: stages)
        path = tmp_path / "results.json"
        content = gpu_check.check(path, True, "", time_limit)
        assert json.loads(path.read_text())["stages"] == content["stages"]
        return {name: stage["status"] for name, stage in content["stages"].items()}

    return run


def test_a_failed_stage_does_not_stop_the_others_and_is_run_again(run):
    stages = {"a": Stage(QUICK, 20), "b": Stage(WRONG, 20), "c": Stage(QUICK, 20)}
    assert run(**stages) == {"a": PASSED, "b": FAILED, "c": PASSED}
    # What passed is not repeated: now it would fail.
    assert run(a=Stage(WRONG, 20), b=Stage(QUICK, 20)) == {"a": PASSED, "b": PASSED, "c": PASSED}


def test_a_stage_is_stopped_at_its_time_limit(run):
    limited = Stage(SLOW, 1, limited=True)
    assert run(a=Stage(SLOW, 1), b=limited) == {"a": FAILED, "b": PARTIAL}


def test_what_is_missing_is_named(run, capsys):
    assert run(a=Stage(QUICK, 20, needs=("json", "no_such_module"))) == {"a": SKIPPED}
    assert "needs no_such_module" in capsys.readouterr().out


def test_out_of_time_stages_are_left_for_the_next_call(run):
    assert run(time_limit=10, a=Stage(QUICK, 20)) == {"a": PARTIAL}
    assert run(a=Stage(QUICK, 20)) == {"a": PASSED}


def test_files_whose_imports_are_missing_are_left_out(tmp_path, monkeypatch, capsys):
    (tmp_path / "tests" / "some").mkdir(parents=True)
    (tmp_path / "tests" / "conftest.py").write_text("import json\n")
    (tmp_path / "tests" / "some" / "test_a.py").write_text("import json\n")
    (tmp_path / "tests" / "some" / "test_b.py").write_text("from no_such_module import x\n")
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    stage = gpu_check._tests("tests/some", 10)
    assert [word for word in stage.command if word.endswith(".py")] == ["tests/some/test_a.py"]
    assert "test_b.py needs no_such_module" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu(capsys):
    assert gpu_check.main([]) == 2
    assert "no GPU" in capsys.readouterr().err


def test_stages_on_a_gpu(tmp_path, monkeypatch):
    """Their commands have options that their programs know."""
    found = gpu_check.stages(tmp_path / "ops.jsonl", rehearse=False)
    for name, stage in found.items():
        if stage.command[0].startswith("benchmarks."):
            source = (gpu_check.ROOT / (stage.command[0].replace(".", "/") + ".py")).read_text()
            for option in stage.command:
                assert not option.startswith("--") or f'"{option}"' in source, (name, option)


@pytest.mark.parametrize(
    ("verdict", "passes"), [("right", True), ("out of time", True), ("wrong", False)]
)
def test_records_are_taken_over_and_a_wrong_kernel_is_a_failure(
    tmp_path, monkeypatch, verdict, passes
):
    monkeypatch.setattr(gpu_check.evidence, "SHIPPED", tmp_path / "shipped")
    key = Key("A GPU", "9.0", "570", "2.15.0", "3.9.0", "0123456789abcdef")
    record = Record(key, (Finding("op", "triton", "float32", (1,), "forward", verdict),))
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / key.file_name).write_text(record.to_json())
    content = {"rows": {}}
    found = gpu_check.take_over_records(tmp_path, content, rehearse=False)
    assert (found == {}) == passes
    assert passes or "op triton float32" in found["reason"]
    assert len(content["rows"][gpu_check.QUALIFICATION]) == 1
    assert gpu_check.evidence.read(tmp_path / "shipped" / key.file_name, key) == record
    nothing = gpu_check.take_over_records(tmp_path / "empty", content, rehearse=False)
    assert nothing["reason"] == "no findings"


def test_rehearsal(tmp_path, capsys):
    """Three stages of it; test_benchmarks runs what the others do."""
    arguments = ["--rehearse", "--only", "kernel", "--folder", str(tmp_path)]
    assert gpu_check.main(arguments) == 0
    assert "written to" in capsys.readouterr().out.splitlines()[-1]
    (path,) = tmp_path.glob("rehearsal-torch*.json")
    content = json.loads(path.read_text())
    (finding,) = content["rows"][gpu_check.QUALIFICATION]
    assert (finding["operator"], finding["verdict"]) == ("residual_layer_norm", "right")
    assert {name: x["status"] for name, x in content["stages"].items()} == {
        "kernels": PASSED,
        gpu_check.QUALIFICATION: PASSED,
        "every kernel once": PASSED,
    }
    assert content["environment"]["torch"] == torch.__version__
    assert sys.version.startswith(content["environment"]["python"])
