"""Small scenes and models, settings that train them in seconds, and what a run has written."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cdetr_fast.demo.scenes import write_coco_dataset
from cdetr_fast.training.run.state import checkpoint_files, load_checkpoint

MODEL = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_queries": 12,
}


def write_scenes(folder: Path) -> Path:
    """Write `train` (14 scenes) and `val` (5 scenes), 64 x 80 pixels."""
    write_coco_dataset(folder / "train", range(14), (64, 80))
    write_coco_dataset(folder / "val", range(100, 105), (64, 80))
    return folder


def short_run(scenes: Path, output: Path) -> dict[str, Any]:
    """Return settings of a run of two epochs with four steps each."""
    return {
        "train_annotations": str(scenes / "train" / "annotations.json"),
        "output": str(output),
        "backbone": "test_resnet",
        "backbone_weights": "none",
        "model_options": MODEL,
        "scales": [48, 64],
        "crop_scales": [64],
        "crop_sizes": [40, 64],
        "eval_size": 64,
        "max_size": 96,
        "epochs": 2,
        "batch_size": 4,
        "num_workers": 0,
        "device": "cpu",
        "log_every": 1,
        "evaluate_every": 100,  # and at the end
        "learning_rate": 1e-3,
        "backbone_learning_rate": 1e-4,
    }


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A folder with `train` (14 scenes) and `val` (5 scenes), 64 x 80 pixels."""
    return write_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture
def settings(scenes, tmp_path):
    """Settings of a run of two epochs with four steps each; keyword arguments change them."""

    def make(**changes):
        return short_run(scenes, tmp_path / "run") | changes

    return make


@pytest.fixture
def damage(scenes, tmp_path):
    """Copies a split of the scenes, with one image cut short; returns the annotation file."""

    def copy(split, name):
        folder = tmp_path / f"damaged_{split}"
        shutil.copytree(scenes / split, folder)
        victim = folder / name
        Image.open(victim).save(folder / "x.jpg")
        victim.write_bytes((folder / "x.jpg").read_bytes()[:700])
        return folder / "annotations.json"

    return copy


def rows(config, kind="train"):
    """Return the rows of a kind in the log of a run."""
    lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def losses(config):
    """Return the loss of each logged step."""
    return [row["loss"] for row in rows(config)]


def final_state(config):
    """Return the content of the last checkpoint."""
    return load_checkpoint(checkpoint_files(Path(config.output) / "checkpoints")[-1])
