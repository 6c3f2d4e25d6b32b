"""The benchmarks run, at sizes that take no time, and the README shows what they gave last."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from benchmarks import (
    decoder,
    folder,
    mask_head,
    measure,
    model,
    numerics,
    ops,
    overhead,
    patching,
    post_processing,
    precision,
    preprocessing,
    stages,
    tables,
    topk,
    training,
)


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        (
            model,
            "--backbone resnet18 --size 64 96 --padded --batch 2 --threads 1 --repeats 1 --steps",
        ),
        (training, "--size 64 96 --batch 2 --layers 2 --targets 3 --threads 1 --repeats 1"),
        (decoder, "--map 3 4 --batch 2 --padded --threads 1 --repeats 1 --backward"),
        (mask_head, "--size 128 160 --queries 10 --threads 1 --repeats 1"),
        (
            patching,
            "--backbone resnet18 --size 64 96 --training-size 64 96 --threads 1 --repeats 1",
        ),
        (folder, "--images 2 --edges 64 96 --backbone resnet18 --threads 1 --repeats 1"),
        (preprocessing, "--batch 1 2 --threads 1 --repeats 1 --steps"),
        (
            post_processing,
            "--size 60 80 --input 80 100 --queries 20 --classes 9 --kept 4 --threads 1 --repeats 1",
        ),
        (stages, "--backbone resnet18 --size 64 96 --threads 1 --repeats 1"),
        (precision, "--count 3 --threads 1 --precisions bf16"),
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


def test_the_readme_shows_the_results(root):
    command = [sys.executable, "-m", tables.__name__, "--check"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


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


def microbenchmark(provider, ms):
    return {"op": "conditional_attention", "shape": "cross B=8 Q=300 S=1050", "dtype": "bfloat16",
            "mode": "forward", "provider": provider, "ms": ms, "of the roofline": 0.5}  # fmt: skip


def test_figures_from_a_gpu_appear_once_there_are_results(tmp_path):
    assert tables.gpu_figures(tmp_path) == []
    rows = [microbenchmark("cdetr_fast triton", 2.0), microbenchmark("sdpa math", 9.0),
            microbenchmark("sdpa cudnn", 3.0)]  # fmt: skip
    model = [{"model": "transformers sdpa", "ms": 10.0}, {"model": "cdetr_fast", "ms": 4.0}]
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
    from benchmarks import plots

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
    from benchmarks import plots

    names = ["transformers sdpa", "cdetr_fast", "+ norms folded", "optimize(cdetr_fast)"]
    rows = [
        {"model": name, "ms": ms, "min_ms": ms, "p95_ms": ms, "speed-up": 9 / ms}
        for name, ms in zip(names, (9.0, 6.0, 7.0, 4.0), strict=True)
    ]
    environment = {"processor": "x", "threads": 2, "torch": "2.11", "date": "2030-01-01"}
    path = tmp_path / "run.json"
    for count in (1, 2):  # without steps there is no waterfall
        shown = rows if count == 2 else [row for row in rows if row["model"][0] != "+"]
        path.write_text(json.dumps({"environment": environment, "rows": shown}))
        assert plots.main([str(path), "--folder", str(tmp_path)]) == 0
        assert len(capsys.readouterr().out.split()) == count
    assert (tmp_path / "run_waterfall.png").stat().st_size > 10_000


def test_numerics_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x -->\nold\n<!-- /x -->\nb\n")
    numerics.write(page, {"x": numerics.markdown([{"name": "n", "error": 1.23e-5}])})
    assert page.read_text() == (
        "a\n<!-- x -->\n| name | error |\n|---|---|\n| n | 1.2e-05 |\n<!-- /x -->\nb\n"
    )


def test_loading_compares(results):
    pytest.importorskip("accelerate")
    from benchmarks import loading

    arguments = ["--images", "4", "--workers", "0", "--repeats", "1", "--output", "trial"]
    assert loading.main(arguments) == 0
    rows = json.loads((results / "trial.json").read_text())["rows"]
    assert [row["way"] for row in rows] == [
        *("transformers, 800", "cdetr_fast, 800"),
        "cdetr_fast, augmented",
    ]
    assert all(row["images/s"] == pytest.approx(4e3 / row["ms"]) for row in rows)


def test_convergence_compares_and_draws(tmp_path, results, capsys):
    pytest.importorskip("accelerate")
    from benchmarks import convergence, convergence_plot

    arguments = ["--scenes", "8", "--val-scenes", "3", "--epochs", "1", "--evaluate-every", "1",
                 "--head-epochs", "1", "--repeats", "1", "--folder", str(tmp_path / "runs"),
                 "--output", "trial"]  # fmt: skip
    assert convergence.main(arguments) == 0
    content = json.loads((results / "trial.json").read_text())
    arms = {row["arm"]: row for row in content["rows"]}
    assert len(arms) == 7
    assert arms["paper"]["curve"] == arms["conditional"]["curve"]
    # Without the focal prior the first class loss is far larger.
    assert arms["transformers"]["first class loss"] > 3 * arms["paper"]["first class loss"]
    assert arms["new head, zero bias"]["first class loss"] > 3
    assert convergence.main([*arguments, "--report", "--comparisons", "attention"]) == 0
    assert len(json.loads((results / "trial.json").read_text())["rows"]) == 3
    capsys.readouterr()
    assert convergence_plot.main([str(results / "trial.json")]) == 0
    assert "not within 1 epochs" in capsys.readouterr().out
    assert (results / "trial.png").stat().st_size > 5_000

    wide = [*arguments, "--folder", str(tmp_path / "wide"), "--classes", "91", "--queries", "40"]
    assert convergence.main([*wide, "--comparisons", "head"]) == 0
    rows = json.loads((results / "trial.json").read_text())["rows"]
    zero_bias = {row["arm"]: row for row in rows}["new head, zero bias"]
    assert zero_bias["first class loss"] > 5 * arms["new head, zero bias"]["first class loss"]


def test_plain_attention_is_that_of_transformers():
    """In eval mode, where transformers has DETR as its authors do."""
    import transformers

    from benchmarks.plain_detr import PlainDetr, PlainDetrFocal, plain_twin
    from cdetr_fast import ConditionalDetrConfig, ConditionalDetrForObjectDetection

    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 32,
             "decoder_ffn_dim": 32, "num_queries": 6, "num_labels": 5}  # fmt: skip
    config = ConditionalDetrConfig(backbone="test_resnet", auxiliary_loss=True, **sizes)
    ours = ConditionalDetrForObjectDetection(config)
    images = torch.randn(2, 3, 64, 96)
    mask = torch.ones(2, 64, 96, dtype=torch.bool)
    mask[1, :, 64:] = False
    for kind, outputs in ((PlainDetr, 6), (PlainDetrFocal, 5)):
        model = plain_twin(ours, kind, seed=0).eval()
        with torch.no_grad():
            theirs = transformers.DetrForObjectDetection.forward(model, images, mask)
            got = model(images, mask)
        scores = theirs.logits.softmax(-1)[..., :-1] if outputs == 6 else theirs.logits.sigmoid()
        assert theirs.logits.shape == (2, 6, outputs)
        torch.testing.assert_close(got.logits.sigmoid(), scores)
        torch.testing.assert_close(got.pred_boxes, theirs.pred_boxes)
