"""`ConditionalDetrImageProcessor`: images and annotations in, batches out, outputs in, results out."""

import json
import os
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tvF

from cdetr_fast import validation as check
from cdetr_fast.files import (
    DOWNLOAD_OPTIONS,
    make_folder,
    read_json,
    resolve_file,
    write_atomically,
)
from cdetr_fast.image_processing import annotations as targets
from cdetr_fast.image_processing import post_processing
from cdetr_fast.image_processing.batch_feature import BatchFeature
from cdetr_fast.image_processing.inputs import ImageInput, load_images
from cdetr_fast.image_processing.sizes import check_pad_size, check_size, resized_hw

PREPROCESSOR_NAME = "preprocessor_config.json"
PROCESSOR_NAME = "processor_config.json"  # of a whole processor, with this one inside
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# transformers and torchvision name the filters differently; NEAREST_EXACT is PIL's NEAREST.
_INTERPOLATION = {
    Image.Resampling.NEAREST: InterpolationMode.NEAREST_EXACT,
    Image.Resampling.BOX: InterpolationMode.BOX,
    Image.Resampling.BILINEAR: InterpolationMode.BILINEAR,
    Image.Resampling.HAMMING: InterpolationMode.HAMMING,
    Image.Resampling.BICUBIC: InterpolationMode.BICUBIC,
    Image.Resampling.LANCZOS: InterpolationMode.LANCZOS,
}


def _check_resample(name: str, value: Any) -> Image.Resampling:
    for resampling, interpolation in _INTERPOLATION.items():
        if value == interpolation or (isinstance(value, int) and value == resampling):
            return resampling
    if value == InterpolationMode.NEAREST:
        return Image.Resampling.NEAREST
    check.refuse(name, "a PIL.Image.Resampling or its number", value)


def _check_channel_values(name: str, value: Any) -> float | tuple[float, ...]:
    if isinstance(value, int | float):
        return float(value)
    if not isinstance(value, Sequence) or not all(isinstance(v, int | float) for v in value):
        check.refuse(name, "a number or one per channel", value)
    return tuple(value)


def _check_device(name: str, value: Any) -> torch.device:
    try:
        return torch.device(value)
    except (RuntimeError, TypeError):
        check.refuse(name, "a torch device", value)


# Every setting: its default, and the check that also brings it into its stored form. None means the
# default, as in transformers, so that null in a file does too.
_SETTINGS = {
    "format": ("coco_detection", check.choice(*targets.FORMATS)),
    "do_resize": (True, check.flag),
    "size": ({"shortest_edge": 800, "longest_edge": 1333}, check_size),
    "resample": (Image.Resampling.BILINEAR, _check_resample),
    "do_rescale": (True, check.flag),
    "rescale_factor": (1 / 255, check.number(0)),
    "do_normalize": (True, check.flag),
    "image_mean": (IMAGENET_MEAN, _check_channel_values),
    "image_std": (IMAGENET_STD, _check_channel_values),
    "do_convert_annotations": (None, check.flag),
    "do_pad": (True, check.flag),
    "pad_size": (None, check_pad_size),
    "do_convert_rgb": (None, check.flag),
    "data_format": (None, check.choice("channels_first", "channels_last")),
    "input_data_format": (None, check.choice("channels_first", "channels_last")),
    "device": (None, _check_device),
    "return_tensors": (None, check.choice("pt", "np")),
    "disable_grouping": (None, check.flag),
    "compat": ("paper", check.choice("paper", "transformers")),
}
