"""Choice of the tile that a kernel runs with, by architecture, precision and width of a head.

Nothing is tuned at the first call: the choice is an entry of `tiles`.
"""

import functools

from cdetr_kernels.gpu.tiles import TILES, Tile

KERNELS = (
    "forward",
    "backward_queries",
    "backward_keys",
    "attention_map",
    "separable_forward",
    "separable_backward_queries",
    "separable_backward_keys",
    "separable_attention_map",
)
# The wider of a head's half and its value, padded to a power of two, falls into one of these.
WIDTHS = (32, 64, 128)
# sm_80's tiles fit into the 99 KiB of shared memory that the consumer chips have.
_STAND_INS = {"sm_89": "sm_86", "sm_103": "sm_100", "gfx950": "gfx942", "gfx90a": "gfx942"}
# Ends the name of a kernel in a record where its tile is that of calls with many rows.
MANY = " many"
# Small, so that small inputs have several tiles.
_INTERPRETED = Tile(32, 32)


@functools.lru_cache
def tile(kernel: str, architecture: str, precision: str, size: int) -> Tile:
    """Return the tile of a kernel, that of the nearest architecture where it has no entry.

    Args:
        kernel: One of `KERNELS`.
        architecture: As `launching.architecture` returns it.
        precision: "half", "tf32" or "ieee".
        size: The wider of a head's half and its value, at most 128.
    """
    if architecture == "interpreter":
        return _INTERPRETED
    entry = precision, width(size), kernel
    architecture = _STAND_INS.get(architecture, architecture)
    if (architecture, *entry) not in TILES:
        architecture = "gfx942" if architecture.startswith("gfx") else "sm_80"
    return TILES[(architecture, *entry)]


def width(size: int) -> int:
    """Return the class of a head's size: the smallest of `WIDTHS` that holds it."""
    return next(width for width in WIDTHS if size <= width)


def is_borrowed(architecture: str, tile: Tile) -> bool:
    """Return whether the table has no such tile for an architecture."""
    return not any(name == architecture and x == tile for (name, *_), x in TILES.items())


def padded(size: int) -> int:
    """Return the power of two, 16 at least, into which tensor cores take a head of `size`."""
    return max(16, 1 << (size - 1).bit_length())


def places(tile_keys: int, line: int) -> int:
    """Return how many places of a line of the map a tile has, `tile_keys` at most."""
    return min(tile_keys, padded(line))


def rows_are_lines(height: int, width: int, tile_keys: int) -> bool:
    """Return whether tiles are rows of the map: rows or columns, which fill more of their tiles."""

    def positions(lines: int, line: int) -> int:
        tile = places(tile_keys, line)
        return lines * -(-line // tile) * tile

    return positions(height, width) <= positions(width, height)


def fills(rows: int, multiprocessors: int) -> bool:
    """Return whether rows of queries (or keys) of all heads are a large tile for every program.

    Calls with so many rows have tiles of their own in records, under `MANY`.
    """
    return rows >= 128 * multiprocessors


def parts(
    programs: int, tiles_of_keys: int, multiprocessors: int, fill: int = 1, depth: int = 8
) -> int:
    """Return into how many parts the keys are split, 1 where the programs fill the chip.

    The table's `fill` and `depth` are modelled, not measured: a tile takes a quarter of a
    microsecond, and the merge that a split needs two.
    """
    most = max(1, min(fill * multiprocessors // max(programs, 1), tiles_of_keys // depth))
    # As many as there are with equal parts: none has nothing to do.
    return most if most == 1 else -(-tiles_of_keys // -(-tiles_of_keys // most))
