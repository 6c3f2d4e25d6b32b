"""Fixtures of the tests of commands."""

from pathlib import Path

import pytest
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
