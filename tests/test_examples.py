"""The programs in cells in examples/ run, and what they claim is so."""

import re
import runpy

import pytest
from PIL import Image


def attention_maps(folder, out):
    sheet = Image.open(folder / "attention.png")
    assert sheet.width > sheet.height  # four heads, three objects
    assert "0.89 ring" in out


# What each needs for a small run, and a check of what it left.
EXAMPLES = {"attention_maps": ({"SIZE": "64"}, attention_maps)}


def test_all_are_run(root):
    assert {path.stem for path in (root / "examples").glob("*.py")} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name, root, monkeypatch, tmp_path, capsys):
    path = root / "examples" / f"{name}.py"
    text = path.read_text("utf-8")
    assert text.startswith("# %% [markdown]\n# # ")
    assert set(re.findall("^# %%.*", text, re.MULTILINE)) == {"# %%", "# %% [markdown]"}
    assert f"`examples/{name}.py`" in (root / "docs" / "examples.md").read_text("utf-8")
    settings, check = EXAMPLES[name]
    for variable, value in ({"OUTPUT": str(tmp_path)} | settings).items():
        assert f'"{variable}"' in text
        monkeypatch.setenv(variable, value)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    check(tmp_path, capsys.readouterr().out)
