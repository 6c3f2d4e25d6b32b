"""`optimize(model, engine="openvino")`: the same model on OpenVINO."""

import importlib.util

import pytest
import torch
from support.openvino import assert_same, images, needs_bf16, random_model
from support.oracle import SMALL_MODEL, make_ours, randomise

from cdetr_fast import ConditionalDetrForObjectDetection, optimize
from cdetr_fast.inference import openvino as module

pytest.importorskip("openvino")


@pytest.mark.parametrize(
    "arguments",
    [
        images(),
        images(3, 70, 130),
        images(1, 64, 96, padded=False),
        images(1, 130, 33, padded=False)[:1],
        images(2, 32, 32)[:1],
    ],
)
def test_outputs_are_those_of_the_model(model, fast, arguments):
    got, expected = fast(*arguments), model(*arguments)
    assert_same(got, expected)
    assert type(got) is type(expected)


@pytest.mark.parametrize("backbone", ["resnet10t", "tf_efficientnet_lite0"])
def test_padding_that_depends_on_the_size(backbone):
    """Of strided convolutions, and of the pools beside the blocks of a dilated ResNet."""
    stride = {"output_stride": 8} if backbone == "resnet10t" else {}
    config = {"model_type": "timm_backbone", "backbone": backbone, "out_indices": [3], **stride}
    model = make_ours(**{**SMALL_MODEL, "backbone": None, "backbone_config": config}).eval()
    randomise(model)
    fast = optimize(model, engine="openvino")
    for size in ((64, 96), (75, 61)):
        assert_same(fast(*images(2, *size)), model(*images(2, *size)))


def test_masks_of_other_dtypes_and_images_of_other_layouts(model, fast):
    pixel_values, mask = images()
    expected = model(pixel_values, mask)
    for kind in (torch.bool, torch.float32, torch.uint8):
        assert_same(fast(pixel_values, mask.to(kind)), expected)
    assert_same(fast(pixel_values, mask * 255), expected)
    last = pixel_values.contiguous(memory_format=torch.channels_last)
    assert_same(fast(last, mask), expected)


def test_predictions_and_results_that_stay(model, fast):
    image = torch.randint(0, 256, (3, 60, 80), dtype=torch.uint8)
    ours, theirs = fast.predict(image, 0.0), model.predict(image, 0.0)
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=0, atol=1e-4)
    first = fast(*images())
    kept = first.logits.clone()
    fast(*images(2, 70, 100))
    assert torch.equal(first.logits, kept)


def test_explains_what_runs(fast):
    text = fast.explain()
    assert text.startswith("engine           OpenVINO 20")
    assert "fp32" in text
    assert "onednn" not in text


def test_attentions_come_from_the_own_forward(model, fast):
    got = fast(*images(), output_attentions=True)
    expected = model(*images(), output_attentions=True)
    assert torch.equal(got.cross_attentions[-1], expected.cross_attentions[-1])
    assert "the model's own forward, as output_attentions is given" in fast.explain()
    with pytest.raises(RuntimeError, match="optimised for inference"):
        fast.train()


def test_results_of_the_base_model_follow_its_weights():
    base = random_model("base")
    fast = optimize(base, engine="openvino")
    assert_same(fast(*images()), base(*images()))
    base.input_projection.bias.add_(1)
    assert_same(fast(*images()), base(*images()))


@needs_bf16
def test_bf16(model):
    fast = optimize(model, engine="openvino", dtype=torch.bfloat16)
    pixel_values, mask = images()
    got, expected = fast(pixel_values.bfloat16(), mask), model(pixel_values, mask)
    assert got.logits.dtype == torch.bfloat16
    assert got.pred_boxes.dtype == torch.float32
    assert (got.logits.float() - expected.logits).abs().max() < 0.2
    assert (got.pred_boxes - expected.pred_boxes).abs().max() < 0.02
    assert "bf16" in fast.explain()
    with pytest.raises(TypeError, match=r"pixel_values: expected torch\.bfloat16"):
        fast(pixel_values, mask)


def test_int8():
    pytest.importorskip("nncf")
    model = random_model()
    calibration = [images(1, padded=False)[0] for _ in range(2)]
    fast = optimize(model, engine="openvino", int8_calibration=calibration)
    got, expected = fast(calibration[0]), model(calibration[0])
    difference = (got.logits - expected.logits).norm() / expected.logits.norm()
    assert 1e-6 < difference < 0.25
    assert "int8 by NNCF, the rest in fp32" in fast.explain()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"engine": "onnx"}, ValueError, "engine: expected one of .*got 'onnx'"),
        ({"compile": True}, ValueError, "compile: expected False"),
        ({"cuda_graphs": True}, (ValueError, RuntimeError), "cuda_graphs: expected"),
        ({"dtype": torch.float16}, RuntimeError, "expected float32 or bfloat16"),
        ({"int8_calibration": []}, TypeError, "int8_calibration: expected"),
    ],
)
def test_options_are_checked(model, options, kind, message):
    with pytest.raises(kind, match=message):
        optimize(model, **{"engine": "openvino", **options})


def test_segmentation_is_refused():
    with pytest.raises(TypeError, match="runs no segmentation"):
        optimize(random_model("segmentation"), engine="openvino")


@pytest.mark.parametrize(("missing", "extra"), [("openvino", "openvino"), ("nncf", "int8")])
def test_a_missing_package_is_named(model, monkeypatch, missing, extra):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == missing else found(name)
    )
    calibration = [images()[0]] if missing == "nncf" else None
    message = rf"needs {missing}: pip install 'cdetr-fast\[{extra}\]'"
    with pytest.raises(RuntimeError, match=message):
        optimize(model, engine="openvino", int8_calibration=calibration)


def test_outputs_that_differ_are_refused(fast, monkeypatch):
    changed = random_model()
    changed.class_labels_classifier.bias.add_(1)
    compiled = fast.runner._openvino._compiled
    monkeypatch.setattr(module, "convert", lambda *arguments: None)
    monkeypatch.setattr(module, "compiled", lambda *arguments: compiled)
    expected = changed(*images())
    with pytest.raises(RuntimeError, match=r'"openvino" in fp32 is off by .* of logits, expected'):
        optimize(changed, engine="openvino")
    assert type(changed) is ConditionalDetrForObjectDetection
    assert_same(changed(*images()), expected, 0)
