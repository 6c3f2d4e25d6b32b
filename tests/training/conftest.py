"""Fixtures of the training tests."""

from support.command_line import run  # noqa: F401 - a fixture
from support.training_settings import (  # noqa: F401 - fixtures
    damage,
    scenes,
    settings,
)
