"""Fixtures of the tests of commands."""

from support.command_line import run  # noqa: F401 - a fixture
from support.training_settings import scenes, settings  # noqa: F401 - fixtures
