"""The benchmarks run, at sizes that take no time, and the README shows what they gave last."""

import dataclasses
import json
import sys

import pytest
import torch

from benchmarks import (
    measure,
    numerics,
    ops,
    overhead,
    post_processing,
    topk,
)


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        (
            post_processing,
            "--size 60 80 --input 80 100 --queries 20 --classes 9 --kept 4 --threads 1 --repeats 1",
        ),
        (topk, "--batch 1 3 --head 30x9 --k 20 --threads 1 --repeats 1"),
    ],
)
def test_a_benchmark_measures_and_saves(script, arguments, results, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments.split(), "--output", "trial"])
    assert script.main() == 0
    content = json.loads((results / "trial.json").read_text())
    assert content["environment"]["torch"]
    assert all(row["ms"] > 0 for row in content["rows"])
    assert "written to" in capsys.readouterr().out


def test_the_overhead_of_every_operator_is_measured(results, monkeypatch, capsys):
    from cdetr_kernels import registry

    monkeypatch.setattr(sys, "argv", ["overhead", "--repeats", "3", "--output", "trial"])
    overhead.main()  # the status is that of a quiet machine
    rows = json.loads((results / "trial.json").read_text())["rows"]
    assert [row["operator"] for row in rows] == list(registry.NAMES)
    # A microsecond at least, and far less than computing would take.
    assert all(0.1 < row["overhead us"] < 100 for row in rows)


def test_detections_that_differ_are_not_reported(monkeypatch, capsys):
    plain = topk.plain
    monkeypatch.setattr(topk, "plain", lambda *arguments: [1.01 * x for x in plain(*arguments)])
    arguments = "--batch 1 --head 30x9 --k 20 --threads 1 --repeats 1"
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments.split()])
    assert topk.main() == 1
    assert "30x9, k=20, batch 1" in capsys.readouterr().err


def test_microbenchmarks_go_on_where_they_were_cut_off(tmp_path, results, capsys):
    lines = tmp_path / "lines.jsonl"
    common = ["--tiny", "--repeats", "1", "--threads", "1", "--providers", "^(?!.*compiled)"]
    arguments = [*common, "--into", str(lines), "--output", "trial", "--only", "sine_query"]
    assert ops.main(arguments) == 0
    content = json.loads((results / "trial.json").read_text())
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
        assert all(row.get("ms") for row in rows), rows
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
    numerics.write(page, {"x": numerics.markdown([{"name": "n", "error": 1.23e-5}])})
    assert page.read_text() == (
        "a\n<!-- x -->\n| name | error |\n|---|---|\n| n | 1.2e-05 |\n<!-- /x -->\nb\n"
    )
