"""Writing of records: atomic, and one process at a time."""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from cdetr_kernels import evidence
from cdetr_kernels.evidence import Record, RecordError

try:
    import fcntl
except ImportError:  # Windows, where renaming alone has to do
    fcntl = None  # type: ignore[assignment]


def write(record: Record) -> Path:
    """Add a record to what the user's cache knows of the same device; return the file.

    Findings about the record's operators replace older ones.

    Raises:
        OSError: The folder cannot be written.
    """
    folder = evidence.user_folder()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / record.key.file_name
    with locked(path.with_suffix(".lock"), seconds=60.0):
        with contextlib.suppress(RecordError):  # nothing, or nothing that can be used
            record = evidence.read(path, record.key).updated(record)
        write_text(path, record.to_json())
    return path


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole: others see the old one or the new one."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".part")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def unwritable_reason() -> str | None:
    """Return why records cannot be kept, None if they can."""
    try:
        folder = evidence.user_folder()
    except OSError as error:
        return str(error)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / ".writable", "")
        (folder / ".writable").unlink(missing_ok=True)
    except OSError as error:
        return f"{folder} cannot be written ({error.strerror or error})"
    return None


@contextlib.contextmanager
def locked(path: Path, seconds: float) -> Iterator[bool]:
    """Hold a lock that one process at a time has.

    Args:
        path: File of the lock; it stays.
        seconds: Longest wait.

    Yields:
        Whether the lock is held; not after the longest wait, or where files cannot be locked.

    Raises:
        OSError: The file cannot be opened.
    """
    with _opened(path) as file:
        held = _acquire(file.fileno(), time.monotonic() + seconds)
        yield held  # closing the file releases it, as does the end of the process


def _opened(path: Path) -> TextIO:
    try:
        return path.open("a", encoding="utf-8")
    except PermissionError:  # another user's; to read is enough for a lock
        return path.open(encoding="utf-8")


def _acquire(descriptor: int, end: float) -> bool:
    if fcntl is None:
        return False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.1)
        except OSError:  # a file system without locks
            return False
