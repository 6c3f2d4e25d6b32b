"""The benchmarks run, at sizes that take no time, and the README shows what they gave last."""

import dataclasses
import json
import sys

import pytest
import torch

from benchmarks import numerics, ops, overhead, results
from benchmarks.report.pages import write_tables


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    return tmp_path


def test_the_overhead_of_every_operator_is_measured(folder, monkeypatch, capsys):
    from cdetr_kernels import registry

    monkeypatch.setattr(sys, "argv", ["overhead", "--repeats", "3", "--output", "trial"])
    overhead.main()  # the status is that of a quiet machine
    content = json.loads((folder / "trial.json").read_text())
    assert content["environment"]["command"].startswith("python -m benchmarks overhead --repeats 3")
    rows = [row for row in content["rows"] if row["provider"] == overhead.OVERHEAD]
    assert [row["work"] for row in rows] == list(registry.NAMES)
    # A microsecond at least, and far less than computing would take.
    assert all(1e-4 < row["ms"] < 0.1 for row in rows)


def test_an_overhead_above_the_limit_is_a_failure(monkeypatch, capsys):
    monkeypatch.setattr(overhead, "LIMIT_MS", 1e-6)
    assert overhead.main(["--repeats", "1"]) == 1
    assert "more than 0.001 us: conditional_attention" in capsys.readouterr().err


def test_microbenchmarks_go_on_where_they_were_cut_off(tmp_path, folder, capsys):
    lines = tmp_path / "lines.jsonl"
    common = ["--tiny", "--repeats", "1", "--threads", "1", "--providers", "^(?!.*compiled)"]
    arguments = [*common, "--into", str(lines), "--output", "trial", "--only", "sine_query"]
    assert ops.main(arguments) == 0
    content = json.loads((folder / "trial.json").read_text())
    assert {row["provider"] for row in content["rows"]} == {"cdetr_fast torch", "transformers"}
    for row in content["rows"]:
        assert row["ms"] > 0
        assert 0 < row["of the roofline"] < 10
        assert row["error"] < 1e-4
    whole = lines.read_text()
    lines.write_text(whole[:-30])
    capsys.readouterr()
    assert ops.main(arguments) == 0
    assert capsys.readouterr().out.count("cdetr_fast torch") == 1
    assert [json.loads(line)["cell"] for line in lines.read_text().splitlines()] == [
        json.loads(line)["cell"] for line in whole.splitlines()
    ]
    assert ops.main(["--tiny", "--only", "no such operator"]) == 2


def test_every_operator_is_measured():
    """At tiny sizes; every provider but those that are compiled passes the check of accuracy."""
    measured = set()
    for cell in ops.cells(["fp32"], tiny=True):
        rows = ops.run_cell(cell, torch.device("cpu"), 1, 1.0, "^(?!.*compiled)")
        assert len(rows) > 1
        for row in rows:
            assert row.get("ms") or "has no gradient" in row["not measured"], row
        measured.add(cell[0])
    assert measured == set(ops.works())


def test_no_speed_over_a_failed_check():
    make, sizes = ops.works()["sine_query"]
    case = make(torch.float32, torch.device("cpu"), **sizes.small)

    def wrong(**inputs):
        return case.function("torch")(**inputs) * 1.001

    case = dataclasses.replace(case, peers={"wrong": lambda: wrong})
    (row,) = ops.measured("sine_query", case, "forward and backward", 1, 1.0, only="wrong")
    assert row["not measured"] == "fails the check of accuracy"
    assert "ms" not in row


def test_numerics_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x -->\nold\n<!-- /x -->\nb\n")
    write_tables(page, {"x": numerics.table([{"name": "n", "error": 1.23e-5}])})
    assert page.read_text() == (
        "a\n<!-- x -->\n| name | error |\n|---|---|\n| n | 1.2e-05 |\n<!-- /x -->\nb\n"
    )
