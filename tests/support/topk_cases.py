"""Logits that are hard to select among, and their correct order."""

import math

import numpy as np
import torch
from torch import Tensor

# Few distinct values, so that ties abound; both zeros, infinities, NaN, and the extremes of fp32.
VALUES = [0.0, -0.0, 1.0, -1.0, 2.5, np.inf, -np.inf, np.nan, 3.4028235e38, -3.4028235e38, 1e-45]


def expected_order(logits: Tensor) -> list[int]:
    """Return the flat indices of `[Q, K]` logits: descending, ties by index, NaN last."""
    flat = logits.double().numpy().ravel()
    numbers, nans = np.flatnonzero(~np.isnan(flat)), np.flatnonzero(np.isnan(flat))
    return np.concatenate((numbers[np.argsort(-flat[numbers], kind="stable")], nans)).tolist()


KINDS = (
    "all equal",
    "zeros of both signs",
    "all NaN",
    "all -inf",
    "half NaN",
    "one high",
    "ascending",
    "descending",
    "one digit",
    "last bits",
    "subnormal",
    "best together",
    "best last",
    "best apart",
)


def adversarial(kind: str, shape: tuple[int, int, int]) -> Tensor:
    """Return logits that are hard to select among, digit by digit or by the maxima of chunks."""
    generator = torch.Generator().manual_seed(0)
    index = torch.arange(math.prod(shape))
    low = torch.full(index.shape, -4.6)
    flat = {
        "all equal": low,
        "zeros of both signs": 0.0 * torch.randn(index.shape, generator=generator),
        "all NaN": torch.full(index.shape, math.nan),
        "all -inf": torch.full(index.shape, -math.inf),
        "half NaN": torch.where(index % 2 == 0, math.nan, -math.inf),
        "one high": low.index_fill(0, index[len(index) // 2], 4.0),
        "ascending": index / len(index),
        "descending": -index / len(index),
        "one digit": 1.0 + torch.rand(index.shape, generator=generator) * 2**-12,
        "last bits": (index.int() % 7 + 0x3F800000).view(torch.float32),
        "subnormal": (index.int() % 999).view(torch.float32),
        "best together": torch.where(index % 4096 < 64, 5.0, -5.0),
        "best last": torch.where(index >= len(index) - 70, 5.0, -5.0),
        "best apart": torch.where(index % 64 == 63, 5.0, -5.0),
    }[kind]
    return flat.reshape(shape)
