"""Tables in pages: Markdown between two marks of their name."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table."""
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (header, *rows)]
    lines.insert(1, "|" + "---|" * len(header))
    return "\n".join(lines)


def filled(text: str, tables: dict[str, str], marks: tuple[str, str]) -> str:
    """Put each table between the marks of its name, which are templates with `{}`."""
    for name, table in tables.items():
        begin, end = (mark.format(name) for mark in marks)
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    return text
