"""`optimize(model, engine="openvino")`: the same model on OpenVINO."""

import copy
import importlib.util
import json
import re

import pytest
import torch
from PIL import Image
from support.command_line import run as command_line  # noqa: F401 - a fixture
from support.oracle import SMALL_MODEL, make_ours, randomise

from cdetr_fast import (
    ConditionalDetrForObjectDetection,
    ConditionalDetrImageProcessor,
    optimize,
)
from cdetr_fast.inference import engine_records, runner
from cdetr_fast.inference import openvino as module
from cdetr_fast.inference.engine_trial import Shape, try_engines
from cdetr_fast.inference.export import export
from cdetr_fast.inference.int8 import int8_unsupported_reason
from cdetr_fast.inference.openvino import OpenVinoCall
from cdetr_fast.inference.runner import Runner

pytest.importorskip("openvino")
needs_bf16 = pytest.mark.skipif(
    "BF16" not in module._capabilities(), reason="this CPU has no bf16 instructions"
)


def random_model(task="detection"):
    model = make_ours(task, **SMALL_MODEL)
    randomise(model)
    return model.eval()


def images(batch=2, height=64, width=96, padded=True):
    generator = torch.Generator().manual_seed(1)
    pixel_values = torch.randn(batch, 3, height, width, generator=generator)
    mask = torch.ones(batch, height, width, dtype=torch.int64)
    if padded:
        mask[1:, height * 3 // 4 :] = 0
        mask[1:, :, width * 2 // 3 :] = 0
    return pixel_values, mask


def assert_same(got, expected, atol=1e-4):
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def fast(model):
    return optimize(model, engine="openvino")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


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


# "auto" ------------------------------------------------------------------------------------------


@pytest.fixture
def record(model, tmp_path, monkeypatch):
    """Writes a record of this machine in which OpenVINO takes a number of ms, and PyTorch 10."""
    monkeypatch.setenv("CDETR_FAST_CACHE", str(tmp_path / "cache"))
    name = engine_records.architecture(model)

    def write(ms=5.0, precision="fp32", verdict=engine_records.RIGHT):
        findings = [
            engine_records.Finding(name, precision, "1x64x96", engine, right, taken)
            for engine, right, taken in (("torch", "right", 10.0), ("openvino", verdict, ms))
        ]
        engine_records.write(engine_records.machine(), findings)

    return write


def engine_of(model):
    """The engine that runs a model, by what is there and by what the model says."""
    text = model.explain()  # prepares a copied model
    engine = "torch" if model.runner._openvino is None else "openvino"
    assert f"chosen           {engine}: " in text
    return engine


def test_auto_goes_by_the_record(model, record):
    fast = optimize(model, engine="auto")
    assert engine_of(fast) == "torch"
    assert "there is no record of this machine" in fast.explain()
    assert_same(fast(*images()), model(*images()))
    record(5.0)
    fast = optimize(model, engine="auto")
    assert engine_of(fast) == "openvino"
    assert "openvino takes 5 ms, torch 10 ms at 1x64x96" in fast.explain()
    assert_same(fast(*images()), model(*images()))
    assert engine_of(copy.deepcopy(fast)) == "openvino"
    assert type(optimize(model).runner) is Runner  # the default asks no record
    record(20.0)
    assert engine_of(optimize(model, engine="auto")) == "torch"
    record(1.0, verdict="boxes are off")
    fast = optimize(model, engine="auto")
    assert engine_of(fast) == "torch"
    assert "openvino at 1x64x96: boxes are off" in fast.explain()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": torch.float64}, "expected float32 or bfloat16, got torch.float64"),
        ({"dtype": torch.float16}, "expected float32 or bfloat16, got torch.float16"),
        ({"compile": True}, 'expected False, as engine="openvino" compiles itself'),
    ],
)
def test_auto_is_pytorch_where_openvino_cannot(model, record, options, reason):
    record(5.0)
    fast = optimize(model, engine="auto", **options)
    assert engine_of(fast) == "torch"
    assert reason in fast.explain()
    with pytest.raises((RuntimeError, ValueError), match=re.escape(reason)):
        optimize(model, engine="openvino", **options)


