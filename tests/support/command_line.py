"""Commands in this process: starting one and importing torch takes seconds."""

import sys
from typing import NamedTuple

import pytest

from cdetr_fast import cli


class Done(NamedTuple):
    """Result of a command: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs `cdetr-fast` with arguments in an empty folder."""
    work = tmp_path / "work"
    work.mkdir()

    def call(*arguments: object) -> Done:
        monkeypatch.chdir(work)
        monkeypatch.setattr(sys, "argv", ["cdetr-fast", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        return Done(code, *capsys.readouterr())

    return call
