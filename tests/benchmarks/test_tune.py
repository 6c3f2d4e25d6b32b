"""Tuning, as far as it goes without a GPU: the reviewed list, what is dropped, the table."""

import ast

import pytest

pytest.importorskip("triton")
from benchmarks import tune
from cdetr_kernels.gpu.tiles import TILES, Tile


def test_a_dry_run_lists_what_fits_and_what_does_not(monkeypatch, capsys):
    tiles = [Tile(64, 64, 4, 1), Tile(128, 128, 4, 1)]
    monkeypatch.setattr(tune, "candidates", lambda key: tiles)
    arguments = "--dry-run --architecture sm_90 --precisions half --kernels attention_map"
    assert tune.main([*arguments.split(), "--processes", "1"]) == 0
    fits, spills, total = capsys.readouterr().out.splitlines()
    assert fits.startswith("half 32 attention_map 64x64 4w1s: fits: ")
    assert spills.endswith(" spills")
    assert total == "sm_90: 1 of 2 tiles fit"


def test_what_the_table_has_is_among_the_candidates_or_was_made_for_other_chips():
    for (architecture, precision, width, kernel), tile in TILES.items():
        if architecture == "sm_90" and width == 32:
            tiles = tune.candidates(tune.Key(precision, width, kernel))
            assert any(tune.text(tile) == tune.text(x) for x in tiles)


def test_only_the_tuned_lines_of_the_table_change():
    before = tune.TABLE.read_text()
    key = tune.Key("half", 32, "forward")
    used = {"registers": 121, "shared": 20 * 1024 + 1}
    lines = [tune.entry(name, key, Tile(32, 64, 8, 3), used) for name in ("sm_90", "sm_121")]
    after = tune.rewritten(before, lines)
    ast.parse(after)
    changed = set(after.splitlines()) - set(before.splitlines())
    assert changed == {
        '    ("sm_90", "half", 32, "forward"): Tile(32, 64, 8, 3, 136, 22),',
        '    ("sm_121", "half", 32, "forward"): Tile(32, 64, 8, 3, 136, 22),',
    }
    assert len(after.splitlines()) == len(before.splitlines()) + 1
    assert tune.rewritten(after, lines) == after
