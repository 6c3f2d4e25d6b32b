"""Fixtures of the tests that train by commands."""

from support.training_settings import scenes, settings  # noqa: F401 - fixtures
