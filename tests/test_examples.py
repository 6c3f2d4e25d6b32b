"""The programs in cells in examples/ run, and what they claim is so."""

import json
import re
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cdetr_fast import ConditionalDetrForObjectDetection, ConditionalDetrImageProcessor
from cdetr_fast.demo import DEMO
from cdetr_fast.demo.scenes import draw_scene, write_coco_dataset
from cdetr_fast.images import resize


def run(path, argv=()):
    """Run a program in this process; starting one and importing torch takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(path), *argv])
        patch.syspath_prepend(path.parent)  # as `python path` does
        return runpy.run_path(str(path), run_name="__main__")


DETECTION = re.compile(r"(0\.\d\d) (\w+) at (-?\d+), (-?\d+), (\d+) x (\d+)")


def assert_detections_of_scene(printed):
    """Compare what an example printed with what `predict` finds in its scene."""
    model = ConditionalDetrForObjectDetection.from_pretrained(DEMO, dtype=torch.float32)
    result = model.predict(draw_scene(seed=4, size=(384, 384))[0], threshold=0.5)
    expected, found = DETECTION.findall(str(result)), DETECTION.findall(printed)
    assert len(found) == len(result.scores) > 0
    for (score, name, *box), (found_score, found_name, *found_box) in zip(
        expected, found, strict=True
    ):
        assert found_name == name
        assert float(found_score) == pytest.approx(float(score), abs=0.011)  # both are rounded
        np.testing.assert_allclose(np.float32(found_box), np.float32(box), atol=1.01)


def attention_maps(folder, out):
    sheet = Image.open(folder / "attention.png")
    assert sheet.width > sheet.height  # four heads, three objects
    assert_detections_of_scene(out)


def detect_numpy(folder, out):
    assert out == ""


def convergence(folder, out):
    assert "epoch   1  AP 0." in out
    assert "AP 0.3: not reached" in out
    assert (folder / "paper" / "report.html").is_file()


def fine_tune(folder, out):
    model = ConditionalDetrForObjectDetection.from_pretrained(folder / "run" / "best")
    assert model.config.id2label == {0: "round", 1: "angular"}
    assert "AP50" in out
    for page in (folder / "run" / "report.html", folder / "evaluation" / "report.html"):
        assert "angular" in page.read_text("utf-8")


def onnx_without_torch(folder, out):
    assert_detections_of_scene(out)


def kernels_alone(folder, out):
    errors = [float(x) for x in re.findall(r"within (\S+)$", out, re.MULTILINE)]
    assert len(errors) == 4
    assert max(errors) < 1e-5
    assert "\nset_loss: " in out


TRAINING = {"SCENES": "8", "EPOCHS": "1", "SIZE": "64", "BATCH": "4", "DEVICE": "cpu"}

# What each needs for a small run, and a check of what it left.
EXAMPLES = {
    "attention_maps": ({"SIZE": "64"}, attention_maps),
    "convergence": ({"SCENES": "8", "EPOCHS": "1"}, convergence),
    "detect_numpy": ({}, detect_numpy),
    "fine_tune": (TRAINING, fine_tune),
    "kernels_alone": ({"DEVICE": "cpu", "BATCH": "2", "QUERIES": "20"}, kernels_alone),
    "onnx_without_torch": ({}, onnx_without_torch),
}


@pytest.fixture(scope="module")
def exported(root, tmp_path_factory):
    """A folder with the export of examples/onnx_without_torch.py."""
    for module in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module)
    folder = tmp_path_factory.mktemp("onnx")
    text = (root / "examples" / "onnx_without_torch.py").read_text("utf-8")
    program = folder / "export.py"
    program.write_text(text.split('EXPORT = """')[1].split('"""')[0], "utf-8")
    run(program, ["", str(folder)])
    return folder


@pytest.fixture(scope="module")
def numpy_code(root):
    return run(root / "examples" / "detect_numpy.py")


def test_all_are_run(root):
    assert {path.stem for path in (root / "examples").glob("*.py")} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name, root, monkeypatch, tmp_path, capsys, request):
    path = root / "examples" / f"{name}.py"
    text = path.read_text("utf-8")
    assert text.startswith("# %% [markdown]\n# # ")
    assert set(re.findall("^# %%.*", text, re.MULTILINE)) == {"# %%", "# %% [markdown]"}
    assert f"`examples/{name}.py`" in (root / "docs" / "examples.md").read_text("utf-8")
    settings, check = EXAMPLES[name]
    output = request.getfixturevalue("exported") if "EXPORT" in text else tmp_path
    for variable, value in ({"OUTPUT": str(output)} | settings).items():
        assert f'"{variable}"' in text or variable == "OUTPUT"
        monkeypatch.setenv(variable, value)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    run(path)
    check(output, capsys.readouterr().out)


def test_fine_tune_takes_an_export(root, monkeypatch, tmp_path, capsys):
    for split, seeds in (("train", range(6)), ("valid", range(6, 9))):
        path = write_coco_dataset(tmp_path / "data" / split, seeds, (64, 80))
        path.rename(path.with_name("_annotations.coco.json"))
    own = {"DATA": str(tmp_path / "data"), "OUTPUT": str(tmp_path / "output")}
    for variable, value in (TRAINING | own).items():
        monkeypatch.setenv(variable, value)
    run(root / "examples" / "fine_tune.py")
    assert "after 2 steps" in capsys.readouterr().out
    assert (tmp_path / "output" / "evaluation" / "report.html").is_file()
    assert not (tmp_path / "output" / "scenes").exists()


def test_demo_checkpoint_trains_and_resumes(root, tmp_path):
    """A few steps: what is saved is the model of the package, with one of the groups of queries."""
    command = [sys.executable, root / "examples" / "demo_checkpoint" / "train.py"]
    command += ["--scenes", "8", "--batch-size", "4", "--state", tmp_path / "state.pt"]
    command += ["--output", tmp_path / "model", "--held-out", "2"]
    for more, steps in (["--steps", "1"], 1), (["--steps", "2", "--resume"], 2):
        done = subprocess.run([*command, *more], capture_output=True, text=True, check=True)
        assert f"{steps} steps, {4 * steps} images" in done.stdout
        assert '"AP50"' in done.stdout
    model = ConditionalDetrForObjectDetection.from_pretrained(tmp_path / "model")
    demo = ConditionalDetrForObjectDetection.from_pretrained(DEMO)
    assert model.config.to_diff_dict() == demo.config.to_diff_dict()
    shapes = {name: x.shape for name, x in model.state_dict().items()}
    assert shapes == {name: x.shape for name, x in demo.state_dict().items()}


# --- without torch --------------------------------------------------------------------------------


def test_onnx_example_imports_no_torch(root, exported):
    code = (
        "import runpy, sys\n"
        "sys.modules.update(dict.fromkeys(('torch', 'torchvision', 'cdetr_fast')))\n"
        f"sys.path.insert(0, {str(root / 'examples')!r})\n"
        f"runpy.run_path({str(root / 'examples' / 'onnx_without_torch.py')!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"OUTPUT": str(exported)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert_detections_of_scene(done.stdout)


@pytest.mark.parametrize(
    ("size_hw", "pixels"),
    [((128, 128), 1e-3), ((96, 128), 1e-3), ((128, 74), 1e-3), ((333, 500), 1.0)],
)
def test_numpy_gives_what_predict_gives(exported, numpy_code, size_hw, pixels):
    """Images of the model's size have equal pixels; others are resized by another library.

    Scores are within a hundredth of that, or within twice the error of `predict` against fp64.
    """
    model, exact = (
        ConditionalDetrForObjectDetection.from_pretrained(DEMO, dtype=dtype)
        for dtype in (torch.float32, torch.float64)
    )
    detector = numpy_code["Detector"](exported)
    for seed in (3, 4):
        image = draw_scene(seed, size_hw)[0]
        expected, found = model.predict(image, threshold=0.3), detector(image, threshold=0.3)
        assert found.labels.tolist() == expected.labels.tolist() != []
        assert abs(found.boxes_xyxy - expected.boxes_xyxy.numpy()).max() < pixels
        difference = abs(found.scores - expected.scores.numpy()).max()
        if difference >= pixels / 100:  # fp32 itself is further off
            true = exact.predict(image, threshold=0.3).scores.numpy()
            error, own = abs(found.scores - true).max(), abs(expected.scores.numpy() - true).max()
            assert error <= 2 * own


sides = st.integers(1, 3000)


@given(sides, sides, st.integers(1, 1000), sides)
def test_numpy_resizes_to_the_same_size(numpy_code, height, width, shortest, longest):
    size = {"shortest_edge": shortest, "longest_edge": longest}
    assert numpy_code["resized_hw"](height, width, size) == resize.resized_hw(height, width, size)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK"])
def test_numpy_prepares_images_as_the_processor(numpy_code, tmp_path, mode):
    """Within a level of 255 where it resizes; turned upright."""
    processor = ConditionalDetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    draw_scene(2, (160, 96))[0].convert(mode).save(path, exif=exif)
    settings = json.loads(processor.to_json_string())
    values = numpy_code["preprocess"](numpy_code["read_image"](path), settings)
    expected = processor(path, return_tensors="np")["pixel_values"]
    assert values.dtype == np.float32
    assert values.shape == expected.shape == (1, 3, 58, 96)
    assert abs(values - expected).max() < 1.01 / 255 / 0.224
    exact = processor.with_overrides({"do_resize": False}, "test")
    values = numpy_code["preprocess"](numpy_code["read_image"](path), exact.to_dict())
    expected = exact(path, return_tensors="np")["pixel_values"]
    assert abs(values - expected).max() < 1e-5


def test_numpy_refuses_other_sizes(numpy_code):
    with pytest.raises(ValueError, match="size: expected shortest_edge and longest_edge"):
        numpy_code["resized_hw"](10, 10, {"max_height": 10, "max_width": 10})
