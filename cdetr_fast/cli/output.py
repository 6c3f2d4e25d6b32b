"""Folders of results, names of the pictures in them, and files that grow with the results."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cdetr_fast.cli.errors import UserError
from cdetr_fast.common.files import read_json


def counted(count: int, noun: str) -> str:
    """Return "1 image", "2 images"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def make_output_folder(path: Path) -> None:
    """Make the folder that `--output` names; UserError if it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {path}: {error.strerror}; name another folder") from error


class PictureNames:
    """Names for annotated pictures and videos: all different, and none that overwrites a file.

    Pictures of an earlier run, which its images.json lists, are replaced.

    Args:
        folder: Where the pictures go.
        inputs: Files that must not be overwritten, even if such a run wrote them.
    """

    def __init__(self, folder: Path, inputs: Iterable[Path]) -> None:
        self.folder = folder
        self.taken = {self._key(path) for path in inputs}
        self._replaceable = {self._key(folder / name) for name in listed_pictures(folder)}

    def take(self, source: Path, suffix: str = ".jpg") -> Path:
        """Return the path of the picture, or of another kind of file, that `source` becomes."""
        number = 1
        while True:
            ending = "" if number == 1 else f"_{number}"
            path = self.folder / f"{source.stem}{ending}{suffix}"
            key = self._key(path)
            if key not in self.taken and (key in self._replaceable or not path.exists()):
                self.taken.add(key)
                return path
            number += 1

    @staticmethod
    def _key(path: Path) -> str:
        return str(path.resolve()).lower()  # some file systems do not tell A.jpg from a.jpg


def listed_pictures(folder: Path) -> set[str]:
    """Return the names of the pictures that images.json in a folder lists."""
    try:
        records = read_json(folder / "images.json").get("images")
    except OSError:  # there is none, or an interrupted run left it broken
        return set()
    records = [r for r in records if isinstance(r, dict)] if isinstance(records, list) else []
    return {name for r in records if isinstance(name := r.get("picture"), str)}


class GrowingArray:
    """A JSON file with an array that is written item by item, so that it may be of any length.

    Args:
        path: The file.
        before: What precedes the items, with the opening bracket.
        after: What follows them; `close` writes it.
    """

    def __init__(self, path: Path, before: str = "[", after: str = "]") -> None:
        self._file = path.open("w", encoding="utf-8")
        self._after = after
        self._file.write(before)
        self._separator = "\n"

    def append(self, item: dict[str, Any]) -> None:
        """Write an item."""
        self._file.write(self._separator + json.dumps(item))
        self._separator = ",\n"

    def close(self) -> None:
        """Complete the file."""
        with self._file:
            self._file.write(f"\n{self._after}\n")
