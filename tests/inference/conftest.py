"""Fixtures of the tests of inference."""

import pytest
import torch
from support.oracle import padded_images, random_model


@pytest.fixture
def model():
    """A detection model with random weights, in evaluation mode."""
    return random_model()


@pytest.fixture
def images():
    """Two padded images and their mask."""
    return padded_images()


@pytest.fixture
def no_gradients():
    """The test runs without gradients."""
    with torch.no_grad():
        yield
