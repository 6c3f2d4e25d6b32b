"""Exported files give what the model gives, and are not kept if they do not."""

import sys
from pathlib import Path

import pytest
import torch
from support.oracle import SMALL_MODEL, random_model

from cdetr_fast import cli
from cdetr_fast.inference import export as module
from cdetr_fast.inference.export import export, module_of


@pytest.fixture(scope="module")
def detector():
    return random_model(**SMALL_MODEL)


def images(batch=1, height=64, width=96):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_torch_with_sizes_open(task, tmp_path):
    model, path = random_model(task, **SMALL_MODEL), tmp_path / "model.pt2"
    assert export(model, path, size=(64, 96), masked=True) <= 1e-4
    exported = module_of(torch.export.load(path))
    pixel_values = images(3, 70, 130)
    mask = torch.ones(3, 70, 130)
    mask[1, 50:] = 0
    got = exported(pixel_values, mask)
    expected = model(pixel_values, mask)
    torch.testing.assert_close(got[0], expected.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(got[1], expected.pred_boxes, rtol=0, atol=1e-4)
    assert all(tensor.is_floating_point() for tensor in got)


def test_torch_of_one_size_has_constants(detector, tmp_path):
    path = tmp_path / "model.pt2"
    assert export(detector, path, size=(64, 96), dynamic=False) <= 1e-4
    program = torch.export.load(path)
    torch.testing.assert_close(
        program.module()(images())[0], detector(images()).logits, rtol=0, atol=1e-4
    )
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [name for name in called if "aten.sin" in name or "cumsum" in name]
    with pytest.raises((AssertionError, RuntimeError)):
        program.module()(images(1, 96, 64))


@pytest.mark.parametrize("dynamic", [True, False])
def test_onnx(detector, tmp_path, dynamic):
    runtime = pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    assert export(detector, path, "onnx", size=(64, 96), dynamic=dynamic, masked=dynamic) <= 1e-4
    session = runtime.InferenceSession(path)
    assert [x.name for x in session.get_outputs()] == ["logits", "pred_boxes"]
    types = {x.type for x in (*session.get_inputs(), *session.get_outputs())}
    assert types == {"tensor(float)"}
    size = (2, 70, 130) if dynamic else (1, 64, 96)
    feeds = {"pixel_values": images(*size).numpy()}
    if dynamic:
        feeds["pixel_mask"] = torch.ones(size).numpy()
    logits = torch.from_numpy(session.run(["logits"], feeds)[0])
    torch.testing.assert_close(logits, detector(images(*size)).logits, rtol=0, atol=1e-4)


def test_a_model_that_returns_tuples_is_compared_too(detector, monkeypatch):
    expected = detector(images())
    monkeypatch.setattr(detector.config, "return_dict", False)
    found = expected.logits, expected.pred_boxes
    assert module._largest_error(detector, lambda _: found, (images(),), Path("a.pt2"), 1e-3) < 1e-6


def test_a_wrong_file_is_not_kept(detector, tmp_path, monkeypatch):
    def wrong(program, path, masked):
        run = module._write_torch(program, path, masked)
        return lambda inputs: [tensor + 1 for tensor in run(inputs)]

    monkeypatch.setitem(module._WRITERS, "torch", wrong)
    with pytest.raises(RuntimeError, match=r"model.pt2: logits of the file is off by 1.0e\+00"):
        export(detector, tmp_path / "model.pt2", size=(64, 96), dynamic=False)
    assert not list(tmp_path.iterdir())


class Adapter(torch.nn.Module):
    """A low-rank adapter as adapter libraries insert it: the layer, and something besides."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.update = torch.nn.Linear(layer.in_features, layer.out_features)
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x):
        return self.layer(x) + self.update(x)


def test_an_adapter_is_not_dropped(tmp_path):
    """The file computes the caller's own forward, or there is no file."""
    model, path = random_model(**SMALL_MODEL), tmp_path / "model.pt2"
    layer = model.model.decoder.layers[0].mlp
    layer.fc2 = Adapter(layer.fc2)
    try:
        export(model, path, size=(64, 96), dynamic=False)
    except (RuntimeError, ValueError):
        assert not list(tmp_path.iterdir())
    else:
        got = torch.export.load(path).module()(images())[0]
        torch.testing.assert_close(got, model(images()).logits, rtol=0, atol=1e-4)


def test_a_hook_is_not_dropped(tmp_path):
    model = random_model(**SMALL_MODEL)
    model.class_labels_classifier.register_forward_hook(lambda *arguments: arguments[-1] + 1)
    with pytest.raises(ValueError, match="class_labels_classifier has a forward hook"):
        export(model, tmp_path / "model.pt2", size=(64, 96), dynamic=False)
    assert not list(tmp_path.iterdir())


def test_arguments_are_checked(detector, tmp_path):
    with pytest.raises(ValueError, match="format: expected one of"):
        export(detector, tmp_path / "model.pt2", "trt")
    with pytest.raises(ValueError, match=r"path: expected a name ending in .onnx"):
        export(detector, tmp_path / "model.pt2", "onnx")
    with pytest.raises(FileNotFoundError, match="path: expected an existing folder"):
        export(detector, tmp_path / "none" / "model.pt2")
    with pytest.raises(TypeError, match="model: expected one that predicts boxes"):
        export(random_model("base", **SMALL_MODEL), tmp_path / "model.pt2")
    for options, kind, message in (
        ({"size": 128}, TypeError, r"size: expected \(height, width\), got 128"),
        ({"size": (0, 64), "dynamic": False}, ValueError, "size: expected an integer >= 1, got 0"),
        ({"size": (32, 64)}, ValueError, "size: expected 33 or more"),
        ({"batch": 0}, ValueError, "batch: expected an integer >= 1, got 0"),
    ):
        with pytest.raises(kind, match=message):
            export(detector, tmp_path / "model.pt2", **options)
    assert not list(tmp_path.iterdir())


def test_half_precision_is_held_to_its_own_rounding(tmp_path):
    path = tmp_path / "model.pt2"
    assert export(random_model(**SMALL_MODEL).bfloat16(), path, size=(64, 96), dynamic=False) < 0.2
    assert path.is_file()


def test_command(tmp_path, monkeypatch, capsys):
    path = tmp_path / "model.pt2"
    arguments = ["export", str(path), "--static", "--size", "64", "96", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["cdetr-fast", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert "its outputs are within" in capsys.readouterr().out
    assert torch.export.load(path)
    monkeypatch.setattr(sys, "argv", ["cdetr-fast", *arguments, "--format", "trt"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "'trt' is not one of" in capsys.readouterr().err
