"""What happens to the pixels: resize, rescale, normalise, pad."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tvF

from cdetr_fast.image_processing.settings import INTERPOLATION
from cdetr_fast.image_processing.sizes import resized_hw


def transformed(images: Sequence[Tensor], settings: Mapping[str, Any]) -> list[Tensor]:
    """Resizes, rescales and normalises images `[C, H, W]`; those of one shape together on a GPU."""
    groups = defaultdict(list)
    for i, image in enumerate(images):
        alone = settings["disable_grouping"]
        if alone is None:
            alone = image.device.type == "cpu"  # there, stacking costs more than it saves
        groups[i if alone else (image.shape, image.dtype, image.device)].append(i)

    results: dict[int, Tensor] = {}
    for members in groups.values():
        batch = images[members[0]][None]
        if len(members) > 1:
            batch = torch.stack([images[i] for i in members])
        if settings["do_resize"]:
            new_hw = resized_hw(*batch.shape[-2:], settings["size"])
            interpolation = INTERPOLATION[settings["resample"]]
            batch = tvF.resize(batch, list(new_hw), interpolation=interpolation, antialias=True)
        results.update(zip(members, _rescaled_and_normalized(batch, settings), strict=True))
    return [results[i] for i in range(len(images))]


def _rescaled_and_normalized(batch: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """Rescales and normalises a batch `[B, C, H, W]`, in one pass over the pixels."""
    if not settings["do_normalize"]:
        return batch * settings["rescale_factor"] if settings["do_rescale"] else batch
    mean = torch.tensor(settings["image_mean"], device=batch.device).reshape(-1)
    std = torch.tensor(settings["image_std"], device=batch.device).reshape(-1)
    channels = batch.shape[1]
    for name, values in (("image_mean", mean), ("image_std", std)):
        if channels != 1 and len(values) not in (1, channels):
            raise ValueError(f"{name}: expected {channels} values (channels), got {len(values)}")
    if settings["do_rescale"]:
        scale = 1.0 / settings["rescale_factor"]
        mean, std = mean * scale, std * scale
    if channels == 1 and len(mean) > 1:
        batch = batch.expand(-1, len(mean), -1, -1)
    fresh = batch.dtype != torch.float32  # then the cast makes a copy, which may be overwritten
    return tvF.normalize(batch.to(torch.float32), mean, std, inplace=fresh)


def batch_size_hw(
    sizes: Sequence[tuple[int, int]], pad_size: Mapping[str, int] | None
) -> tuple[int, int]:
    """Returns the size that all images are padded to: `pad_size`, or the largest sides."""
    height, width = (max(sides) for sides in zip(*sizes, strict=True))
    if pad_size is None:
        return height, width
    if pad_size["height"] < height or pad_size["width"] < width:
        raise ValueError(
            f"pad_size: expected at least {[height, width]}, "
            f"got {[pad_size['height'], pad_size['width']]}"
        )
    return pad_size["height"], pad_size["width"]


def padded_batch(
    images: Sequence[Tensor], batch_hw: tuple[int, int], fill: float = 0
) -> tuple[Tensor, Tensor]:
    """Returns images `[C, H, W]` of different sizes as a batch, and its pixel mask."""
    first = images[0]
    pixel_mask = torch.ones(len(images), *batch_hw, dtype=torch.int64, device=first.device)
    if all(tuple(image.shape[-2:]) == batch_hw for image in images):
        return (first[None] if len(images) == 1 else torch.stack(list(images))), pixel_mask
    dtype = first.dtype
    for image in images[1:]:
        dtype = torch.promote_types(dtype, image.dtype)
    pixel_values = first.new_full((len(images), len(first), *batch_hw), fill, dtype=dtype)
    for values, mask, image in zip(pixel_values, pixel_mask, images, strict=True):
        height, width = image.shape[-2:]
        values[:, :height, :width] = image
        mask[height:] = 0
        mask[:, width:] = 0
    return pixel_values, pixel_mask
