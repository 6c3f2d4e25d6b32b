"""Files of weights: their names, and finding and reading them."""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from cdetr_fast.checkpoints.key_maps import StateDict
from cdetr_fast.common.errors import first_line
from cdetr_fast.common.files import read_json, resolve_file


def find_weights(
    name_or_path: str | os.PathLike[str],
    variant: str | None = None,
    use_safetensors: bool | None = None,
    **download: Any,
) -> list[Path]:
    """Find the files of weights in a folder or on the hub: one, or all shards.

    Args:
        name_or_path: A folder, or the id of a model on the hub.
        variant: Part of the file name, as in `model.fp16.safetensors`.
        use_safetensors: True or False restricts the search to safetensors or to .bin files.
        **download: As in `resolve_file`.

    Raises:
        FileNotFoundError: None was found; the message lists the names that were tried.
    """
    names = [
        name
        for name in weight_names(variant)
        if use_safetensors is None or ("safetensors" in name) == use_safetensors
    ]
    for name in names:
        try:
            found = resolve_file(name_or_path, name, **download)
        except FileNotFoundError as error:
            reason = error
            continue
        if ".index." not in name:
            return [found]
        shards = sorted(set(read_json(found)["weight_map"].values()))
        return [resolve_file(name_or_path, shard, **download) for shard in shards]
    raise FileNotFoundError(
        f"{name_or_path}: expected one of {', '.join(names)}; the last answer was: {reason}"
    ) from reason


def weight_names(variant: str | None) -> list[str]:
    """Return file names in the order in which they are looked for."""
    part = f".{variant}" if variant else ""
    return [
        f"model{part}.safetensors",
        f"model.safetensors.index{part}.json",
        f"pytorch_model{part}.bin",
        f"pytorch_model.bin.index{part}.json",
    ]


def read_weights(files: list[Path]) -> StateDict:
    """Read weights onto the CPU, without running code from the files.

    Args:
        files: A safetensors file or one that `torch.save` wrote, or all shards of one checkpoint.
            The latter may hold the weights under "model", as the authors' training leaves them.

    Raises:
        OSError: A file is truncated or of another kind; the message names it.
    """
    state_dict: StateDict = {}
    for file in files:
        state_dict |= _read_file(file)
    return state_dict


def read_arguments(file: Path) -> dict[str, Any]:
    """Return the command line of the authors' training, or {} if the file has none.

    Raises:
        OSError: As `read_weights`.
    """
    content = {} if file.suffix == ".safetensors" else _load(file)
    arguments = content.get("args") if isinstance(content, Mapping) else None
    return vars(arguments) if isinstance(arguments, argparse.Namespace) else {}


def _read_file(file: Path) -> StateDict:
    if file.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(file)
        except SafetensorError as error:
            raise OSError(f"{file}: broken or incomplete safetensors file ({error})") from error
    content = _load(file)
    for name in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in content.items()
    ):
        raise OSError(f"{file}: expected a state_dict, or one under 'model'")
    if not content:
        raise OSError(f"{file}: expected weights, got an empty state_dict")
    return dict(content)


def _load(file: Path) -> Any:
    try:
        # the authors save their command line too: a namespace of strings and numbers
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise OSError(f"{file}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # torch's unpickler raises a dozen kinds of errors
        raise OSError(
            f"{file}: broken, incomplete, or not a file of plain weights "
            f"({type(error).__name__}: {_reason(error)})"
        ) from error


def _reason(error: Exception) -> str:
    """Return the reason, without torch's advice around it to load the file with its code."""
    return first_line(str(error).partition("WeightsUnpickler error:")[2] or error)
