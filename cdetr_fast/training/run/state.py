"""Checkpoints of a run: all that the next step depends on, written so that no kill damages one."""

from __future__ import annotations

import logging
import os
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cdetr_fast.training.errors import DataError

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{8})\.pt")


def checkpoint_files(folder: Path) -> list[Path]:
    """Returns the complete checkpoints of a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path | None:
    """Writes a checkpoint, then removes the oldest ones.

    The file appears under its name only when it is on the disk as a whole. If it cannot be written
    (a full disk), that is reported, and the earlier ones stay.

    Args:
        folder: Where checkpoints are; made if absent.
        step: Steps that were done.
        state: Tensors and plain values.
        keep: Newest checkpoints that stay.

    Returns:
        The file, or None if it could not be written.
    """
    path = folder / f"step-{step:08d}.pt"
    partial = path.with_suffix(".partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
        _sync_folder(folder)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns the first into the second
        newest = (checkpoint_files(folder) or ["none"])[-1]
        logger.error(
            "%s: the checkpoint could not be written (%s); the newest one is %s. Make room: the "
            "next attempt comes with the next checkpoint",
            path,
            str(error).splitlines()[0] if str(error) else type(error).__name__,
            newest,
        )
        partial.unlink(missing_ok=True)
        return None
    for stale in checkpoint_files(folder)[:-keep]:
        stale.unlink()
    for stale in folder.glob("step-*.partial"):  # of a run that was killed while it wrote
        stale.unlink()
    return path


def _sync_folder(folder: Path) -> None:
    """Makes a rename outlast a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU, without running code from the file.

    Raises:
        DataError: It cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise DataError(
            f"{path}: broken or incomplete checkpoint ({type(error).__name__}); "
            "remove it to resume from the one before"
        ) from error


def random_state(device: torch.device) -> dict[str, Any]:
    """Returns the state of all random number generators of this process."""
    version, internal, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    state = {
        "python": [version, list(internal), gauss],
        "numpy": [torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Sets what `random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    legacy = ("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached)
    np.random.set_state(legacy)  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
