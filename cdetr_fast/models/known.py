"""Modules of a known class, where torch's containers and annotations only say `Module`."""

from collections.abc import Iterable
from typing import TypeVar

from torch import nn

Known = TypeVar("Known", bound=nn.Module)


def known(module: object, cls: type[Known]) -> Known:
    """Return a module that has to be of a class.

    Raises:
        TypeError: It is not.
    """
    if not isinstance(module, cls):
        raise TypeError(f"expected a {cls.__name__}, got a {type(module).__name__}")
    return module


def all_known(modules: Iterable[object], cls: type[Known]) -> list[Known]:
    """Return modules that all have to be of a class."""
    return [known(module, cls) for module in modules]


def become(module: nn.Module, cls: type[Known]) -> Known:
    """Make a module one of a class that is derived from its own, in place, and return it."""
    module.__class__ = cls
    return known(module, cls)
