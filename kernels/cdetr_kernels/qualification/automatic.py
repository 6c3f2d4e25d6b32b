"""Qualification that runs by itself, before work that it pays for."""

import os
import socket
from pathlib import Path
from typing import Any

import torch

from cdetr_kernels import evidence, registry
from cdetr_kernels.qualification import store
from cdetr_kernels.qualification.plan import LEVELS
from cdetr_kernels.qualification.run import qualify

_LONGEST_WAIT = 240.0  # seconds, for the process that qualifies: twice what it takes at most


def ensure_qualified(device: torch.device, mode: Any = "auto") -> None:
    """Qualify a GPU that there is no record of; on other devices do nothing.

    One process of a host does, the others wait for it. What stands against it (no folder for the
    record, a process that cannot be started) is logged, and PyTorch's operators run.

    Args:
        device: The device that is to work.
        mode: "auto", or False to leave it out, as `CDETR_FAST_QUALIFY=0` does everywhere.

    Raises:
        ValueError: `mode` is neither.
    """
    if mode is not False and mode != "auto":
        raise ValueError(f'qualify: expected "auto" or False, got {mode!r}')
    if mode is False or os.environ.get("CDETR_FAST_QUALIFY") == "0" or device.type != "cuda":
        return
    # After a first call the choice is fixed: what would be found came too late.
    if evidence.is_fixed(device) or not missing_operators(device):
        return
    if (reason := store.unwritable_reason()) is not None:
        evidence.say_once(
            f"the kernels are not tried on this GPU, as {reason}; set CDETR_FAST_CACHE to a folder "
            "that can"
        )
        return
    name = evidence.key(device).slug
    lock = evidence.user_folder() / f"{name}-{socket.gethostname()}.qualifying"
    try:
        _qualify_or_wait(device, lock)
    except OSError as error:
        evidence.say_once(f"the kernels are not tried on this GPU: {error}")


def _qualify_or_wait(device: torch.device, lock: Path) -> None:
    """Qualify a device, or wait for the process of this host that does.

    Raises:
        OSError: The file of the lock cannot be opened.
    """
    with store.locked(lock, 0.0) as held:
        if held:
            _qualify(device)
            return
    evidence.say_once("waiting for another process, which tries the kernels on this GPU")
    with store.locked(lock, _LONGEST_WAIT) as held:
        if held:
            _qualify(device)  # unless the other process has
        else:
            evidence.say_once("the other process takes too long; PyTorch's operators run")


def missing_operators(device: torch.device) -> list[str]:
    """Return the operators with kernels that could run on a device and have no findings there."""
    known = evidence.peek(device)
    tensor = torch.empty(0, device=device)
    found = []
    for name in registry.NAMES:
        operator = registry.operator(name)
        paths = [operator.implementations[x] for x in operator.needs_evidence(device.type)]
        if any(x.unsupported_reason(tensor) is None for x in paths) and not known.findings(name):
            found.append(name)
    return found


def _qualify(device: torch.device) -> None:
    missing = missing_operators(device)
    if not missing:
        return
    evidence.say_once(
        f"trying the kernels on {evidence.key(device).device}: once for this GPU and these "
        f"versions, at most {LEVELS['quick'].seconds:.0f} seconds (CDETR_FAST_QUALIFY=0 leaves it "
        "out)"
    )
    try:
        report = qualify(device, missing)
    except (OSError, RuntimeError) as error:
        evidence.say_once(f"the kernels could not be tried: {error}")
    else:
        evidence.say_once(report.summary())
