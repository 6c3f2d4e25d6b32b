"""The README's Python blocks run as they stand."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"


def python_blocks() -> list:
    text = README.read_text(encoding="utf-8")
    return [
        pytest.param(
            match.start(1), match.group(1), id=f"line{text.count(chr(10), 0, match.start(1)) + 1}"
        )
        for match in re.finditer(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    ]


def test_readme_has_python_blocks():
    assert python_blocks()


@pytest.mark.parametrize(("position", "code"), python_blocks())
def test_python_block_runs(position, code, monkeypatch):
    monkeypatch.chdir(README.parent)
    line = README.read_text(encoding="utf-8").count("\n", 0, position)
    # Blank lines in front make a traceback show the README's own line numbers.
    exec(compile("\n" * line + code, str(README), "exec"), {"__name__": "readme"})
