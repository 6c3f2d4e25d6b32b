"""Errors that users can put right, packages that a command needs, and how a command fails."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import typer

from cdetr_fast.common.errors import first_line
from cdetr_fast.training.errors import DataError, TrainingStopped

FAILED, INTERRUPTED = 1, 130
"""Exit codes; click adds 2, wrong usage, and `TrainingStopped` has its own."""


class UserError(Exception):
    """Something that the user can put right; reported as one line."""


def require_packages(*modules: str, extra: str) -> None:
    """Raise UserError with the extra to install if one of the modules is missing."""
    if missing := [name for name in modules if not is_installed(name)]:
        raise UserError(f"{', '.join(missing)} missing: pip install 'cdetr-fast[{extra}]'")


def require_training() -> None:
    """Require the packages of the train extra."""
    require_packages("accelerate", "faster_coco_eval", "yaml", extra="train")


def is_installed(module: str) -> bool:
    """Return whether a module can be imported, without importing it."""
    try:
        return find_spec(module) is not None
    except ValueError:  # `sys.modules[name]` is None
        return False


@contextmanager
def errors_as_lines(write: Callable[[str], None], with_traceback: bool = False) -> Iterator[None]:
    """End the command with a line and an exit code after an error that the user can put right.

    Any other exception is a fault of the program, and keeps its traceback.

    Args:
        write: Takes the line.
        with_traceback: Write the traceback before it.
    """
    try:
        yield
    except Exception as error:
        described = _described(error)
        if described is None:
            raise
        if with_traceback:
            write(traceback.format_exc().rstrip())
        message, code = described
        if message:
            write(f"cdetr-fast: {message}")
        raise typer.Exit(code) from error
    except KeyboardInterrupt as interrupt:
        write("cdetr-fast: interrupted")
        raise typer.Exit(INTERRUPTED) from interrupt


def _described(error: Exception) -> tuple[str, int] | None:
    """Return message and exit code of an error with a cause outside the program, else None."""
    if isinstance(error, TrainingStopped):
        return str(error), error.exit_code
    if isinstance(error, DataError) and error.reported_elsewhere:
        return "", FAILED  # one process of a training run reports what all of them have raised
    if isinstance(error, UserError | DataError):
        return str(error), FAILED
    if _is_out_of_memory(error):
        return (
            f"out of memory ({first_line(error)}); use a smaller --batch-size or smaller images",
            FAILED,
        )
    if isinstance(error, OSError) and error.errno not in (None, errno.EPIPE):
        where = f"{error.filename}: " if error.filename else ""
        advice = {
            errno.ENOSPC: "; free some space, or name another folder",
            errno.EACCES: "; change its permissions, or name another path",
            errno.ENOENT: "; check the path",
        }
        return f"{where}{error.strerror}{advice.get(error.errno, '')}", FAILED
    return None


def _is_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")  # nothing else raises its error
    return isinstance(error, MemoryError) or (
        torch is not None and isinstance(error, torch.OutOfMemoryError)
    )
