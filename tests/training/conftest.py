"""Fixtures of the training tests."""

from support.training_settings import damage, scenes, settings  # noqa: F401 - fixtures
