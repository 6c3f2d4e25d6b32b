"""Images of different sizes to one normalised batch, in plain PyTorch.

    values[b, c, y, x] = (image_b[c, y, x] - mean[c] / r) / (std[c] / r)
                       = image_b[c, y, x] * r                             without a mean
    mask[b, y, x]      = 1 inside of image b; outside, both are 0

with r the rescale factor; mean / r and std / r are rounded to fp32 once, as in torchvision-based
processors, so that a pixel costs one subtraction and one division.

Dimensions: B batch, C channels, h x w an image, H x W the batch.
Source: the fused rescale-and-normalise of transformers' torchvision image processors.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def normalize_and_pad(
    images: Sequence[Tensor],
    shift: Sequence[float] | None,
    divisor: Sequence[float] | None,
    factor: float,
    height: int,
    width: int,
) -> tuple[Tensor, Tensor]:
    """Return the images as one batch, padded with 0 at the bottom and on the right.

    Args:
        images: B images `[C, h, w]`.
        shift: `mean / r` of each channel; None multiplies by `factor` instead.
        divisor: `std / r` of each channel; None exactly if `shift` is.
        factor: `r`, used without `shift`.
        height: H, at least every h.
        width: W, at least every w.

    Returns:
        values fp32 `[B, C, H, W]` and mask int64 `[B, H, W]`, 1 inside of an image.
    """
    channels, device = images[0].shape[0], images[0].device
    values = torch.zeros(len(images), channels, height, width, device=device)
    mask = torch.zeros(len(images), height, width, dtype=torch.int64, device=device)
    if shift is not None:
        of_channel = torch.tensor([shift, divisor], dtype=torch.float32, device="cpu")
        of_channel = of_channel.to(device, non_blocking=True)  # the host does not wait for a GPU
        subtracted, divided = of_channel[:, :, None, None]
    for i, image in enumerate(images):
        h, w = image.shape[1:]
        inside = values[i, :, :h, :w]
        inside.copy_(image)
        if shift is None:
            inside.mul_(factor)
        else:
            inside.sub_(subtracted).div_(divided)
        mask[i, :h, :w] = 1
    return values, mask
