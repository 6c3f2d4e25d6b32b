"""Tile sizes of the kernels, by architecture, precision and width of a head.

Nothing is tuned at the first call. The entries are derived from the resource reports that
`python -m benchmarks.audit` prints, not from timings: no GPU has run them yet.
"""

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """Shape of the tiles of one kernel, and the budgets that the audit holds it to.

    Args:
        queries: Queries in a tile.
        keys: Keys in a tile.
        warps: Warps of a program.
        stages: Depth of the software pipeline.
        registers: Most registers of a thread.
        shared: Most KiB of shared memory.
    """

    queries: int
    keys: int
    warps: int = 4
    stages: int = 2
    registers: int = 255
    shared: int = 99


# The wider of a head's half and its value, padded to a power of two, falls into one of these.
WIDTHS = (32, 64, 128)
_FORWARD, _QUERIES, _KEYS, _MAP = "forward", "backward_queries", "backward_keys", "attention_map"
KERNELS = (_FORWARD, _QUERIES, _KEYS, _MAP)

_AMPERE = {
    ("half", 32): {
        _FORWARD: Tile(64, 64, 4, 3),
        _QUERIES: Tile(64, 64, 4, 2),
        _KEYS: Tile(64, 64, 4, 2),
        _MAP: Tile(64, 64, 4, 1),
    },
    ("half", 64): {
        _FORWARD: Tile(64, 64, 4, 2),
        _QUERIES: Tile(64, 32, 4, 2),
        _KEYS: Tile(32, 64, 4, 2),
        _MAP: Tile(64, 64, 4, 1),
    },
    ("half", 128): {
        _FORWARD: Tile(64, 32, 4, 2),
        _QUERIES: Tile(64, 32, 8, 2),
        _KEYS: Tile(32, 64, 8, 2),
        _MAP: Tile(64, 64, 4, 1),
    },
    ("tf32", 32): {
        _FORWARD: Tile(64, 32, 4, 2),
        _QUERIES: Tile(64, 32, 4, 2),
        _KEYS: Tile(32, 64, 4, 2),
        _MAP: Tile(64, 64, 4, 1),
    },
    ("tf32", 64): {
        _FORWARD: Tile(64, 32, 4, 2),
        _QUERIES: Tile(64, 32, 4, 2),
        _KEYS: Tile(32, 64, 4, 2),
        _MAP: Tile(64, 32, 4, 1),
    },
    ("tf32", 128): {
        _FORWARD: Tile(64, 32, 8, 1),
        _QUERIES: Tile(64, 32, 8, 1),
        _KEYS: Tile(32, 64, 8, 1),
        _MAP: Tile(64, 32, 8, 1),
    },
    ("ieee", 32): {
        _FORWARD: Tile(32, 32, 4, 2),
        _QUERIES: Tile(32, 32, 4, 2),
        _KEYS: Tile(32, 32, 4, 2),
        _MAP: Tile(32, 32, 4, 1),
    },
    ("ieee", 64): {
        _FORWARD: Tile(32, 32, 4, 2),
        _QUERIES: Tile(32, 32, 4, 2),
        _KEYS: Tile(32, 32, 4, 2),
        _MAP: Tile(32, 32, 4, 1),
    },
    ("ieee", 128): {
        _FORWARD: Tile(32, 32, 8, 1),
        _QUERIES: Tile(32, 32, 8, 1),
        _KEYS: Tile(32, 32, 8, 1),
        _MAP: Tile(32, 32, 8, 1),
    },
}
# Small tiles, so that small inputs have several of them.
_INTERPRETER = dict.fromkeys(KERNELS, Tile(32, 32))

TABLE = {
    "sm_80": _AMPERE,
    "sm_90": _AMPERE,
    "sm_100": _AMPERE,
    "gfx942": _AMPERE,
    "interpreter": {key: _INTERPRETER for key in _AMPERE},
}
# sm_80's entries fit into the 99 KiB of shared memory that the consumer chips have.
_STAND_INS = {"sm_103": "sm_100", "gfx950": "gfx942", "gfx90a": "gfx942"}
_DEFAULT = "sm_80"


@functools.lru_cache
def tile(kernel: str, architecture: str, dtype: torch.dtype, precision: str, size: int) -> Tile:
    """Returns the tile of a kernel for heads of `size`; the nearest entry where there is none."""
    entries = TABLE.get(_STAND_INS.get(architecture, architecture), TABLE[_DEFAULT])
    precision = precision if dtype == torch.float32 else "half"
    return entries[precision, next(width for width in WIDTHS if size <= width)][kernel]


def padded(size: int) -> int:
    """Returns the power of two, 16 at least, into which tensor cores take a head of `size`."""
    return max(16, 1 << (size - 1).bit_length())


def parts(programs: int, tiles_of_keys: int, multiprocessors: int) -> int:
    """Returns into how many parts the keys are split, 1 where the programs fill the chip.

    A part has eight tiles at least. Modelled, not measured: a tile takes a quarter of a
    microsecond, and the merge that a split needs two.
    """
    return max(1, min(multiprocessors // max(programs, 1), tiles_of_keys // 8))
