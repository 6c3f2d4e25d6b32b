"""Files of a model: found in a folder or on the hub, read, and written atomically."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DOWNLOAD_OPTIONS = (
    "revision",
    "subfolder",
    "cache_dir",
    "token",
    "local_files_only",
    "force_download",
)
# What transformers' auto classes and pipelines add to the arguments of the user.
ADDED_BY_CALLERS = (
    "_commit_hash",
    "_fast_init",
    "_from_auto",
    "_from_pipeline",
    "code_revision",
    "trust_remote_code",  # there is no remote code to run
)


def resolve_file(
    name_or_path: str | os.PathLike[str], file_name: str, *, subfolder: str = "", **options: Any
) -> Path:
    """Find a file of a model in a local folder, or fetch it from the hub.

    Args:
        name_or_path: A folder, or the id of a model on the hub.
        file_name: Name in that folder or repository.
        subfolder: Folder inside it.
        **options: `DOWNLOAD_OPTIONS`, as in `huggingface_hub.hf_hub_download`.

    Raises:
        FileNotFoundError: Neither a folder with that file nor a repository with it.
        OSError: The hub could not be reached.
    """
    if os.path.isdir(name_or_path):
        path = Path(name_or_path) / subfolder / file_name
        if not path.is_file():
            raise FileNotFoundError(
                f"{name_or_path}: expected a folder with {os.path.join(subfolder, file_name)}"
            )
        return path
    from huggingface_hub import hf_hub_download  # 0.2 s to import
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = os.fspath(name_or_path)
    wanted = os.path.join(subfolder, file_name)
    try:
        return Path(hf_hub_download(name, file_name, subfolder=subfolder or None, **options))
    except HFValidationError as error:
        raise FileNotFoundError(f"{name}: expected a folder or the id of a hub model") from error
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise FileNotFoundError(
            f"{name}: no such folder, and no {wanted} from the hub: {error}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raise OSError with the file's name if it is something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise OSError(f"{path}: expected a JSON file ({error})") from error
    if not isinstance(content, dict):
        raise OSError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Make a folder to save into; raise NotADirectoryError if it is a file."""
    folder = Path(path)
    if folder.is_file():
        raise NotADirectoryError(f"save_directory: expected a folder, got the file {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def replace_all(folder: Path) -> Iterator[Callable[[str], Path]]:
    """Replace files in a folder, all of them when the block ends, or none.

    An interruption leaves every old file whole: new ones are written beside them, and an error
    between the first rename and the last one puts the old ones back.

    Args:
        folder: Where the files go.

    Yields:
        A function from a file's name to the path to write it to.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as staging:
        new, old = Path(staging, "new"), Path(staging, "old")
        new.mkdir()
        old.mkdir()
        yield lambda name: new / name
        names = sorted(path.name for path in new.iterdir())
        # safetensors makes files that only their owner may read; users expect what open() makes.
        (ordinary := Path(staging, "ordinary")).touch()
        for name in names:
            (new / name).chmod(ordinary.stat().st_mode)
            with (new / name).open("rb+") as stream:
                os.fsync(stream.fileno())
            if (folder / name).exists():
                _link_or_copy(folder / name, old / name)
        try:
            for name in names:
                os.replace(new / name, folder / name)
        except BaseException:
            for name in names:
                if (old / name).exists():
                    os.replace(old / name, folder / name)
                elif not (new / name).exists():
                    (folder / name).unlink()
            raise


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Write one file as `replace_all` does.

    Args:
        path: The file; its folder must be there.
        write: Called with the path to write to.
    """
    with replace_all(path.parent) as stage:
        write(stage(path.name))


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_atomically(path, lambda staged: staged.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any, *, indent: int = 2, sort_keys: bool = True) -> None:
    """Write a JSON file atomically; the defaults are the format of transformers."""
    write_text(path, json.dumps(content, indent=indent, sort_keys=sort_keys) + "\n")


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # file systems without hard links
        shutil.copy2(source, target)
