"""Files of a model: found in a folder or on the hub, read, and written atomically."""

import json
import os
from collections.abc import Callable
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


def resolve_file(
    name_or_path: str | os.PathLike, file_name: str, *, subfolder: str = "", **options: Any
) -> Path:
    """Finds a file of a model in a local folder, or fetches it from the hub.

    Args:
        name_or_path: a folder, or the id of a model on the hub.
        file_name: name in that folder or repository.
        subfolder: folder inside it.
        **options: `DOWNLOAD_OPTIONS`, as in `huggingface_hub.hf_hub_download`.

    Raises:
        FileNotFoundError: neither a folder with that file nor a repository with it.
        OSError: the hub could not be reached.
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
    """Reads a JSON object; OSError with the file's name if it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise OSError(f"{path}: expected a JSON file ({error})") from error
    if not isinstance(content, dict):
        raise OSError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def make_folder(path: str | os.PathLike) -> Path:
    """Makes a folder to save into; NotADirectoryError if it is a file."""
    folder = Path(path)
    if folder.is_file():
        raise NotADirectoryError(f"save_directory: expected a folder, got the file {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file so that an interruption at any moment leaves either the old file or the new one.

    Args:
        path: the file.
        write: called with the path of a temporary file in the same folder, which it must fill.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