def test_auto_is_pytorch_for_segmentation(record):
    model = random_model("segmentation")
    fast = optimize(model, engine="auto")
    assert engine_of(fast) == "torch"
    assert "runs no segmentation" in fast.explain()
    assert_same(fast(*images()), model(*images()))


@needs_bf16
def test_auto_goes_by_the_precision(model, record):
    record(5.0)
    assert engine_of(optimize(model, engine="auto", dtype="bfloat16")) == "torch"
    record(5.0, "bf16")
    assert engine_of(optimize(model, engine="auto", dtype="bfloat16")) == "openvino"


@needs_bf16
@pytest.mark.skipif(int8_unsupported_reason() is not None, reason=str(int8_unsupported_reason()))
@pytest.mark.parametrize(("dtype", "name"), [("float32", "int8"), ("bfloat16", "int8-bf16")])
def test_precisions_of_int8(model, record, dtype, name):
    pytest.importorskip("nncf")
    calibration = [images(1)[0]]
    for recorded in ("fp32", "bf16", "int8", "int8-bf16"):
        record(5.0, recorded)
        fast = optimize(model, engine="auto", dtype=dtype, int8_calibration=calibration)
        assert engine_of(fast) == ("openvino" if recorded == name else "torch")
        record(20.0, recorded)


@pytest.mark.skipif(int8_unsupported_reason() is not None, reason=str(int8_unsupported_reason()))
def test_auto_in_int8_is_that_of_pytorch_without_nncf(model, record, monkeypatch):
    record(5.0, "int8")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "nncf" else found(name)
    )
    fast = optimize(model, engine="auto", int8_calibration=[images(1)[0]])
    assert engine_of(fast) == "torch"
    assert "needs nncf" in fast.explain()
    with pytest.raises(ValueError, match="int8_calibration: expected a model in float32 or"):
        optimize(model, engine="auto", dtype="float16", int8_calibration=[images(1)[0]])


def test_auto_is_pytorch_where_openvino_is_off(fast, record, monkeypatch, caplog):
    record(5.0)
    changed = random_model()
    changed.class_labels_classifier.bias.add_(1)
    compiled = fast.runner._openvino._compiled
    monkeypatch.setattr(module, "convert", lambda *arguments: None)
    monkeypatch.setattr(module, "compiled", lambda *arguments: compiled)
    chosen = optimize(changed, engine="auto")
    assert engine_of(chosen) == "torch"
    assert "is off by" in chosen.explain()
    assert "torch runs the model instead: engine: " in caplog.text
    assert_same(chosen(*images()), changed(*images()))


def test_auto_is_pytorch_where_weights_change_and_openvino_fails(record, monkeypatch):
    record(5.0)
    model = random_model()
    chosen = optimize(model, engine="auto")
    assert engine_of(chosen) == "openvino"

    def fail(*arguments):
        raise RuntimeError("no conversion")

    monkeypatch.setattr(module, "convert", fail)
    model.class_labels_classifier.bias.add_(1)
    assert_same(chosen(*images()), model(*images()))
    assert engine_of(chosen) == "torch"
    model.class_labels_classifier.bias.add_(1)
    assert_same(chosen(*images()), model(*images()))


