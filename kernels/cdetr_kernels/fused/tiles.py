"""Tiles of the kernels of conditional attention, one line each.

Derived from the resource reports of `python -m benchmarks.audit`, not from timings: no GPU has run
them yet. Chosen so that nothing spills, two programs or more fit on a multiprocessor where heads
are narrow, and the tensor cores' widest instruction is used. The budgets are what triton 3.9 needs,
with some slack for other versions.
"""

from dataclasses import dataclass


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
        spills: Most bytes and instructions of local memory.
    """

    queries: int
    keys: int
    warps: int = 4
    stages: int = 2
    registers: int = 255
    shared: int = 99
    spills: int = 0


# Architecture, precision, width of the head, kernel: queries, keys, warps, stages, budgets.
TILES = {
    ("sm_80", "half", 32, "forward"): Tile(64, 64, 4, 3, 240, 33),
    ("sm_80", "half", 32, "backward_queries"): Tile(64, 32, 4, 3, 176, 25),
    ("sm_80", "half", 32, "backward_keys"): Tile(32, 64, 4, 3, 216, 26),
    ("sm_80", "half", 32, "attention_map"): Tile(64, 64, 4, 1, 88, 9),
    ("sm_80", "half", 64, "forward"): Tile(64, 64, 4, 2, 255, 41),
    ("sm_80", "half", 64, "backward_queries"): Tile(64, 32, 4, 2, 248, 37),
    ("sm_80", "half", 64, "backward_keys"): Tile(32, 32, 4, 2, 168, 28),
    ("sm_80", "half", 64, "attention_map"): Tile(64, 64, 4, 1, 152, 11),
    ("sm_80", "half", 128, "forward"): Tile(64, 32, 4, 2, 240, 61),
    ("sm_80", "half", 128, "backward_queries"): Tile(64, 32, 8, 2, 248, 77),
    ("sm_80", "half", 128, "backward_keys"): Tile(32, 32, 4, 2, 240, 52),
    ("sm_80", "half", 128, "attention_map"): Tile(64, 64, 4, 1, 200, 19),
    ("sm_80", "tf32", 32, "forward"): Tile(64, 32, 4, 2, 144, 29),
    ("sm_80", "tf32", 32, "backward_queries"): Tile(32, 32, 4, 2, 192, 27),
    ("sm_80", "tf32", 32, "backward_keys"): Tile(32, 64, 4, 2, 176, 40),
    ("sm_80", "tf32", 32, "attention_map"): Tile(64, 64, 4, 1, 144, 17),
    ("sm_80", "tf32", 64, "forward"): Tile(64, 32, 4, 2, 176, 57),
    ("sm_80", "tf32", 64, "backward_queries"): Tile(32, 32, 4, 2, 176, 57),
    ("sm_80", "tf32", 64, "backward_keys"): Tile(32, 32, 4, 2, 192, 58),
    ("sm_80", "tf32", 64, "attention_map"): Tile(64, 32, 4, 1, 136, 19),
    ("sm_80", "tf32", 128, "forward"): Tile(32, 32, 4, 1, 176, 53),
    ("sm_80", "tf32", 128, "backward_queries"): Tile(32, 16, 8, 1, 136, 73),
    ("sm_80", "tf32", 128, "backward_keys"): Tile(16, 32, 8, 1, 184, 81),
    ("sm_80", "tf32", 128, "attention_map"): Tile(32, 32, 4, 1, 192, 21),
    ("sm_80", "ieee", 32, "forward"): Tile(32, 32, 4, 2, 112, 25),
    ("sm_80", "ieee", 32, "backward_queries"): Tile(32, 32, 4, 2, 160, 29),
    ("sm_80", "ieee", 32, "backward_keys"): Tile(32, 32, 4, 2, 120, 30),
    ("sm_80", "ieee", 32, "attention_map"): Tile(32, 32, 4, 1, 64, 9),
    ("sm_80", "ieee", 64, "forward"): Tile(16, 32, 4, 2, 80, 36),
    ("sm_80", "ieee", 64, "backward_queries"): Tile(16, 32, 4, 2, 104, 39),
    ("sm_80", "ieee", 64, "backward_keys"): Tile(32, 16, 4, 2, 96, 40),
    ("sm_80", "ieee", 64, "attention_map"): Tile(32, 32, 4, 1, 136, 17),
    ("sm_80", "ieee", 128, "forward"): Tile(16, 16, 8, 1, 216, 27),
    ("sm_80", "ieee", 128, "backward_queries"): Tile(16, 16, 8, 1, 255, 49),
    ("sm_80", "ieee", 128, "backward_keys"): Tile(16, 16, 8, 1, 255, 50),
    ("sm_80", "ieee", 128, "attention_map"): Tile(16, 16, 8, 1, 48, 17),
    # Consumer chips: only where sm_80's tile spills.
    ("sm_86", "tf32", 32, "forward"): Tile(64, 32, 4, 1, 144, 21),
    ("sm_86", "tf32", 64, "backward_keys"): Tile(32, 32, 8, 2, 152, 58),
    ("sm_86", "ieee", 128, "backward_queries"): Tile(16, 16, 8, 1, 255, 49, 24),
    ("sm_86", "ieee", 128, "backward_keys"): Tile(16, 16, 8, 1, 255, 50, 24),
    ("sm_120", "tf32", 128, "backward_queries"): Tile(16, 32, 8, 1, 136, 73),
    ("sm_120", "ieee", 128, "backward_keys"): Tile(16, 16, 8, 1, 255, 50, 56),
    ("sm_90", "half", 32, "forward"): Tile(64, 64, 4, 3, 168, 45),
    ("sm_90", "half", 32, "backward_queries"): Tile(64, 64, 4, 2, 240, 37),
    ("sm_90", "half", 32, "backward_keys"): Tile(64, 64, 4, 2, 224, 38),
    ("sm_90", "half", 32, "attention_map"): Tile(64, 64, 4, 1, 88, 9),
    ("sm_90", "half", 64, "forward"): Tile(64, 64, 4, 3, 176, 89),
    ("sm_90", "half", 64, "backward_queries"): Tile(64, 64, 4, 2, 255, 73),
    ("sm_90", "half", 64, "backward_keys"): Tile(64, 64, 4, 2, 255, 74),
    ("sm_90", "half", 64, "attention_map"): Tile(64, 64, 4, 1, 88, 17),
    ("sm_90", "half", 128, "forward"): Tile(64, 64, 4, 2, 255, 129),
    ("sm_90", "half", 128, "backward_queries"): Tile(32, 32, 4, 2, 224, 51),
    ("sm_90", "half", 128, "backward_keys"): Tile(32, 32, 4, 2, 255, 52),
    ("sm_90", "half", 128, "attention_map"): Tile(64, 64, 4, 1, 128, 33),
    ("sm_90", "tf32", 32, "forward"): Tile(64, 64, 4, 2, 184, 65),
    ("sm_90", "tf32", 32, "backward_queries"): Tile(64, 32, 4, 2, 144, 45),
    ("sm_90", "tf32", 32, "backward_keys"): Tile(32, 64, 4, 2, 192, 42),
    ("sm_90", "tf32", 32, "attention_map"): Tile(64, 64, 4, 1, 88, 17),
    ("sm_90", "tf32", 64, "forward"): Tile(64, 32, 4, 2, 136, 81),
    ("sm_90", "tf32", 64, "backward_queries"): Tile(64, 32, 4, 1, 232, 73),
    ("sm_90", "tf32", 64, "backward_keys"): Tile(32, 64, 4, 1, 255, 81),
    ("sm_90", "tf32", 64, "attention_map"): Tile(64, 32, 4, 1, 88, 25),
    ("sm_90", "tf32", 128, "forward"): Tile(64, 32, 4, 1, 255, 81),
    ("sm_90", "tf32", 128, "backward_queries"): Tile(32, 16, 8, 1, 144, 73),
    ("sm_90", "tf32", 128, "backward_keys"): Tile(16, 32, 8, 1, 184, 81),
    ("sm_90", "tf32", 128, "attention_map"): Tile(64, 32, 4, 1, 176, 49),
    ("sm_90", "ieee", 32, "forward"): Tile(32, 32, 4, 2, 96, 25),
    ("sm_90", "ieee", 32, "backward_queries"): Tile(32, 32, 4, 2, 112, 29),
    ("sm_90", "ieee", 32, "backward_keys"): Tile(32, 32, 4, 2, 136, 30),
    ("sm_90", "ieee", 32, "attention_map"): Tile(32, 32, 4, 1, 72, 9),
    ("sm_90", "ieee", 64, "forward"): Tile(16, 32, 4, 2, 72, 36),
    ("sm_90", "ieee", 64, "backward_queries"): Tile(16, 32, 4, 2, 112, 39),
    ("sm_90", "ieee", 64, "backward_keys"): Tile(32, 16, 4, 2, 96, 40),
    ("sm_90", "ieee", 64, "attention_map"): Tile(32, 32, 4, 1, 144, 17),
    ("sm_90", "ieee", 128, "forward"): Tile(16, 16, 8, 1, 208, 27),
    ("sm_90", "ieee", 128, "backward_queries"): Tile(16, 16, 8, 1, 255, 49, 24),
    ("sm_90", "ieee", 128, "backward_keys"): Tile(16, 16, 8, 1, 255, 50, 48),
    ("sm_90", "ieee", 128, "attention_map"): Tile(16, 16, 8, 1, 40, 17),
    ("sm_100", "half", 32, "forward"): Tile(64, 64, 4, 3, 176, 38),
    ("sm_100", "half", 32, "backward_queries"): Tile(64, 64, 4, 2, 224, 38),
    ("sm_100", "half", 32, "backward_keys"): Tile(64, 64, 4, 2, 192, 43),
    ("sm_100", "half", 32, "attention_map"): Tile(64, 64, 4, 1, 136, 10),
    ("sm_100", "half", 64, "forward"): Tile(64, 64, 4, 3, 176, 74),
    ("sm_100", "half", 64, "backward_queries"): Tile(64, 64, 4, 2, 255, 74),
    ("sm_100", "half", 64, "backward_keys"): Tile(64, 64, 4, 1, 208, 50),
    ("sm_100", "half", 64, "attention_map"): Tile(64, 64, 4, 1, 136, 18),
    ("sm_100", "half", 128, "forward"): Tile(64, 64, 4, 2, 240, 98),
    ("sm_100", "half", 128, "backward_queries"): Tile(64, 32, 4, 2, 168, 98),
    ("sm_100", "half", 128, "backward_keys"): Tile(64, 64, 8, 1, 200, 98),
    ("sm_100", "half", 128, "attention_map"): Tile(64, 64, 4, 1, 136, 34),
    ("sm_100", "tf32", 32, "forward"): Tile(64, 64, 4, 2, 232, 50),
    ("sm_100", "tf32", 32, "backward_queries"): Tile(64, 32, 4, 2, 152, 58),
    ("sm_100", "tf32", 32, "backward_keys"): Tile(32, 64, 4, 2, 136, 62),
    ("sm_100", "tf32", 32, "attention_map"): Tile(64, 64, 4, 1, 136, 18),
    ("sm_100", "tf32", 64, "forward"): Tile(64, 32, 4, 2, 152, 66),
    ("sm_100", "tf32", 64, "backward_queries"): Tile(64, 32, 4, 1, 168, 74),
    ("sm_100", "tf32", 64, "backward_keys"): Tile(32, 64, 4, 1, 160, 82),
    ("sm_100", "tf32", 64, "attention_map"): Tile(64, 32, 4, 1, 88, 26),
    ("sm_100", "tf32", 128, "forward"): Tile(64, 32, 4, 1, 208, 82),
    ("sm_100", "tf32", 128, "backward_queries"): Tile(64, 16, 4, 1, 248, 122),
    ("sm_100", "tf32", 128, "backward_keys"): Tile(16, 64, 4, 1, 200, 130),
    ("sm_100", "tf32", 128, "attention_map"): Tile(64, 32, 4, 1, 128, 50),
    ("sm_100", "ieee", 32, "forward"): Tile(32, 32, 4, 2, 96, 25),
    ("sm_100", "ieee", 32, "backward_queries"): Tile(32, 32, 4, 2, 120, 29),
    ("sm_100", "ieee", 32, "backward_keys"): Tile(32, 32, 4, 2, 96, 30),
    ("sm_100", "ieee", 32, "attention_map"): Tile(32, 32, 4, 1, 72, 9),
    ("sm_100", "ieee", 64, "forward"): Tile(16, 32, 4, 2, 72, 36),
    ("sm_100", "ieee", 64, "backward_queries"): Tile(16, 32, 4, 2, 120, 39),
    ("sm_100", "ieee", 64, "backward_keys"): Tile(32, 16, 4, 2, 88, 40),
    ("sm_100", "ieee", 64, "attention_map"): Tile(32, 32, 4, 1, 144, 17),
    ("sm_100", "ieee", 128, "forward"): Tile(16, 16, 8, 1, 208, 27),
    ("sm_100", "ieee", 128, "backward_queries"): Tile(16, 16, 8, 1, 255, 49, 24),
    ("sm_100", "ieee", 128, "backward_keys"): Tile(16, 16, 8, 1, 255, 50, 56),
    ("sm_100", "ieee", 128, "attention_map"): Tile(16, 16, 8, 1, 40, 17),
    ("gfx942", "half", 32, "forward"): Tile(64, 64, 4, 2, 264, 21),
    ("gfx942", "half", 32, "backward_queries"): Tile(64, 32, 4, 2, 248, 11),
    ("gfx942", "half", 32, "backward_keys"): Tile(32, 64, 4, 1, 232, 5),
    ("gfx942", "half", 32, "attention_map"): Tile(64, 64, 4, 1, 64, 5),
    ("gfx942", "half", 64, "forward"): Tile(64, 32, 4, 2, 184, 17),
    ("gfx942", "half", 64, "backward_queries"): Tile(64, 32, 4, 1, 224, 9),
    ("gfx942", "half", 64, "backward_keys"): Tile(16, 64, 4, 1, 144, 9),
    ("gfx942", "half", 64, "attention_map"): Tile(64, 64, 4, 1, 72, 9),
    ("gfx942", "half", 128, "forward"): Tile(64, 32, 4, 1, 248, 17),
    ("gfx942", "half", 128, "backward_queries"): Tile(32, 32, 4, 1, 312, 9),
    ("gfx942", "half", 128, "backward_keys"): Tile(16, 32, 4, 1, 184, 9),
    ("gfx942", "half", 128, "attention_map"): Tile(64, 64, 4, 1, 120, 17),
    ("gfx942", "ieee", 32, "forward"): Tile(64, 32, 4, 1, 176, 9),
    ("gfx942", "ieee", 32, "backward_queries"): Tile(64, 32, 4, 1, 232, 9),
    ("gfx942", "ieee", 32, "backward_keys"): Tile(32, 32, 4, 1, 224, 5),
    ("gfx942", "ieee", 32, "attention_map"): Tile(64, 64, 4, 1, 80, 9),
    ("gfx942", "ieee", 64, "forward"): Tile(64, 32, 4, 1, 240, 17),
    ("gfx942", "ieee", 64, "backward_queries"): Tile(32, 32, 4, 1, 312, 9),
    ("gfx942", "ieee", 64, "backward_keys"): Tile(16, 32, 4, 1, 192, 9),
    ("gfx942", "ieee", 64, "attention_map"): Tile(64, 32, 4, 1, 104, 17),
    ("gfx942", "ieee", 128, "forward"): Tile(32, 32, 4, 1, 376, 17),
    ("gfx942", "ieee", 128, "backward_queries"): Tile(32, 16, 4, 1, 256, 17),
    ("gfx942", "ieee", 128, "backward_keys"): Tile(16, 16, 4, 1, 240, 9),
    ("gfx942", "ieee", 128, "attention_map"): Tile(64, 32, 4, 1, 168, 33),
}
