"""The commands as users run them: convert, train, evaluate."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
import yaml

from cdetr_fast import (
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    ConditionalDetrImageProcessor,
)
from cdetr_fast.checkpoints.key_maps import to_authors
from cdetr_fast.demo.scenes import CLASSES
from cdetr_fast.training.run.state import checkpoint_files, load_checkpoint


@pytest.fixture
def yolo(scenes, tmp_path):
    """The drawn scenes as a YOLO folder; boxes worked out from the COCO file."""
    folder = tmp_path / "yolo"
    names = None
    for split in ("train", "val"):
        content = json.loads((scenes / split / "annotations.json").read_text())
        names = [c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])]
        first = min(c["id"] for c in content["categories"])
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for image in content["images"]:
            name = image["file_name"]
            (folder / "images" / split / name).symlink_to(scenes / split / name)
            lines = []
            for item in content["annotations"]:
                if item["image_id"] == image["id"]:
                    x, y, w, h = item["bbox"]
                    width, height = image["width"], image["height"]
                    numbers = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
                    label = item["category_id"] - first
                    lines.append(f"{label} {' '.join(map(repr, numbers))}\n")
            path = folder / "labels" / split / name
            path.with_suffix(".txt").write_text("".join(lines))
    settings = {"train": "images/train", "val": "images/val", "names": names}
    (folder / "data.yaml").write_text(yaml.safe_dump(settings))
    return folder


def test_from_a_yolo_folder_to_figures(run, yolo, settings, scenes, tmp_path):
    done = run("convert", "yolo", yolo, "--output", "coco")
    assert done.code == 0, done.err
    flags = done.out.split("\n", 2)[2].split()  # as printed, for `train`
    converted = json.loads((tmp_path / "work/coco/instances_val.json").read_text())
    original = json.loads((scenes / "val" / "annotations.json").read_text())
    for ours, theirs in zip(converted["annotations"], original["annotations"], strict=True):
        assert ours["bbox"] == pytest.approx(theirs["bbox"], abs=2e-3)

    values = settings(output="run", max_steps=2, evaluate_every=1)
    for name in ("train_annotations", "output"):
        del values[name]
    (tmp_path / "work" / "settings.yaml").write_text(yaml.safe_dump(values))
    done = run(
        *("train", "--config", "settings.yaml", *flags, "--output", "run", "--seed", 3),
        *("--model-options", *(f"{k}={v}" for k, v in values["model_options"].items())),
    )
    assert done.code == 0, done.err
    assert re.search(
        r"step 2 of \d+: loss [\d.]+ \(ce [\d.]+, bbox [\d.]+, giou [\d.]+\)", done.err
    )
    assert re.search(r"epoch 1: AP 0\.\d+, AP50 0\.\d+, AP75 0\.\d+\n", done.err)
    output = tmp_path / "work" / "run"
    summary, report = done.out.splitlines()[-2:]
    assert summary.startswith("2 steps, AP ")
    assert summary.endswith(": run")
    assert report == "report: run/report.html"
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["train", "train", "eval"]
    assert yaml.safe_load((output / "config.yaml").read_text())["seed"] == 3

    done = run(
        *("evaluate", "--model", "run/model", "--device", "cpu", "--num-workers", 0),
        *("--annotations", "coco/instances_val.json", "--images", yolo, "--output", "test"),
    )
    assert done.code == 0, done.err
    figures = json.loads((tmp_path / "work/test/metrics.json").read_text())
    assert figures["images"] == 5
    trained = {k: v for k, v in rows[-1].items() if k in figures["stats"]}
    assert figures["stats"] == trained  # the run's own evaluation, of the same weights
    assert f"{'AP50':14} {figures['stats']['AP50']:.3f}" in done.out

    done = run("train", "--config", "settings.yaml", *flags, "--output", "run")
    assert done.code == 1
    assert done.err.splitlines()[-1].startswith("cdetr-fast: output: run has a run already")


def test_from_a_file_of_the_authors(run, scenes, tmp_path):
    """A class head for the data; all other weights are those of the file, while nothing learns."""
    options = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 32, "num_queries": 7}
    options |= {f"{x}_ffn_dim": 32 for x in ("encoder", "decoder")}
    model = ConditionalDetrForObjectDetection(
        ConditionalDetrConfig(backbone="resnet18", num_labels=91, **options)
    )
    source = tmp_path / "work" / "authors.pth"
    torch.save({"model": to_authors(model.state_dict()), "epoch": 49}, source)
    done = run(
        *(
            "train",
            "--model",
            source.name,
            "--train-annotations",
            scenes / "train/annotations.json",
        ),
        *("--max-steps", 1, "--batch-size", 2, "--device", "cpu", "--num-workers", 0),
        *("--scales", 64, "--crop-probability", 0, "--learning-rate", 0),
        *("--backbone-learning-rate", 0, "--output", "run"),
    )
    assert done.code == 0, done.err
    folder = tmp_path / "work" / "run" / "model"
    trained = ConditionalDetrForObjectDetection.from_pretrained(folder, strict=True)
    assert list(trained.config.id2label.values()) == list(CLASSES)
    for name, value in model.state_dict().items():
        if not name.startswith("class_labels_classifier"):
            assert torch.equal(trained.state_dict()[name], value), name
    size = ConditionalDetrImageProcessor.from_pretrained(folder).size
    assert size == {"shortest_edge": 800, "longest_edge": 1333}


def test_accelerate_launch(root, settings, tmp_path):
    """Two processes by Accelerate's launcher do one run."""
    values = settings(output=str(tmp_path / "run"), max_steps=2, batch_size=2)
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(values))
    done = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "accelerate.commands.launch",
                "--multi_gpu",
                "--num_processes",
                "2",
            ),
            *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
            *("--main_process_port", "0", "-m", "cdetr_fast.training"),
            *("--config", str(tmp_path / "settings.yaml")),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}:{root / 'kernels'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("2 steps") == 1
    state = load_checkpoint(checkpoint_files(tmp_path / "run" / "checkpoints")[-1])
    assert state["run"]["images per step"] == 4
    assert len(state["random"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--epochs", "0"), "cdetr-fast: epochs: expected an integer >= 1, got 0"),
        (("train",), "cdetr-fast: train_annotations: expected a COCO JSON file, got none"),
        (
            ("evaluate", "--model", ".", "--annotations", "none.json", "--device", "cpu"),
            "cdetr-fast: model: ",
        ),
        (
            ("evaluate", "--model", ".", "--annotations", "none.json", "--batch-size", "0"),
            "cdetr-fast: batch_size: expected an integer >= 1, got 0",
        ),
    ],
)
def test_errors_are_one_line(run, arguments, message):
    done = run(*arguments)
    assert done.code == 1
    assert "Traceback" not in done.err
    assert done.err.splitlines()[-1].startswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--epoch", "1"), "--epoch; did you mean '--epochs'?"),
        (
            ("train", "--epochs", "1", "--lerning-rate=1"),
            "--lerning-rate; did you mean '--learning-rate'?",
        ),
        (("train", "--zzz"), "No such option: --zzz\n"),
        (
            (
                "evaluate",
                "--model",
                "x",
                "--annotations",
                "y",
                "--bad-images=skip",
                "--thresold",
                "1",
            ),
            "--thresold; did you mean '--threshold'?",
        ),
        (("convert", "voc", "x", "--output", "y", "--imagse", "z"), "did you mean '--images'?"),
    ],
)
def test_unknown_option(run, arguments, message):
    done = run(*arguments)
    assert done.code == 2
    assert message in done.err
