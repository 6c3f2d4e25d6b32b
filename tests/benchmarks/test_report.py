"""Tables and pictures of results; README.md and docs show the committed ones."""

import json
import subprocess
import sys

import pytest

from benchmarks.report import growth, pages, tables


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


def grown(provider, value, ms, mib, **more):
    return {"benchmark": "growth", "axis": "batch", "work": "forward", "provider": provider,
            "value": value, "ms": ms, "peak MiB": mib, "shape": "x", **more}  # fmt: skip


def test_a_law_is_fitted_to_the_values_that_it_holds_for():
    values = [1, 2, 4, 8, 16]
    law = growth.fitted(values, [3 * value**1.5 for value in values])
    assert law.exponent == pytest.approx(1.5)
    assert (law.low, law.high) == (1, 16)
    assert law.distance == pytest.approx(0, abs=1e-9)
    # 100 ms that do not grow hide the law at the small values.
    values = [1, 10, 100, 1000, 10_000, 100_000]
    law = growth.fitted(values, [100 + value**1.0 for value in values])
    assert law.low == 1000
    assert law.exponent == pytest.approx(1, abs=0.05)
    assert law.distance <= growth.CLOSE
    # Nothing is close: the law is that of the last three.
    assert growth.fitted([1, 2, 4, 8], [1, 9, 1, 9]).low == 2
    assert growth.fitted([1, 2], [1, 2]) is None


def test_growth_is_a_table():
    rows = [grown("cdetr_fast", x, 90.0 * x, 8.0 * x * x) for x in (1, 2, 4, 8)]
    rows += [grown("transformers", x, 5e3 * x, 9.0) for x in (1, 2)]
    skipped = {"axis": "batch", "work": "forward", "provider": "transformers", "value": 4,
               "not measured": "needs 30 GiB"}  # fmt: skip
    header, _, ours, theirs = growth.table([*rows, skipped]).splitlines()
    assert header.startswith("| work | model | batch | ms |")
    assert ours == (
        "| forward | cdetr_fast | 1 to 8 | 90.0 to 720 | 1.00 (1 to 8) | 8 to 512 | 2.00 (1 to 8) |"
    )
    assert theirs == (
        "| forward | transformers | 1 to 2; then needs 30 GiB | 5,000 to 10,000 | - | 9 to 9 | - |"
    )
    assert "| needs 30 GiB |" in growth.table([skipped])


def test_workers_are_a_table():
    memory = {"RSS MiB": 900.0, "PSS MiB": 600.0, "anonymous PSS MiB": 400.0, "own MiB": 300.0}
    rows = [
        grown("cdetr_fast", 2, 10.0, 0.0, **memory)
        | {"axis": "workers", "images/s": 2.5, "shape": "resnet50, files, workers: 2"},
        {"axis": "workers", "provider": "OpenVINO", "value": 2, "not measured": "no", "shape": ""},
    ]
    title, _, _, _, ours, theirs = growth.table(rows).splitlines()
    assert title == "resnet50, files"
    assert ours == "| cdetr_fast | 2 | 2.50 | 900 MiB | 600 MiB | 400 MiB | 300 MiB |"
    assert theirs == "| OpenVINO | 2 | no |  |  |  |  |"


def test_growth_is_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from benchmarks.report import plots

    rows = [grown("cdetr_fast", x, 2.0 * x, 8.0 * x) for x in (1, 2, 4, 8)]
    rows += [grown("transformers", x, 5.0 * x, 0.0) for x in (1, 2)]
    rows += [{"axis": "batch", "work": "forward", "provider": "OpenVINO", "not measured": "no"}]
    rows += [row | {"axis": "workers", "images/s": 1.0} for row in rows[:2]]
    environment = {"processor": "x", "threads": 2, "torch": "2.11", "date": "2030-01-01"}
    path = tmp_path / "grown.json"
    path.write_text(json.dumps({"environment": environment, "rows": rows}))
    assert plots.main([str(path), "--folder", str(tmp_path)]) == 0
    pictures = [tmp_path / f"grown_{axis}.png" for axis in ("batch", "workers")]
    assert capsys.readouterr().out.split() == [str(picture) for picture in pictures]
    assert all(picture.stat().st_size > 10_000 for picture in pictures)
