"""Fixtures of the tests of commands."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.command_line import run  # noqa: F401 - a fixture
from support.tiny import tiny_config
from support.training_settings import scenes, settings  # noqa: F401 - fixtures

from cdetr_fast import ConditionalDetrForObjectDetection, ConditionalDetrImageProcessor


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny model with random weights, saved with its image processor."""
    config = tiny_config()
    folder = tmp_path_factory.mktemp("checkpoint")
    ConditionalDetrForObjectDetection(config).save_pretrained(folder)
    size = {"shortest_edge": 64, "longest_edge": 96}
    ConditionalDetrImageProcessor(size=size).save_pretrained(folder)
    return folder


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Three images of different sizes, and a file that is none."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, size in enumerate([(90, 60), (64, 96), (80, 80)]):
        noise = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{'cab'[i]}.png")
    (folder / "notes.txt").write_text("not an image")
    return folder
