"""config.json: found in a folder or on the hub, read and written."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, overload

from cdetr_fast.common.files import (
    DOWNLOAD_OPTIONS,
    make_folder,
    read_json,
    resolve_file,
    write_text,
)
from cdetr_fast.common.hub import upload
from cdetr_fast.common.validation import Checked

CONFIG_NAME = "config.json"


class ConfigFile(Checked):
    """Base of a configuration that is read from and written to config.json.

    The class has `from_dict`, `to_dict`, `to_diff_dict` and `validate`.
    """

    from_dict: ClassVar[Callable[..., Any]]
    to_dict: ClassVar[Callable[..., dict[str, Any]]]
    to_diff_dict: ClassVar[Callable[..., dict[str, Any]]]
    validate: ClassVar[Callable[..., None]]

    @overload
    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        return_unused_kwargs: Literal[False] = ...,
        **kwargs: Any,
    ) -> Self: ...

    @overload
    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        return_unused_kwargs: bool,
        **kwargs: Any,
    ) -> Any: ...

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        subfolder: str = "",
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        return_unused_kwargs: bool = False,
        **overrides: Any,
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Read a config.json and apply overrides.

        Args:
            name_or_path: A folder, a JSON file, or the id of a model on the hub.
            revision: Branch, tag or commit on the hub.
            subfolder: Folder inside the folder or repository.
            cache_dir: Folder for downloads; default the cache of `huggingface_hub`.
            token: Access token for the hub.
            local_files_only: Use the cache alone, without downloading.
            force_download: Download files that are in the cache too.
            return_unused_kwargs: Return (config, overrides that are not fields) instead of refusing
                those.
            **overrides: Fields that replace those of the file.

        Raises:
            OSError: The file does not exist or is not JSON.
            ValueError, TypeError: As in the constructor.
        """
        fields = cls.get_config_dict(
            name_or_path,
            revision=revision,
            subfolder=subfolder,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
        )[0]
        overrides.setdefault("name_or_path", os.fspath(name_or_path))
        return cls.from_dict(fields, return_unused_kwargs=return_unused_kwargs, **overrides)

    @classmethod
    def get_config_dict(
        cls, name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a config.json into a dict, as it is in the file.

        Args:
            name_or_path: A folder, a JSON file, or the id of a model on the hub.
            **kwargs: Download options of `from_pretrained`; all others are returned.

        Returns:
            The content of the file, and the unused keyword arguments.
        """
        options = {name: kwargs.pop(name) for name in DOWNLOAD_OPTIONS if name in kwargs}
        if os.path.isfile(name_or_path):
            return read_json(Path(name_or_path)), kwargs
        return read_json(resolve_file(name_or_path, CONFIG_NAME, **options)), kwargs

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike[str]) -> Self:
        """Read one JSON file."""
        return cls.from_dict(read_json(Path(json_file)))

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return `to_diff_dict()`, or with use_diff=False `to_dict()`, as JSON."""
        fields = self.to_diff_dict() if use_diff else self.to_dict()
        return json.dumps(fields, indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Write one JSON file; an interrupted write leaves the old file."""
        write_text(Path(json_file_path), self.to_json_string(use_diff))

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        push_to_hub: bool = False,
        **push_options: Any,
    ) -> None:
        """Write config.json into a folder, which is created if necessary.

        Args:
            save_directory: The folder.
            push_to_hub: Upload it too.
            **push_options: As in `push_to_hub`; `repo_id` is the folder's name unless given.

        Raises:
            TypeError: Options for an upload without push_to_hub=True.
            ValueError: The values of the fields do not fit each other.
        """
        if push_options and not push_to_hub:
            raise TypeError(f"save_pretrained: unknown keyword {next(iter(push_options))!r}")
        self.validate()
        folder = make_folder(save_directory)
        self.to_json_file(folder / CONFIG_NAME)
        if push_to_hub:
            push_options.setdefault("repo_id", folder.resolve().name)
            upload(folder, [CONFIG_NAME], what="config", **push_options)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Upload config.json to a repository on the hub; see `cdetr_fast.common.hub.upload`."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return upload(Path(folder), [CONFIG_NAME], repo_id, what="config", **options)
