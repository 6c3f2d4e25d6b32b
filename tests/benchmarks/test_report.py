"""Tables and pictures of results; README.md and docs show the committed ones."""

import json
import subprocess
import sys

import pytest

from benchmarks.report import pages, tables


def test_the_readme_shows_the_results(root):
    command = [sys.executable, "-m", "benchmarks.report", "--check"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def microbenchmark(provider, ms):
    return {"op": "conditional_attention", "shape": "cross B=8 Q=300 S=1050", "dtype": "bfloat16",
            "mode": "forward", "provider": provider, "ms": ms, "of the roofline": 0.5}  # fmt: skip


def test_figures_from_a_gpu_appear_once_there_are_results(tmp_path):
    assert tables.gpu_figures(tmp_path) == []
    rows = [microbenchmark("cdetr_fast triton", 2.0), microbenchmark("sdpa math", 9.0),
            microbenchmark("sdpa cudnn", 3.0)]  # fmt: skip
    model = [{"provider": "transformers sdpa", "ms": 10.0}, {"provider": "cdetr_fast", "ms": 4.0}]
    content = {
        "environment": {"date": "2030-01-01", "device": "Some GPU", "torch": "2.11"},
        "rows": {"microbenchmarks": rows, "model": model},
    }
    (tmp_path / "some-gpu-torch2.11-2030-01-01.json").write_text(json.dumps(content))
    (tmp_path / "rehearsal-torch2.11-2030-01-02.json").write_text("not read")
    lines = tables.gpu_figures(tmp_path)
    measured = [line for line in lines if line.startswith("| ") and "not measured" not in line]
    assert measured[1:] == [
        "| conditional_attention, B=8, S=1050, bf16, forward | 3 ms (sdpa cudnn) | 2 ms | 1.50 |",
        "| model | 10 ms (transformers sdpa) | 4 ms | 2.50 |",
    ]
    assert "Some GPU" in lines[-1]


def test_plots(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from benchmarks.report import plots

    rows = [microbenchmark("cdetr_fast triton", 2.0), microbenchmark("sdpa math", 9.0)]
    content = {"environment": {"device": "Some GPU", "torch": "2.11", "date": "2030-01-01"}}
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content | {"rows": rows}))
    assert plots.main([str(path), "--folder", str(tmp_path)]) == 0
    picture = tmp_path / "conditional_attention-bfloat16-forward.png"
    assert capsys.readouterr().out.strip() == str(picture)
    assert picture.stat().st_size > 10_000
    path.write_text(json.dumps(content | {"rows": []}))
    assert plots.main([str(path), "--folder", str(tmp_path)]) == 1


def test_plots_of_models(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from benchmarks.report import plots

    names = ["transformers sdpa", "cdetr_fast", "+ norms folded", "optimize(cdetr_fast)"]
    rows = [
        {
            "benchmark": "model",
            "provider": name,
            "ms": ms,
            "min_ms": ms,
            "p95_ms": ms,
            "speed-up": 9 / ms,
        }
        for name, ms in zip(names, (9.0, 6.0, 7.0, 4.0), strict=True)
    ]  # fmt: skip
    environment = {"processor": "x", "threads": 2, "torch": "2.11", "date": "2030-01-01"}
    path = tmp_path / "run.json"
    for count in (1, 2):  # without steps there is no waterfall
        shown = rows if count == 2 else [row for row in rows if row["provider"][0] != "+"]
        path.write_text(json.dumps({"environment": environment, "rows": shown}))
        assert plots.main([str(path), "--folder", str(tmp_path)]) == 0
        assert len(capsys.readouterr().out.split()) == count
    assert (tmp_path / "run_waterfall.png").stat().st_size > 10_000


def test_a_table_takes_its_place():
    marks = "<!-- {} -->", "<!-- /{} -->"
    table = pages.markdown(["x", "ms"], [["a", 1]])
    assert table == "| x | ms |\n|---|---|\n| a | 1 |"
    text = "a\n<!-- x -->\nold\n<!-- /x -->\nb\n"
    assert pages.filled(text, {"x": "new"}, marks) == text.replace("old", "new")
