"""Checks of values by their type annotations, through pydantic, with one-line errors.

A type in `Annotated` form says what a value has to be; pydantic checks it, and an error names the
field, what was expected and what came. pydantic is imported with the first value that is checked:
it takes 0.1 s, which `import cdetr_fast` and reading the classes of models need not wait for.

One value, such as an argument:

    checked(PositiveInt, batch_size, "batch_size")
    # ValueError: batch_size: expected an integer >= 1, got 0

A class that checks what is assigned to its attributes: derive it from `Checked`.

A whole file, by a pydantic model, dataclass or TypedDict of your own:

    try:
        content = TypeAdapter(CocoFile).validate_json(text)
    except ValidationError as error:
        problem = first_problem(error, CocoFile, json.loads(text))
        # problem.path: ("annotations", 17, "bbox"); the text of `bbox` from its `Expected`
        raise DataError(problem.line(f"{path}: annotation {number}", skip=2)) from error
        # DataError: a.json: annotation 4711: bbox: expected [left, top, ...], got [1, 2]

`first_problem` takes the words from the annotation (see `describe`), so that the type is the only
place that says what is expected. Unknown fields (of models with extra="forbid") come with the
closest known name.
"""

import difflib
import functools
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import get_annotations
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    NoReturn,
    NotRequired,
    Required,
)

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler, TypeAdapter, ValidationError
    from pydantic_core import CoreSchema

_SHOWN = 200  # characters of a wrong value


class Expected(NamedTuple):
    """Metadata of an `Annotated` type: what errors say is expected.

    Errors inside such a value (an item of a list) are reported for the value as a whole.

    Attributes:
        text: Follows the word "expected", as in "[left, top, width, height] in pixels".
    """

    text: str


class Bounds(NamedTuple):
    """Metadata of an `Annotated` type: smallest and largest value; None for no limit.

    It is pydantic's `Field(ge=..., le=...)`, without importing pydantic.
    """

    ge: float | None
    le: float | None = None

    def __get_pydantic_core_schema__(
        self, source: Any, handler: "GetCoreSchemaHandler"
    ) -> "CoreSchema":
        from pydantic import Field

        return handler.generate_schema(Annotated[source, Field(ge=self.ge, le=self.le)])


class Before(NamedTuple):
    """Metadata of an `Annotated` type: converts a value before it is checked.

    It is pydantic's `BeforeValidator`, without importing pydantic.

    Attributes:
        convert: Returns the value to check; a ValueError from it is an error of the value.
    """

    convert: Callable[[Any], Any]

    def __get_pydantic_core_schema__(
        self, source: Any, handler: "GetCoreSchemaHandler"
    ) -> "CoreSchema":
        from pydantic_core import core_schema

        return core_schema.no_info_before_validator_function(self.convert, handler(source))


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


PositiveInt = Annotated[int, Bounds(1)]
NonNegativeInt = Annotated[int, Bounds(0)]
Probability = Annotated[float | int, Bounds(0, 1)]
IntList = Annotated[list[int], Before(_as_list)]
StrList = Annotated[list[str], Before(_as_list)]


class Problem(NamedTuple):
    """The first thing that is wrong with a value.

    Attributes:
        path: Keys and positions that lead from the value to the wrong part of it.
        text: "expected ..., got ...", or what else is wrong.
        is_type_error: Whether the type is wrong, and not the value.
    """

    path: tuple[str | int, ...]
    text: str
    is_type_error: bool

    def line(self, source: str = "", skip: int = 0) -> str:
        """Return "source: path: text".

        Args:
            source: File or object, or the name of an argument.
            skip: Leading parts of `path` that `source` covers.
        """
        name = ""
        for part in self.path[skip:]:
            name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
        return ": ".join(part for part in (source, name, self.text) if part)


def checked(kind: Any, value: Any, name: str) -> Any:
    """Return a value in the form that its type gives it.

    Numbers, strings and booleans are not converted into each other, and numbers are finite. Scalars
    of numpy and torch count as Python's.

    Args:
        kind: Type, with bounds and the like as `Annotated` metadata.
        value: What is checked.
        name: Of the argument or field, for the message.

    Raises:
        TypeError: The value, or a part of it, has another type.
        ValueError: The value is out of range.
    """
    adapter, invalid = _adapter(kind)
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    try:
        return adapter.validate_python(value)
    except invalid as error:
        problem = first_problem(error, kind, value)
    line = problem._replace(path=(name, *problem.path)).line()
    raise (TypeError if problem.is_type_error else ValueError)(line)


@functools.cache
def _adapter(kind: Any) -> "tuple[TypeAdapter[Any], type[ValidationError]]":
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    config = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    return TypeAdapter(kind, config=config), ValidationError


class Checked:
    """Base of a class whose annotated attributes are checked when they are set.

    Attributes without an annotation are stored as they come.
    """

    _prefix: ClassVar[str] = ""  # of the attributes' names in errors

    def __setattr__(self, name: str, value: Any) -> None:
        kind = field_types(type(self)).get(name)  # type: ignore[arg-type]  # mypy issue 11470
        if kind is not None:
            value = checked(kind, value, self._prefix + name)
        object.__setattr__(self, name, value)


@functools.cache
def field_types(owner: type) -> dict[str, Any]:
    """Return the annotated types of a class's fields, in their order; class variables excepted."""
    if issubclass(owner, Checked):
        # Without the annotations of bases that it has besides.
        bases = [base for base in reversed(owner.__mro__) if issubclass(base, Checked)]
        hints = {k: v for base in bases for k, v in get_annotations(base, eval_str=True).items()}
    else:
        hints = typing.get_type_hints(owner, include_extras=True)
    hints = {k: v for k, v in hints.items() if ClassVar not in (v, typing.get_origin(v))}
    for name, kind in hints.items():
        if typing.get_origin(kind) in (NotRequired, Required):  # of a TypedDict
            hints[name] = typing.get_args(kind)[0]
    # Bounds that are given as `= Field(ge=1)` are not in the annotation.
    for name, field in getattr(owner, "model_fields", {}).items():
        for extra in field.metadata:
            if extra not in getattr(hints[name], "__metadata__", ()):
                hints[name] = Annotated[hints[name], extra]
    return hints


