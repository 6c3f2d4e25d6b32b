"""Memory that the largest maps of a backbone are written to in every call."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

# Below, freed memory is found again by the next call. Above, glibc gives much of it back to the
# system, and its pages are new in each call, which takes longer than to fill it with zeros.
_SMALLEST = 2**22
# Memory that is kept costs, too.
_LARGEST = 2**29
_VIEWS = 256


class Workspace(threading.local):
    """Numbered pieces of memory, of each thread its own, as large as was ever asked for.

    Copies and pickles are empty.
    """

    def __init__(self) -> None:
        self.pieces: dict[int, Tensor] = {}
        self._maps: dict[tuple[object, ...], Tensor] = {}  # views of the pieces

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Workspace, ()

    def zeros(self, slot: int, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
        """Return a channels-last map of zeros; the one before in that slot is overwritten."""
        return self.empty(slot, shape, dtype).zero_()

    def empty(self, slot: int, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
        """Return a channels-last map of any numbers; it shares its memory with the one before."""
        view = self._maps.get((slot, shape, dtype))
        if view is None:
            with torch.inference_mode(False):
                view = self._make(slot, shape, dtype)
        return view

    def _make(self, slot: int, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
        size_in_bytes = math.prod(shape) * dtype.itemsize
        piece = self.pieces.get(slot)
        if piece is None or piece.numel() < size_in_bytes:
            self._maps = {key: view for key, view in self._maps.items() if key[0] != slot}
            self.pieces.pop(slot, None)  # the memory goes before the new one comes
            piece = self.pieces[slot] = torch.empty(size_in_bytes, dtype=torch.uint8, device="cpu")
        if len(self._maps) == _VIEWS:
            self._maps.clear()
        batch, channels, height, width = shape
        flat = piece[:size_in_bytes].view(dtype)
        view = flat.view(batch, height, width, channels).permute(0, 3, 1, 2)
        self._maps[slot, shape, dtype] = view
        return view


def worth_keeping(shape: tuple[int, int, int, int], dtype: torch.dtype) -> bool:
    """Return whether a map is of a size that `Workspace` is for."""
    return _SMALLEST <= math.prod(shape) * dtype.itemsize <= _LARGEST
