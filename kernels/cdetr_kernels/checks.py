"""Checks of arguments that the public operators share. What fits costs little; errors say more."""

from torch import Tensor


def describe(tensor: Tensor) -> str:
    """Returns dtype and shape of a tensor, as errors name them."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def check_rank(name: str, tensor: Tensor, rank: int) -> None:
    """Raises ValueError if a tensor has not `rank` dimensions."""
    if tensor.ndim != rank:
        raise ValueError(f"{name}: expected {rank} dimensions, got {describe(tensor)}")


def check_shape(
    name: str, tensor: Tensor, shape: tuple[int, ...], may_broadcast: bool = False
) -> None:
    """Raises ValueError if a tensor has another shape; `may_broadcast` allows a batch of 1."""
    got = tensor.shape
    if got == shape or (may_broadcast and got == (1, *shape[1:])):
        return
    or_shared = " (or 1 in the first place)" if may_broadcast else ""
    raise ValueError(f"{name}: expected {list(shape)}{or_shared}, got {list(got)}")


def check_alike(name: str, tensor: Tensor, **others: Tensor) -> None:
    """Raises TypeError or ValueError if a tensor has another dtype or device than `tensor`."""
    dtype, device = tensor.dtype, tensor.device
    for other_name, other in others.items():
        if other.dtype != dtype:
            raise TypeError(f"{other_name}: expected {dtype} as {name}, got {other.dtype}")
        if other.device != device:
            raise ValueError(f"{other_name}: expected {device} as {name}, got {other.device}")
