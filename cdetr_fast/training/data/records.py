"""Records of COCO and shard files: what their fields must be, and errors that name the record."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    GetCoreSchemaHandler,
    StrictBool,
    StrictFloat,
    StrictInt,
    ValidationError,
)

from cdetr_fast.common.validation import Expected, first_problem, shortened
from cdetr_fast.training.errors import DataError

if TYPE_CHECKING:
    from pydantic_core import CoreSchema

NO_ID = -1
"""Of objects whose annotation has no id."""

Record = TypeVar("Record", bound=BaseModel)


def _encodable(text: str) -> str:
    text.encode()  # half a surrogate pair cannot be written to a file
    return text


class _OneOf(NamedTuple):
    """Metadata of an `Annotated` type: the forms of its values in a file, tried in order.

    Attributes:
        forms: Union of types.
    """

    forms: Any

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return handler.generate_schema(Annotated[self.forms, Field(union_mode="left_to_right")])


# Some tools write 3.0 for 3. Integers are tried first, since fp64 holds 53 bits only.
_Int64 = Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)]
_IntegralFloat = Annotated[
    StrictFloat, Field(ge=-(2**63), lt=2**63, multiple_of=1), AfterValidator(int)
]
_ZeroOrOne = Annotated[StrictFloat, Field(ge=0, le=1, multiple_of=1), AfterValidator(bool)]
_WHOLE = _OneOf(_Int64 | _IntegralFloat)

Whole = Annotated[int, _WHOLE, Expected("a whole number")]
Pixels = Annotated[int, _WHOLE, Field(ge=-(2**31), lt=2**31), Expected("a whole number of pixels")]
Number = Annotated[StrictFloat, Expected("a number")]
Flag = Annotated[bool, _OneOf(StrictBool | _ZeroOrOne), Expected("0 or 1")]
Text = Annotated[str, Expected("text")]
Name = Annotated[str, AfterValidator(_encodable), Expected("text")]
Box = Annotated[
    tuple[StrictFloat, StrictFloat, StrictFloat, StrictFloat],
    Expected("[left, top, width, height] in pixels"),
]


class ImageRecord(BaseModel):
    """An image. COCO files have its size; where they do not, it is read from the image."""

    id: Whole
    file_name: Text
    height: Pixels = 0
    width: Pixels = 0


class Category(BaseModel):
    """A category; stuff has `isthing` 0."""

    id: Whole
    name: Name
    isthing: Flag = True
    supercategory: Any = None


class ObjectRecord(BaseModel):
    """Fields that annotations of objects and segments share."""

    id: Whole = NO_ID
    category_id: Whole
    bbox: Box
    area: Number = 0.0
    iscrowd: Flag = False


class Annotation(ObjectRecord):
    """An object of a detection file; its segmentation is checked only if masks are read."""

    image_id: Whole
    segmentation: Any = None


class Segment(ObjectRecord):
    """A segment of a panoptic file; its id says which pixels are its own."""

    id: Whole


class PanopticAnnotation(BaseModel):
    """The segments of an image."""

    image_id: Whole
    file_name: Text
    segments_info: Annotated[list[Any], Expected("a list")]


class ShardObject(BaseModel):
    """An object of an image in a shard."""

    category_id: Whole
    bbox: Box
    iscrowd: Flag = False


class ShardImage(BaseModel):
    """The JSON file beside an image in a shard."""

    image_id: Whole
    height: Annotated[StrictInt, Field(ge=1)]
    width: Annotated[StrictInt, Field(ge=1)]
    annotations: list[ShardObject]


class Shard(BaseModel):
    """A shard in the index of its set."""

    name: Text
    images: Whole
    objects: Whole


class ShardIndex(BaseModel):
    """The index of a set of shards."""

    categories: list[Category]
    shards: list[Shard]
    exif: Literal["upright", "stored"] = "upright"


def parsed_whole(kind: type[Record], content: Any, source: str, hint: str) -> Record:
    """Return the content of a JSON file as a record.

    Args:
        kind: Type of the record.
        content: What `json.loads` returns.
        source: The file, for messages.
        hint: What to do about an error.

    Raises:
        DataError: It is not such a record.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise DataError(f"{first_problem(error, kind, content).line(source)}; {hint}") from error


def parsed(kind: type[Record], items: Iterable[Any], source: str, what: str) -> Iterator[Record]:
    """Yield the records of a list in a JSON file.

    Each record is released before the next one is made: a list of all of them would double the
    memory that the file takes.

    Args:
        kind: Type of the records.
        items: The list, as `json.loads` returns it.
        source: File, or file and surrounding record, for messages.
        what: What a record is called in messages.

    Raises:
        DataError: An item is not such a record; the message names it by its id, or by its position
            if it has none.
    """
    validate = kind.__pydantic_validator__.validate_python
    for position, item in enumerate(items):
        try:
            record: Record = validate(item)
        except ValidationError as error:
            number = item.get("id") if isinstance(item, dict) else None
            if isinstance(number, bool) or not isinstance(number, int):
                number = f"at position {position} (from 0) of its list"
            problem = first_problem(error, kind, item)
            owner = item.get("image_id") if isinstance(item, dict) else None
            where = f"image {shortened(owner)}, " if owner is not None else ""
            raise DataError(
                f"{problem.line(f'{source}: {where}{what} {number}')}; correct the file"
            ) from error
        yield record
