"""Values checked by their annotations, and how a failed check reads."""

import json
from typing import Annotated, ClassVar, Literal, NotRequired

import numpy as np
import pytest
import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from typing_extensions import TypedDict

from cdetr_fast.common.validation import (
    Before,
    Bounds,
    Checked,
    Expected,
    NonNegativeInt,
    PositiveInt,
    Probability,
    checked,
    first_problem,
    refuse,
    unknown_keyword,
)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (PositiveInt, 3),
        (Probability, 0),
        (Probability, 0.5),
        (Literal["a", "b", None], None),
        (bool | None, None),
        (list[int], [1, 2]),
        (Annotated[str, Before(str)], "x"),
    ],
    ids=str,
)
def test_a_value_that_fits_is_returned_as_it_is(kind, value):
    found = checked(kind, value, "x")
    assert found == value
    assert type(found) is type(value)


def test_a_value_is_brought_into_the_form_of_its_type():
    assert type(checked(float, 2, "x")) is float
    assert checked(Annotated[list[int], Before(list)], (1, 2), "x") == [1, 2]
    for kind, value in ((PositiveInt, np.int64(3)), (Probability, np.float32(0.5))):
        assert type(checked(kind, value, "x")) is type(value.item())
    assert checked(PositiveInt, torch.tensor(3), "x") == 3
    with pytest.raises(TypeError, match="x: expected an integer >= 1, got True"):
        checked(PositiveInt, np.bool_(True), "x")


@pytest.mark.parametrize(
    ("kind", "value", "error", "message"),
    [
        (PositiveInt, 0, ValueError, "x: expected an integer >= 1, got 0"),
        (PositiveInt, True, TypeError, "x: expected an integer >= 1, got True"),
        (PositiveInt, "3", TypeError, "x: expected an integer >= 1, got '3'"),
        (PositiveInt, 3.0, TypeError, "x: expected an integer >= 1, got 3.0"),
        (NonNegativeInt | None, -1, ValueError, "x: expected an integer >= 0 or None, got -1"),
        (Probability, 1.5, ValueError, "x: expected a number in [0, 1], got 1.5"),
        (Probability, float("nan"), ValueError, "x: expected a number in [0, 1], got nan"),
        (Probability, True, TypeError, "x: expected a number in [0, 1], got True"),
        (float, float("inf"), ValueError, "x: expected a number, got inf"),
        (Annotated[int, Bounds(None, 4)], 5, ValueError, "x: expected an integer <= 4, got 5"),
        (Annotated[int, Field(gt=1, lt=4)], 4, ValueError, "x: expected an integer > 1 and < 4"),
        (Literal["a", "b"], "c", ValueError, "x: expected one of 'a', 'b', got 'c'"),
        (bool | None, 1, TypeError, "x: expected True or False or None, got 1"),
        (list[int], [1, "a"], TypeError, "x[1]: expected an integer, got 'a'"),
        (tuple[int, ...], 5, TypeError, "x: expected a list of integers, got 5"),
        (dict[str, int], [], TypeError, "x: expected a mapping, got []"),
        (
            Annotated[list[int], Expected("a pair")],
            [1, "a"],
            TypeError,
            "x: expected a pair, got [1, 'a']",
        ),
        (str, 5 * [10**50], TypeError, "..."),
    ],
    ids=str,
)
def test_a_value_that_does_not_fit(kind, value, error, message):
    with pytest.raises(error) as caught:
        checked(kind, value, "x")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 300
    assert caught.value.__cause__ is caught.value.__context__ is None


def _no_seven(value):
    if value == 7:
        raise ValueError("seven is taken")
    return value


def test_the_error_of_a_conversion_is_the_message():
    with pytest.raises(ValueError, match=r"^x: seven is taken$"):
        checked(Annotated[int, Before(_no_seven)], 7, "x")
    with pytest.raises(ValueError, match=r"^x: expected another number, got 7$"):
        checked(Annotated[int, Before(_no_seven), Expected("another number")], 7, "x")


class Settings(Checked):
    _prefix: ClassVar[str] = "settings."

    count: PositiveInt = 3
    names: Annotated[list[str], Before(list)]


def test_attributes_are_checked_when_they_are_set():
    settings = Settings()
    settings.names = ("a", "b")
    settings.other = object()
    assert settings.names == ["a", "b"]
    with pytest.raises(ValueError, match=r"^settings\.count: expected an integer >= 1, got 0$"):
        settings.count = 0
    assert settings.count == 3


class Annotation(TypedDict):
    id: int
    bbox: Annotated[list[float], Expected("[left, top, width, height]")]
    crowd: NotRequired[Literal[0, 1]]


class File(TypedDict):
    annotations: list[Annotation]


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        (
            {"id": 4, "bbox": [1, "a"]},
            "bbox: expected [left, top, width, height], got [1, 'a']",
        ),
        ({"id": 4}, "bbox: expected [left, top, width, height], got nothing"),
        ({"id": 4, "bbox": [], "crowd": 2}, "crowd: expected one of 0, 1, got 2"),
        (5, "expected a mapping, got 5"),
    ],
    ids=str,
)
def test_a_file_names_the_object_and_its_field(annotation, message):
    text = json.dumps({"annotations": [{"id": 1, "bbox": [1.5]}, annotation]})
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(File).validate_json(text)
    problem = first_problem(caught.value, File, json.loads(text))
    assert problem.path[:2] == ("annotations", 1)
    assert problem.line("a.json: annotation 4", skip=2) == f"a.json: annotation 4: {message}"


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    epochs: int = Field(5, ge=1)
    steps: PositiveInt | None = None
    optimizer: Annotation | None = None

    @model_validator(mode="after")
    def _fits(self):
        if self.steps == self.epochs:
            raise ValueError("steps: expected another number than epochs")
        return self


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 0}, "epochs: expected an integer >= 1, got 0"),
        ({"steps": "a"}, "steps: expected an integer >= 1 or None, got 'a'"),
        ({"epoch": 3}, "unknown field 'epoch'; did you mean 'epochs'?"),
        ({"steps": 5}, "steps: expected another number than epochs"),
        (
            {"optimizer": {"id": 1, "bbox": 5}},
            "optimizer.bbox: expected [left, top, width, height], got 5",
        ),
    ],
    ids=str,
)
def test_a_model_of_settings(fields, message):
    with pytest.raises(ValidationError) as caught:
        Model(**fields)
    assert first_problem(caught.value, Model, fields).line("a.yaml") == f"a.yaml: {message}"


def test_errors_without_a_type():
    with pytest.raises(TypeError, match=r"^x: expected a thing, got 5$"):
        refuse("x", "a thing", 5, TypeError)
    assert "unknown field 'epoch'; did you mean 'epochs'?" in str(
        unknown_keyword("Model", "epoch", Model.model_fields)
    )
