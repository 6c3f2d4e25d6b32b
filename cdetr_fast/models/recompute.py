"""Gradient checkpointing: a layer whose activations are computed again in the backward pass."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

DEFAULT_OPTIONS: Mapping[str, Any] = {"use_reentrant": False}


def recompute(
    layer: Callable[..., Any], arguments: tuple[Any, ...], options: Mapping[str, Any]
) -> Any:
    """Call a layer, and keep its arguments alone for the backward pass.

    Args:
        layer: The layer.
        arguments: Of its call; tuples and dataclasses may hold tensors.
        options: Keywords of `torch.utils.checkpoint.checkpoint`.
    """
    if not options.get("use_reentrant"):
        return checkpoint(layer, *arguments, **options)
    # This form sees tensors that are arguments themselves alone, and would lose other gradients.
    tensors = list(_tensors_in(arguments))

    def call(*given: Tensor) -> Any:
        return layer(*_with_tensors(arguments, iter(given)))

    return checkpoint(call, *tensors, **options)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors_in(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors_in(getattr(value, field.name))


def _with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    """Return a copy of a value that holds other tensors, in the order of `_tensors_in`."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, tuple | list):
        items = [_with_tensors(item, tensors) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return dataclasses.replace(
            value, **{name: _with_tensors(getattr(value, name), tensors) for name in names}
        )
    return value
