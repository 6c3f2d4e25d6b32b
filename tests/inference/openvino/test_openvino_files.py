"""OpenVINO by the command line: files that `export` writes, and `detect`."""

import importlib.util
import json

import pytest
import torch
from support.openvino import images, random_model

from cdetr_fast import ConditionalDetrForObjectDetection
from cdetr_fast.inference.export import export

pytest.importorskip("openvino")


def run_file(path, *arguments):
    import openvino

    run = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    results = run([tensor.float().numpy() for tensor in arguments])
    return {port.any_name: torch.from_numpy(results[port]) for port in run.outputs}


def test_a_file_of_any_size(model, tmp_path):
    path = tmp_path / "model.xml"
    assert export(model, path, "openvino", size=(64, 96), masked=True) <= 1e-4
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.bin", "model.xml"]
    arguments = images(3, 70, 130)
    got, expected = run_file(path, *arguments), model(*arguments)
    assert list(got) == ["logits", "pred_boxes"]
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-4)


def test_a_file_of_one_size_by_the_command(model, run, checkpoint, tmp_path):
    path = tmp_path / "model.xml"
    done = run("export", path, "--format", "openvino", "--static", "--size", 64, 96, "--model",
               checkpoint)  # fmt: skip
    assert done.code == 0, done.err
    assert "its outputs are within" in done.out
    pixel_values = images(1)[0]
    got = run_file(path, pixel_values)
    torch.testing.assert_close(got["logits"], model(pixel_values).logits, rtol=0, atol=1e-4)
    with pytest.raises(RuntimeError):
        run_file(path, images(1, 96, 64)[0])


def test_a_file_in_int8(run, checkpoint, tmp_path):
    pytest.importorskip("nncf")
    path = tmp_path / "model.xml"
    done = run("export", path, "--format", "openvino", "--int8", tmp_path, "--size", 64, 96,
               "--model", checkpoint)  # fmt: skip
    assert done.code == 0, done.err
    assert "FakeQuantize" in path.read_text()


def test_arguments_of_a_file_are_checked(model, run, checkpoint, tmp_path):
    path, calibration = tmp_path / "model.xml", [images(1)[0]]
    for options, message in (
        ({"dynamic": False}, "expected dynamic=True"),
        ({"format": "torch"}, 'expected format="openvino" with it, got'),
    ):
        name = "model.pt2" if "format" in options else "model.xml"
        options = {"format": "openvino", "int8_calibration": calibration} | options
        with pytest.raises(ValueError, match=message):
            export(model, tmp_path / name, **options)
    with pytest.raises(
        ValueError, match=r"int8_calibration: expected \[B, 3, H, W\], got \[3, 9, 9\]"
    ):
        export(model, path, "openvino", int8_calibration=[torch.zeros(3, 9, 9)])
    with pytest.raises(ValueError, match=r"model: expected float32, got torch\.bfloat16"):
        export(random_model().bfloat16(), path, "openvino")
    done = run("export", path, "--format", "openvino", "--int8", path, "--model", checkpoint)
    assert done.code == 1
    assert "expected a folder with images" in done.err


def test_detect_by_the_command(model, run, checkpoint, tmp_path):
    done = run("detect", tmp_path / "a.png", "--engine", "openvino", "--threshold", 0, "--model",
               checkpoint, "--output", tmp_path / "found")  # fmt: skip
    assert done.code == 0, done.err
    results = json.loads((tmp_path / "found/detections.json").read_text())
    loaded = ConditionalDetrForObjectDetection.from_pretrained(checkpoint, dtype=torch.float32)
    expected = loaded.predict(tmp_path / "a.png", 0.0).scores
    scores = torch.tensor([result["score"] for result in results])
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)


def test_the_command_names_a_missing_package(run, checkpoint, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "openvino" else found(name)
    )
    done = run("detect", tmp_path / "a.png", "--engine", "openvino", "--model", checkpoint)
    assert done.code == 1
    assert "needs openvino: pip install 'cdetr-fast[openvino]'" in done.err
