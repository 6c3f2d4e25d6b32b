"""Fixtures of the tests with transformers."""

import pytest

import cdetr_fast


@pytest.fixture
def unpatched():
    """After the test transformers is as it was."""
    yield
    cdetr_fast.unpatch_transformers()
