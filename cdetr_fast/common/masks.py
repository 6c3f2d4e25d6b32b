"""Masks that the host reads, where that costs no wait for a device and no dispatch."""

import numpy as np
import torch
from torch import Tensor
from torch.jit import is_tracing  # type: ignore[attr-defined]  # public, but not in its __all__


def is_readable(mask: Tensor) -> bool:
    """Return whether a mask's values are on the host, and not part of a graph that is traced."""
    return not torch.compiler.is_compiling() and not is_tracing() and mask.device.type == "cpu"


def values_of(mask: Tensor) -> np.ndarray:
    """Return a readable mask as an array, by no operator of torch where numpy has the dtype."""
    return (mask != 0 if mask.dtype == torch.bfloat16 else mask).numpy()


def is_unpadded(mask: Tensor) -> bool:
    """Return whether nothing is masked, as far as that can be seen (`is_readable`)."""
    return is_readable(mask) and bool(values_of(mask).all())
