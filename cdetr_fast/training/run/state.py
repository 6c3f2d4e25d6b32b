"""Checkpoints of a run: everything the next step depends on, in files that no kill damages."""

from __future__ import annotations

import logging
import os
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from cdetr_fast.common.errors import first_line
from cdetr_fast.training.errors import DataError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{8})\.pt")


def checkpoint_files(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path | None:
    """Write a checkpoint, then remove the oldest ones.

    The file appears under its name only when it is on the disk as a whole. If it cannot be written
    (a full disk), that is logged and the earlier ones stay.

    Args:
        folder: Folder of the checkpoints; made if absent.
        step: Number of steps done.
        state: Tensors and plain values.
        keep: How many of the newest checkpoints stay.

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
        others = checkpoint_files(folder)
        logger.error(
            "%s: the checkpoint could not be written (%s); the newest one is %s. Free some "
            "space: the next attempt comes with the next checkpoint",
            path,
            first_line(error),
            others[-1] if others else "none",
        )
        partial.unlink(missing_ok=True)
        return None
    for stale in checkpoint_files(folder)[:-keep]:
        stale.unlink()
    for stale in folder.glob("step-*.partial"):  # of a run that was killed while it wrote
        stale.unlink()
    return path


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, without running code from the file.

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
    """Return the state of all random number generators of this process."""
    version, internal, gauss = random.getstate()
    numpy: dict[str, Any] = np.random.get_state(legacy=False)  # noqa: NPY002
    keys, position = numpy["state"]["key"], numpy["state"]["pos"]
    state = {
        "python": [version, list(internal), gauss],
        "numpy": [
            torch.from_numpy(keys.astype(np.int64)),
            position,
            numpy["has_gauss"],
            numpy["gauss"],
        ],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Set what `random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    legacy = ("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached)
    np.random.set_state(legacy)  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def full_state(
    model: nn.Module, optimizer: AcceleratedOptimizer, accelerator: Accelerator
) -> dict[str, Any]:
    """Return the state of model and optimizer, whole even if they are sharded."""
    if accelerator.distributed_type.value == "FSDP":
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        inner = optimizer.optimizer
        weights, moments = get_state_dict(model, inner, options=options)
        return {"model": weights, "optimizer": moments}
    return {
        "model": accelerator.unwrap_model(model).state_dict(),
        "optimizer": optimizer.state_dict(),
    }


def load_full_state(
    model: nn.Module,
    optimizer: AcceleratedOptimizer,
    accelerator: Accelerator,
    state: dict[str, Any],
) -> None:
    """Load what `full_state` returned.

    The settings of the optimizer's groups stay those of this start.
    """
    own = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    if accelerator.distributed_type.value == "FSDP":
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        set_state_dict(
            model,
            optimizer.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=_named_moments(model, optimizer, state["optimizer"]),
            options=StateDictOptions(full_state_dict=True),
        )
    else:
        accelerator.unwrap_model(model).load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)


def _named_moments(
    model: nn.Module, optimizer: AcceleratedOptimizer, state: dict[str, Any]
) -> dict[str, Any]:
    """Return an optimizer's state by names of parameters, even if it was saved by numbers."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    order = [names[p] for group in optimizer.param_groups for p in group["params"]]

    def name(key: str | int) -> str:
        return order[key] if isinstance(key, int) else key

    return {
        "state": {name(key): moments for key, moments in state["state"].items()},
        "param_groups": [
            group | {"params": [name(key) for key in group["params"]]}
            for group in state["param_groups"]
        ],
    }
