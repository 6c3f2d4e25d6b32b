"""Fields of JSON objects that others wrote: of the kind they have to be, or a `DataError`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from cdetr_fast.training.errors import DataError

_REQUIRED = object()
_SHOWN = 200  # characters of a wrong value


class Kind(NamedTuple):
    """A kind of value.

    Attributes:
        expected: What it is, for messages.
        read: Returns a value in this kind; ValueError, TypeError or OverflowError for others.
    """

    expected: str
    read: Callable[[Any], Any]


class Place(NamedTuple):
    """Where an object is.

    Attributes:
        file: The file, and the object around this one if there is one.
        what: What it is: "annotation".
        position: In its list, from 0.
    """

    file: str
    what: str
    position: int

    def describe(self, item: Any) -> str:
        """Returns the object's file and id, or its position if it has no id."""
        number = item.get("id") if isinstance(item, dict) else None
        if isinstance(number, int) and not isinstance(number, bool):
            return f"{self.file}: {self.what} {number}"
        return f"{self.file}: {self.what} at position {self.position} (from 0) of its list"


def read_field(item: Any, key: str, kind: Kind, place: Place, default: Any = _REQUIRED) -> Any:
    """Returns a field of an object in a JSON file.

    Args:
        item: The object, as JSON has it.
        key: Of the field.
        kind: What the value has to be.
        place: Where the object is.
        default: For an object without the field; if not given, that is an error.

    Raises:
        DataError: `item` is no object, or has no such field, or one of another kind.
    """
    try:
        value = item[key]
    except (KeyError, TypeError) as error:
        if isinstance(item, dict) and default is not _REQUIRED:
            return default
        raise DataError(
            f"{place.describe(item)}: expected an object with the key {key!r}, got {_short(item)}"
        ) from error
    try:
        return kind.read(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(
            f"{place.describe(item)}: {key}: expected {kind.expected}, got {_short(value)}; "
            "correct the file"
        ) from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _whole(value: Any, limit: int = 2**63) -> int:
    number = int(value) if type(value) is float and value.is_integer() else value
    if type(number) is not int or not -limit <= number < limit:
        raise ValueError
    return number


def _number(value: Any) -> float:
    if type(value) is not float and type(value) is not int:
        raise TypeError
    return float(value)


def _box(value: Any) -> list[float]:
    if type(value) is not list or len(value) != 4:
        raise TypeError
    return [_number(number) for number in value]


def _flag(value: Any) -> bool:
    if value not in (0, 1):
        raise ValueError
    return bool(value)


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError
    return value


def _name(value: Any) -> str:
    _text(value).encode()  # half a surrogate pair cannot be written to a file
    return value


def _list(value: Any) -> list:
    if type(value) is not list:
        raise TypeError
    return value


WHOLE = Kind("a whole number", _whole)
PIXELS = Kind("a whole number of pixels", lambda value: _whole(value, 2**31))
NUMBER = Kind("a number", _number)
BOX = Kind("[left, top, width, height] in pixels", _box)
FLAG = Kind("0 or 1", _flag)
TEXT = Kind("text", _text)
NAME = Kind("text", _name)
LIST = Kind("a list", _list)
