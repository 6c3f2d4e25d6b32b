"""Tables in pages: Markdown between two marks of their name."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MARKS = "<!-- {} -->", "<!-- /{} -->"


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table."""
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (header, *rows)]
    lines.insert(1, "|" + "---|" * len(header))
    return "\n".join(lines)


def filled(text: str, tables: dict[str, str], marks: tuple[str, str] = MARKS) -> str:
    """Return the text with each table between the marks of its name, templates with `{}`."""
    for name, table in tables.items():
        begin, end = (mark.format(name) for mark in marks)
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    return text


def write_tables(page: Path, tables: dict[str, str]) -> None:
    """Write each table between the marks of its name in a page."""
    page.write_text(filled(page.read_text(encoding="utf-8"), tables), encoding="utf-8")
