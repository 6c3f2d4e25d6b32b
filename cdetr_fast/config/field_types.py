"""Types of a model's fields, with what is converted before they are checked."""

from typing import Annotated, Any

import torch

from cdetr_fast.common.validation import Before, Bounds, Expected


def _dtype_named(value: Any) -> Any:
    """Return the torch dtype of a name; other values as they are."""
    if not isinstance(value, str):
        return value
    named = getattr(torch, value.removeprefix("torch."), None)
    if not isinstance(named, torch.dtype):
        raise ValueError
    return named


def _integral_as_int(value: Any) -> Any:
    """Return 2.0 as 2; other values as they are."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _with_int_keys(value: Any) -> Any:
    """Return a dict with indices as integers, which JSON makes strings."""
    try:
        return {int(index): label for index, label in value.items()}
    except (AttributeError, TypeError, ValueError):
        return value


def _with_int_values(value: Any) -> Any:
    try:
        return {label: int(index) for label, index in value.items()}
    except (AttributeError, TypeError, ValueError):
        return value


Dtype = Annotated[torch.dtype, Before(_dtype_named), Expected("a torch dtype or its name")]
# A loss or cost weight; 2.0 is stored as 2, because transformers 5 types these fields int.
Weight = Annotated[float | int, Before(_integral_as_int), Bounds(0)]
# transformers 5 types these float, and refuses an int.
NonNegativeFloat = Annotated[float, Bounds(0)]
LabelsById = Annotated[
    dict[int, str], Before(_with_int_keys), Expected("a dict of class index to class name")
]
IdsByLabel = Annotated[
    dict[str, int], Before(_with_int_values), Expected("a dict of class name to class index")
]