def first_problem(error: "ValidationError", kind: Any, value: Any) -> Problem:
    """Return the first thing that pydantic found wrong.

    Args:
        error: What pydantic raised.
        kind: The type that was checked.
        value: The value that was checked; for JSON text, what `json.loads` makes of it.
    """
    first = error.errors(include_url=False)[0]
    error_type, location = first["type"], first["loc"]
    path: list[str | int] = []
    for part in location:
        inner = _type_of_part(kind, part)
        if inner is None:  # the name of a member of a union, or of a validator
            break
        if error_type == "extra_forbidden" and part == location[-1]:
            break
        path.append(part)
        kind = inner
        value = _part(value, part)
    if error_type == "extra_forbidden":
        name = str(location[-1])
        text = f"unknown field {name!r}{did_you_mean(name, field_types(_plain(kind)))}"
        return Problem(tuple(path), text, is_type_error=True)
    message = str(first["ctx"]["error"]) if error_type == "value_error" else ""
    if message and _explicit(kind) is None:
        return Problem(tuple(path), message, is_type_error=False)
    is_missing = error_type == "missing" and len(path) == len(location)
    got = "nothing" if is_missing else shortened(value)
    is_type_error = error_type.endswith("_type") or error_type == "is_instance_of"
    return Problem(tuple(path), f"expected {describe(kind)}, got {got}", is_type_error)


def _plain(kind: Any) -> Any:
    """Return a type without its metadata."""
    return kind.__origin__ if hasattr(kind, "__metadata__") else kind


def _explicit(kind: Any) -> str | None:
    """Return the text of a type's `Expected`."""
    metadata = getattr(kind, "__metadata__", ())
    return next((entry.text for entry in metadata if isinstance(entry, Expected)), None)


def _type_of_part(kind: Any, part: str | int) -> Any:
    """Return the type of a field or an item; None at a type that errors describe as a whole."""
    if _explicit(kind) is not None:
        return None
    kind = _plain(kind)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        others = [argument for argument in arguments if argument is not types.NoneType]
        return _type_of_part(others[0], part) if len(others) == 1 else None
    if isinstance(origin, type) and issubclass(origin, Mapping) and arguments:
        return arguments[1]
    if isinstance(origin, type) and issubclass(origin, Sequence) and arguments:
        fixed = origin is tuple and arguments[-1] is not ...
        return arguments[int(part)] if fixed else arguments[0]
    return field_types(kind).get(str(part), Any) if isinstance(kind, type) else None


def _part(value: Any, part: str | int) -> Any:
    """Return a field or an item of a value; None where it has none."""
    try:
        return value[part]
    except (KeyError, IndexError, TypeError):
        return getattr(value, str(part), None)


_NOUNS = {
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    str: ("a string", "strings"),
    bool: ("True or False", "booleans"),
    types.NoneType: ("None", "None"),
}


def describe(kind: Any) -> str:
    """Return what a type expects, as "an integer >= 1" or "a list of strings or None"."""
    explicit = _explicit(kind)
    if explicit is not None:
        return explicit
    metadata = getattr(kind, "__metadata__", ())
    kind = _plain(kind)
    if kind in _NOUNS:
        text = _NOUNS[kind][0]
    elif kind == float | int:
        text = _NOUNS[float][0]
    elif typing.get_origin(kind) is Literal:
        text = "one of " + ", ".join(map(repr, typing.get_args(kind)))
    elif typing.get_origin(kind) in (types.UnionType, typing.Union):
        text = " or ".join(describe(argument) for argument in typing.get_args(kind))
    else:
        text = _describe_container(kind)
    return text + _describe_bounds(metadata)


def _describe_container(kind: Any) -> str:
    origin = typing.get_origin(kind) or kind
    if not isinstance(origin, type):
        return str(kind)
    if (
        issubclass(origin, Mapping)
        or typing.is_typeddict(origin)
        or hasattr(origin, "model_fields")
    ):
        return "a mapping"
    if issubclass(origin, Sequence):
        item = _plain(next(iter(typing.get_args(kind)), None))
        return f"a list of {_NOUNS[item][1]}" if item in _NOUNS else "a list"
    return f"a {origin.__name__}"


def _describe_bounds(metadata: Iterable[Any]) -> str:
    limits = {}
    for entry in metadata:
        for part in (entry, *getattr(entry, "metadata", ())):  # pydantic's Field has parts
            for name in ("ge", "gt", "le", "lt"):
                if getattr(part, name, None) is not None:
                    limits[name] = getattr(part, name)
    if limits.keys() == {"ge", "le"}:
        return f" in [{limits['ge']}, {limits['le']}]"
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    return " and".join(f" {signs[name]} {limit}" for name, limit in limits.items())


def shortened(value: Any) -> str:
    """Return the repr of a value, cut off where it gets long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean ...?" with the closest known name, or "" if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def refuse(name: str, expected: str, value: Any, error: type[Exception] = ValueError) -> NoReturn:
    """Raise "name: expected ..., got ..."."""
    raise error(f"{name}: expected {expected}, got {shortened(value)}")


def unknown_keyword(owner: str, name: str, known: Iterable[str]) -> TypeError:
    """Return the error for an unknown keyword, with the closest known one."""
    return TypeError(f"{owner}: unknown field {name!r}{did_you_mean(name, known)}")
