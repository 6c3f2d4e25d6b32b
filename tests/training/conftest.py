"""Fixtures of the training tests."""

from support.training_settings import (  # noqa: F401 - fixtures
    damage,
    scenes,
    settings,
)