def test_a_trial_compares_before_it_times(model, monkeypatch):
    shape = Shape.parse("2x64x96p")
    pixel_values = images()[0]
    found = {x.engine: x for x in try_engines(model, shape, pixel_values, ["fp32"], repeats=2)}
    assert [x.verdict for x in found.values()] == ["right", "right"]
    assert all(x.ms >= x.min_ms > 0 and x.logits_error < 1e-5 for x in found.values())
    assert {x.shape for x in found.values()} == {"2x64x96p"}
    other = random_model()
    other.class_labels_classifier.bias.add_(1)
    wrong = OpenVinoCall(other)
    monkeypatch.setattr(runner, "OpenVinoCall", lambda *arguments: wrong)
    found = {x.engine: x for x in try_engines(model, shape, pixel_values, ["fp32"], repeats=2)}
    assert found["openvino"].ms is None
    assert re.match("logits are off by .* expected at most 1.0e-04", found["openvino"].verdict)
    assert found["torch"].ms > 0
    (choice,) = engine_records.choices(found.values()).values()
    assert choice.engine == "torch"


# Files and commands ------------------------------------------------------------------------------


@pytest.fixture
def run(command_line):  # noqa: F811 - the fixture
    """Runs `cdetr-fast` with arguments on the CPU."""
    return lambda *arguments: command_line(*arguments, "--device", "cpu")


@pytest.fixture
def checkpoint(model, tmp_path):
    """The model in a folder with its image processor, and an image beside it."""
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    size = {"shortest_edge": 64, "longest_edge": 96}
    ConditionalDetrImageProcessor(size=size).save_pretrained(folder)
    Image.radial_gradient("L").resize((60, 40)).convert("RGB").save(tmp_path / "a.png")
    return folder


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


def test_the_benchmark_decides_what_auto_is(run, checkpoint, tmp_path, monkeypatch, command_line):  # noqa: F811
    monkeypatch.setenv("CDETR_FAST_CACHE", str(tmp_path / "cache"))
    options = ("--shapes", "2x64x96p", "--precisions", "fp32", "--model", checkpoint)
    done = command_line("benchmark", *options, "--repeats", 2)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert [line.split()[:3] for line in lines[-4:-2]] == [
        ["2x64x96p", "fp32", engine] for engine in ("torch", "openvino")
    ]
    (file,) = (tmp_path / "cache/engines").glob("*.json")
    assert lines[-1] == f"record: {file}"
    chosen = re.match(r'engine="auto" in fp32 is (\w+): openvino takes', lines[-2])[1]
    facts = json.loads(command_line("info", "--json").out)["engines"]
    assert facts["source"] == str(file)
    assert len(facts["findings"]) == 2
    assert [x["engine"] for x in facts["chosen"]] == [chosen]
    record = json.loads(file.read_text())
    for finding in record["findings"]:
        finding["ms"] = {"torch": 10.0, "openvino": 5.0}[finding["engine"]]
    file.write_text(json.dumps(record))
    assert 'engine="auto"): openvino for fp32 of test_resnet' in " ".join(
        command_line("info").out.split()
    )
    used = []
    build = runner.OpenVinoCall
    monkeypatch.setattr(runner, "OpenVinoCall", lambda *x: used.append(x) or build(*x))
    found = ("detect", tmp_path / "a.png", "--threshold", 0, "--model", checkpoint, "--output")
    assert run(*found, tmp_path / "plain").code == 0
    assert not used
    assert run(*found, tmp_path / "auto", "--engine", "auto").code == 0
    assert used
    scores = [
        [result["score"] for result in json.loads((folder / "detections.json").read_text())]
        for folder in (tmp_path / "plain", tmp_path / "auto")
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--shapes", "64x96"), 2, "expected BxHxW or BxHxWp, got '64x96'"),
        (("--precisions", "fp8"), 2, "expected some of fp32, bf16, int8, int8-bf16, got fp8"),
        (("--images", "nowhere"), 1, "--images nowhere: expected a folder with images"),
    ],
)
def test_options_of_the_benchmark_are_checked(command_line, checkpoint, options, code, message):  # noqa: F811
    done = command_line("benchmark", "--model", checkpoint, *options)
    assert done.code == code
    assert message in " ".join(done.err.replace("│", "").split())
