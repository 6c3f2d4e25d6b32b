"""Guards around what kernels write, and poison around what they read."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

GUARD = 4096  # elements on both sides
MARKS = {True: 12345.0, False: 123}  # what guards hold, in floating point or not


class Guarded:
    """Stand-in for `Tensor.new_empty` and `torch.empty_like`: NaN inside, marks around."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []

    def empty(
        self, like: Tensor, shape: Sequence[Any], dtype: torch.dtype | None = None, **_: Any
    ) -> Tensor:
        """Return memory for `shape` between guards."""
        sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        dtype = dtype or like.dtype
        count = math.prod(sizes)
        mark = MARKS[dtype.is_floating_point]
        buffer = torch.full((count + 2 * GUARD,), mark, dtype=dtype, device=like.device)
        inside = buffer[GUARD : GUARD + count]
        if dtype.is_floating_point:
            inside.fill_(math.nan)
        self.buffers.append(buffer)
        return inside.view(tuple(sizes))

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Make launchers allocate from here."""
        with (
            mock.patch.object(Tensor, "new_empty", lambda x, *s, **o: self.empty(x, s, **o)),
            mock.patch.object(torch, "empty_like", lambda x, **o: self.empty(x, x.shape, **o)),
        ):
            yield

    def complaint(self) -> str | None:
        """Return what happened to the guards or was left unwritten, None if all is well."""
        for buffer in self.buffers:
            mark = buffer.new_tensor(MARKS[buffer.dtype.is_floating_point])
            if not bool((buffer[:GUARD] == mark).all() & (buffer[-GUARD:] == mark).all()):
                return "writes outside of its memory"
            if bool(buffer.isnan().any()):
                return "leaves a part of its memory unwritten"
        return None


def scattered(
    x: Tensor, order: tuple[int, ...] | None = None, step: int = 2, offset: int = 1
) -> Tensor:
    """Return a tensor equal to x, with poison between and around its elements.

    Args:
        x: The values.
        order: Axes in the order of their storage; None reverses them.
        step: Distance of neighbours.
        offset: Elements before the first one.
    """
    order = tuple(reversed(range(x.ndim))) if order is None else order
    shape = [x.shape[axis] for axis in order]
    # Largest where it can be read as a number of anything, so that an index would be out of range.
    fill = {torch.bool: True, torch.int64: -1, torch.uint8: 255}.get(x.dtype, math.nan)
    buffer = torch.full(
        [*(size + 2 for size in shape[:-1]), (shape[-1] + 2) * step + offset],
        fill,
        dtype=x.dtype,
        device=x.device,
    )
    view = buffer[tuple(slice(1, size + 1) for size in shape[:-1])]
    view = view[..., offset : offset + shape[-1] * step : step]
    view = view.permute([order.index(axis) for axis in range(x.ndim)])
    return view.copy_(x)
