"""Fixtures of the tests of OpenVINO as an engine."""

import pytest
import torch
from PIL import Image
from support.command_line import run as command_line  # noqa: F401 - a fixture
from support.openvino import random_model

from cdetr_fast import ConditionalDetrImageProcessor, optimize


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


@pytest.fixture
def checkpoint(model, tmp_path):
    """The model in a folder with its image processor, and an image beside it."""
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    size = {"shortest_edge": 64, "longest_edge": 96}
    ConditionalDetrImageProcessor(size=size).save_pretrained(folder)
    Image.radial_gradient("L").resize((60, 40)).convert("RGB").save(tmp_path / "a.png")
    return folder


@pytest.fixture
def run(command_line):  # noqa: F811
    """Runs `cdetr-fast` with arguments on the CPU."""
    return lambda *arguments: command_line(*arguments, "--device", "cpu")
