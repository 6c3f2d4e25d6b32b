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


class Workspace(threading.local):
    """Numbered pieces of memory, of each thread its own, as large as was ever asked for.

    Copies and pickles are empty.
    """

    def __init__(self) -> None:
        self.pieces: dict[int, Tensor] = {}

    def __reduce__(self) -> tuple:
        return Workspace, ()

    def zeros(self, slot: int, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
        """Returns a channels-last map of zeros; the one before in that slot is overwritten."""
        size = math.prod(shape)
        size_in_bytes = size * dtype.itemsize
        piece = self.pieces.get(slot)
        if piece is None or piece.numel() < size_in_bytes:
            self.pieces.pop(slot, None)  # frees it first
            with torch.inference_mode(False):
                piece = self.pieces[slot] = torch.empty(size_in_bytes, dtype=torch.uint8)
        batch, channels, height, width = shape
        flat = piece[:size_in_bytes].view(dtype).zero_()
        return flat.view(batch, height, width, channels).permute(0, 3, 1, 2)


def worth_keeping(shape: tuple[int, int, int, int], dtype: torch.dtype) -> bool:
    """Whether a map is of a size that `Workspace` is for."""
    return _SMALLEST <= math.prod(shape) * dtype.itemsize <= _LARGEST
