"""`cdetr-fast info`: the summary, each reason once, and the JSON that programs read."""

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdetr_fast import cli
from cdetr_fast.cli import machine
from cdetr_fast.cli.info import lines
from cdetr_kernels import registry

KEYS = {
    "schema", "version", "python", "platform", "packages", "device", "cpu", "cuda", "gpus",
    "native", "records", "engines", "assignment", "operators", "missing",
}  # fmt: skip


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """The facts of this machine, as they come back from JSON."""
    return json.loads(json.dumps(machine.facts()))


def row(operator: str, path: str, *reasons: str, **measured: str) -> dict[str, Any]:
    return {
        "operator": operator, "path": path, "reasons": list(reasons),
        "calls": None, "figure": None, "date": None, **measured,
    }  # fmt: skip


def on_a_gpu(found: dict[str, Any], **changes: Any) -> dict[str, Any]:
    gpu = {"name": "NVIDIA H100", "memory_bytes": 80 << 30, "compute_capability": "9.0"}
    return found | {"device": "cuda", "gpus": [gpu], "missing": []} | changes


def section(text: list[str], title: str) -> list[str]:
    start = text.index(title) + 1
    end = text.index("", start)
    return text[start:end]


def test_json_has_the_documented_keys(found, root):
    assert set(found) == KEYS
    assert found["schema"] == machine.SCHEMA
    page = (root / "docs" / "guides" / "commands.md").read_text(encoding="utf-8")
    assert all(f"`{key}`" in page for key in KEYS)
    assert {one["operator"] for one in found["operators"]} == set(registry.NAMES)
    assert set(found["operators"][0]) == {
        "operator", "path", "reasons", "calls", "figure", "date"
    }  # fmt: skip
    assert all(set(one) == {"what", "why", "command"} for one in found["missing"])


def test_the_command_prints_what_the_functions_return(capsys, found):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["info", "--json"])
    done = capsys.readouterr()
    assert (json.loads(done.out), done.err) == (found, "")
    with pytest.raises(SystemExit, match="0"):
        cli.main(["info"])
    done = capsys.readouterr()
    assert done.err == ""
    assert done.out.splitlines()[0] == next(iter(lines(found)))
    assert "\x1b" not in done.out


def test_the_summary_comes_first_and_each_reason_once(found):
    text = list(lines(found))
    assert text[0].startswith(f"cdetr_fast {found['version']} on the CPU")
    assert [line for line in text if line and line[0] != " "][1:] == [
        "Fast here", "Missing", "Operators on cpu", "Versions and places"
    ]  # fmt: skip
    joined = " ".join(" ".join(text).split())
    for reason in {reason for one in found["operators"] for reason in one["reasons"]}:
        assert joined.count(reason) == 1
    for one in found["operators"]:
        assert re.search(rf"^  {one['operator']} +{one['path']} +\[\d", "\n".join(text), re.M)
    for name in found["packages"]:
        assert f" {name} " in joined


@given(st.integers(40, 200))
def test_lines_fit(found, columns):
    for line in lines(found, columns):
        longest = max(map(len, line.split()), default=0)
        assert len(line) <= max(columns, 56, 18 + longest), line


def test_a_gpu_without_a_record_is_told_what_to_do(found, monkeypatch):
    lack = {"what": "triton kernels", "why": "not tried", "command": "cdetr-fast qualify"}
    text = list(lines(on_a_gpu(found, missing=[lack])))
    assert text[0] == f"cdetr_fast {found['version']} on NVIDIA H100"
    assert section(text, "Missing") == ["  triton kernels: not tried", "    cdetr-fast qualify"]
    assert section(list(lines(on_a_gpu(found))), "Missing") == ["  nothing"]


def test_an_operator_that_was_measured_is_one_line(found):
    measured = [
        row("set_loss", "triton", "right", calls="a", figure="1.0 ms, 1.50 times as fast"),
        row("set_loss", "triton", "right", calls="b", figure="1.0 ms, 2.50 times as fast"),
        row("set_loss", "torch", "not triton: crashed", calls="c"),
        row("sine_query", "torch", "not triton: crashed", calls="a"),
    ]
    text = list(lines(on_a_gpu(found, operators=measured)))
    assert section(text, "Fast here") == [
        "  triton kernels: set_loss", "  PyTorch's own code: 1 of 2 operators"
    ]  # fmt: skip
    assert section(text, "Operators on cuda") == [
        "  set_loss    triton in 2 of 3 kinds of calls, 1.50 to 2.50 times as fast  [1, 2]",
        "  sine_query  torch   [2]",
    ]


@pytest.mark.parametrize(
    ("absent", "command"),
    [("C++", "cdetr-fast build-native"), ("webdataset", "pip install 'cdetr-fast[train]'")],
)
def test_what_is_missing_comes_with_its_command(monkeypatch, absent, command):
    from cdetr_kernels import native

    if absent == "C++":
        monkeypatch.setitem(native.UNAVAILABLE, "cpu", "the C++ part is not built")
    else:
        version = machine.installed_version
        monkeypatch.setattr(
            machine, "installed_version", lambda x: None if x == absent else version(x)
        )
        monkeypatch.setattr(
            machine.metadata, "requires", lambda _: [f'{absent}>=1; extra == "train"', "torch"]
        )
    (lack,) = [x for x in machine.facts()["missing"] if absent in x["what"] + x["why"]]
    assert lack["command"] == command


def test_a_variable_that_takes_cores_away(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 64)
    (lack,) = [x for x in machine.facts()["missing"] if x["what"] == "threads"]
    assert lack["command"] == "unset OMP_NUM_THREADS"
    assert "of 64 cores" in lack["why"]


def test_bare_checkouts_have_no_extras(monkeypatch):
    def not_there(name: str) -> Any:
        raise machine.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(machine.metadata, "requires", not_there)
    assert machine._extras() == {}
