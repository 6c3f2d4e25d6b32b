"""Inputs and models that several benchmarks share: pairs of models, images, labels, files."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import cdetr_fast

Labels = list[dict[str, Tensor]]

ERRORS = ("max |dlogit|", "max box error, px")


def add_image_options(
    parser: argparse.ArgumentParser, size: tuple[int, int], backbone: str
) -> None:
    """Add the options that say which images a model gets."""
    parser.add_argument("--backbone", default=backbone)
    parser.add_argument("--size", type=int, nargs=2, default=size, metavar=("H", "W"))
    parser.add_argument("--batch", type=int, default=1)


def add_dtype_option(parser: argparse.ArgumentParser) -> None:
    """Add the option for the dtype of weights and images."""
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))


def model_pair(
    implementation: str = "sdpa", compat: str = "paper", **settings: Any
) -> tuple[Any, Any]:
    """Return transformers' model and ours with equal weights, in eval mode.

    Weights are the initial ones of the paper, as those of transformers make all queries alike,
    which hides differences; norms and the last box layer are random.
    """
    import transformers

    torch.manual_seed(0)
    ours = cdetr_fast.ConditionalDetrForObjectDetection(
        cdetr_fast.ConditionalDetrConfig(**settings, compat=compat)
    )
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "norm" in name:
                nn.init.uniform_(parameter, 0.5, 1.5)
            elif "bbox_predictor.layers.2" in name:
                nn.init.normal_(parameter, std=0.05)
    config: Any = transformers.ConditionalDetrConfig(**settings)
    config._attn_implementation = implementation
    theirs = transformers.ConditionalDetrForObjectDetection(config)
    theirs.load_state_dict(ours.state_dict())
    return theirs.eval(), ours.eval()


def random_images(batch: int, size: tuple[int, int], padded: bool = False) -> tuple[Tensor, Tensor]:
    """Return images and their mask; if padded, all but the first have a quarter less height."""
    height, width = size
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(batch, 3, height, width, generator=generator)
    pixel_mask = torch.ones(batch, height, width, dtype=torch.int64)
    if padded:
        pixel_mask[1:, height * 3 // 4 :] = 0
    return pixel_values, pixel_mask


def random_labels(batch: int, targets: int, device: torch.device, classes: int = 91) -> Labels:
    """Return labels of a batch, the same number of targets for each image."""
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "class_labels": torch.randint(0, classes, (targets,), generator=generator).to(device),
            "boxes": (torch.rand(targets, 4, generator=generator) * 0.5 + 0.2).to(device),
        }
        for _ in range(batch)
    ]


def output_errors(size: tuple[int, int]) -> Callable[[Any, Any], dict[str, float]]:
    """Return the errors of detection outputs for images of a size."""

    def errors(got: Any, expected: Any) -> dict[str, float]:
        logits = (got.logits - expected.logits).abs().max().item()
        boxes = (got.pred_boxes - expected.pred_boxes).abs().max().item()
        return dict(zip(ERRORS, (logits, boxes * max(size)), strict=True))

    return errors


def photograph(path: Path | None = None) -> Image.Image:
    """Return a file at 640x480, or clouds of colour with noise, as hard to compress as a photo."""
    if path is not None:
        return Image.open(path).convert("RGB").resize((640, 480))
    random = np.random.default_rng(0)
    cells = random.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    smooth = np.array(Image.fromarray(cells).resize((640, 480), Image.Resampling.BICUBIC))
    noisy = smooth + random.normal(0, 6, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def write_photographs(folder: Path, images: int) -> list[Path]:
    """Write that many different JPEG files."""
    photo = photograph()
    paths = [folder / f"{i}.jpg" for i in range(images)]
    for i, path in enumerate(paths):
        photo.rotate(i).save(path, quality=90)
    return paths
