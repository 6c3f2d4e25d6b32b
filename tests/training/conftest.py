"""Fixtures of the training tests."""

import shutil

import pytest
from PIL import Image
from support.training_settings import scenes, settings  # noqa: F401 - fixtures


@pytest.fixture
def damage(scenes, tmp_path):  # noqa: F811 - a fixture
    """Copies a split of the scenes, with one image cut short; returns the annotation file."""

    def copy(split, name):
        folder = tmp_path / f"damaged_{split}"
        shutil.copytree(scenes / split, folder)
        victim = folder / name
        Image.open(victim).save(folder / "x.jpg")
        victim.write_bytes((folder / "x.jpg").read_bytes()[:700])
        return folder / "annotations.json"

    return copy
