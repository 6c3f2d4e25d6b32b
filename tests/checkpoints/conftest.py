"""Fixtures of the tests of checkpoints."""

from support.checkpoints import quiet, seed  # noqa: F401 - fixtures
