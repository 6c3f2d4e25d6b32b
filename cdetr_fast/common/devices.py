"""Devices by name."""

import torch

from cdetr_fast.common import progress
from cdetr_fast.common.errors import first_line
from cdetr_kernels.qualification import automatic


def usable_device(name: str, device: str | torch.device | None) -> torch.device:
    """Return a device after allocating on it.

    Args:
        name: Name of the argument, for the error.
        device: The device; None is CUDA if there is a GPU, else the CPU.

    Raises:
        RuntimeError: The device does not exist or cannot be used.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # torch without CUDA asserts
        raise RuntimeError(f"{name}: {device!r} cannot be used: {first_line(error)}") from error
    return torch.device(device)


def qualify_kernels(device: torch.device) -> None:
    """Qualify the kernels on a GPU that there is no record of; see `ensure_qualified`."""
    if device.type == "cuda" and automatic.missing_operators(device):
        with progress.task("trying the kernels on this GPU, once"):
            automatic.ensure_qualified(device)
