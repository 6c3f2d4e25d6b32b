"""Folders of results, and names of the pictures in them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cdetr_fast.cli.errors import UserError


def make_output_folder(path: Path) -> None:
    """Make the folder that `--output` names; UserError if it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {path}: {error.strerror}; name another folder") from error


class PictureNames:
    """Names for annotated pictures: all different, and none that would overwrite an input.

    Args:
        folder: Where the pictures go.
        inputs: Files that must not be overwritten.
    """

    def __init__(self, folder: Path, inputs: Iterable[Path]) -> None:
        self.folder = folder
        self.taken = {self._key(path) for path in inputs}

    def take(self, source: Path) -> Path:
        """Return the path of the picture that is made from `source`."""
        number = 1
        while True:
            suffix = "" if number == 1 else f"_{number}"
            path = self.folder / f"{source.stem}{suffix}.jpg"
            if self._key(path) not in self.taken:
                self.taken.add(self._key(path))
                return path
            number += 1

    @staticmethod
    def _key(path: Path) -> str:
        return str(path.resolve()).lower()  # some file systems do not tell A.jpg from a.jpg
