"""Fixtures of `training_settings`."""

import shutil

import pytest
from PIL import Image
from support.training_settings import short_run, write_scenes


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A folder with `train` (14 scenes) and `val` (5 scenes), 64 x 80 pixels."""
    return write_scenes(tmp_path_factory.mktemp("scenes"))


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


@pytest.fixture
def settings(scenes, tmp_path):
    """Settings of a run of two epochs with four steps each; keyword arguments change them."""

    def make(**changes):
        return short_run(scenes, tmp_path / "run") | changes

    return make
