"""Images for processors, and the comparison with transformers' processor."""

import numpy as np
import torch
import transformers
from PIL import Image

from cdetr_fast.images import (
    BatchFeature,
    ConditionalDetrImageProcessor,
)

Theirs = transformers.ConditionalDetrImageProcessor
SMALL = {"shortest_edge": 64, "longest_edge": 101}


def pixels(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """A smooth random image `[H, W, C]`, so that resizing has something to get wrong."""
    shape = (height // 4 + 2, width // 4 + 2, channels)
    cells = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    bands = [
        Image.fromarray(cells[..., i]).resize((width, height), Image.Resampling.BICUBIC)
        for i in range(channels)
    ]
    return np.stack([np.array(band) for band in bands], axis=-1)


def chw(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)


def assert_equal_features(ours, theirs) -> None:
    """Same keys, dtypes and values, labels included."""
    assert set(ours) == set(theirs)
    for key in set(ours) - {"labels"}:
        assert ours[key].dtype == theirs[key].dtype, key
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0, msg=key)
    for our_label, their_label in zip(
        ours.get("labels", []), theirs.get("labels", []), strict=True
    ):
        assert set(our_label) == set(their_label)
        for key in our_label:
            assert our_label[key].dtype == their_label[key].dtype, key
            torch.testing.assert_close(our_label[key], their_label[key], rtol=0, atol=0, msg=key)


def compare(images, settings=None, **call) -> BatchFeature:
    """Runs both processors and returns our result, which equals theirs bit for bit."""
    settings = {"size": SMALL} | (settings or {})
    ours = ConditionalDetrImageProcessor(**settings)(images, return_tensors="pt", **call)
    theirs = Theirs(**settings)(images, return_tensors="pt", **call)
    assert_equal_features(ours, theirs)
    return ours
