"""Checks of configuration fields: (name, value) -> the value to store, or an error.

The error is a TypeError or ValueError with the field's name, what was expected and what came.
"""

import math
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from cdetr_fast.common.suggestions import did_you_mean


def refuse(name: str, expected: str, value: Any, error: type[Exception] = ValueError) -> NoReturn:
    """Raises `name: expected ..., got ...`."""
    raise error(f"{name}: expected {expected}, got {value!r}")


def integer(low: int) -> Callable[[str, Any], int]:
    """An int (no bool) not below `low`."""
    expected = f"an integer >= {low}"

    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            refuse(name, expected, value, TypeError)
        if value < low:
            refuse(name, expected, value)
        return value

    return check


def number(low: float, high: float = math.inf) -> Callable[[str, Any], float]:
    """A finite int or float within bounds."""
    expected = f"a number >= {low:g}" if high == math.inf else f"a number in [{low:g}, {high:g}]"

    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            refuse(name, expected, value, TypeError)
        if not low <= value <= high or value == math.inf:
            refuse(name, expected, value)
        return value

    return check


def real(low: float, high: float = math.inf) -> Callable[[str, Any], float]:
    """Like `number`, stored as float: transformers' strict fields of type float refuse an int."""
    check = number(low, high)
    return lambda name, value: float(check(name, value))


def weight(name: str, value: Any) -> float:
    """A loss or cost weight; 2.0 is stored as 2, because transformers 5 types these fields int."""
    value = number(0)(name, value)
    return int(value) if value == int(value) else value


def flag(name: str, value: Any) -> bool:
    """A bool."""
    if not isinstance(value, bool):
        refuse(name, "True or False", value, TypeError)
    return value


def choice(*allowed: Any) -> Callable[[str, Any], Any]:
    """One of a few values."""

    def check(name: str, value: Any) -> Any:
        if value not in allowed:
            refuse(name, "one of " + ", ".join(map(repr, allowed)), value)
        return value

    return check


def text(name: str, value: Any) -> str:
    """A string."""
    if not isinstance(value, str):
        refuse(name, "a string", value, TypeError)
    return value


def list_of(kind: type, expected: str) -> Callable[[str, Any], list]:
    """A list (a tuple becomes one) of items of one type."""

    def check(name: str, value: Any) -> list:
        if not isinstance(value, list | tuple) or not all(type(item) is kind for item in value):
            refuse(name, expected, value, TypeError)
        return list(value)

    return check


def optional(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    """None, or what another check takes."""
    return lambda name, value: None if value is None else check(name, value)


def dtype(name: str, value: Any) -> torch.dtype:
    """A torch dtype, or its name."""
    resolved = value
    if isinstance(value, str):
        resolved = getattr(torch, value.removeprefix("torch."), None)
    if not isinstance(resolved, torch.dtype):
        refuse(name, "a torch dtype or its name", value)
    return resolved


def labels_by_id(name: str, value: Any) -> dict[int, str]:
    """Class names by index; JSON makes the indices strings."""
    try:
        return {int(index): label for index, label in value.items()}
    except (AttributeError, TypeError, ValueError):
        refuse(name, "a dict of class index to class name", value, TypeError)


def ids_by_label(name: str, value: Any) -> dict[str, int]:
    """Class indices by name."""
    try:
        return {label: int(index) for label, index in value.items()}
    except (AttributeError, TypeError, ValueError):
        refuse(name, "a dict of class name to class index", value, TypeError)


def unknown_keyword(owner: str, name: str, known: list[str]) -> TypeError:
    """Makes the error for an unknown keyword, with the closest known one."""
    return TypeError(f"{owner}: unknown field {name!r}{did_you_mean(name, known)}")
