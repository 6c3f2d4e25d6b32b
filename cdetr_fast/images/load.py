"""Images of every kind, loaded as `[C, H, W]` tensors.

PIL images of any 8-bit mode, and files, are turned upright by their EXIF orientation and converted
to RGB. JPEG files are decoded by torchvision, to the pixels that PIL gives in a third to nine
tenths of its time (1.4 ms instead of 3.9 ms at 640x480, quality 90); on a CUDA device by nvJPEG,
whose pixels may differ by a few levels.
Arrays and tensors may be `[H, W]`, `[C, H, W]` or `[H, W, C]` with 1, 3 or 4 channels.
"""

import base64
import contextlib
import os
import urllib.request
import warnings
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision import io

# One image, or any nesting of lists of images; a 4-d array or tensor is a batch.
ImageInput = Image.Image | np.ndarray | Tensor | str | os.PathLike[str] | bytes | Sequence[Any]

_CHANNELS = (1, 3, 4)
_EXIF_ORIENTATION = 0x0112
_URL_TIMEOUT_SECONDS = 30
# PIL stores more than 8 bits per channel in these modes, and clips them when it converts to RGB.
_DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


def require_8_bits(image: Image.Image) -> None:
    """Raise ValueError for pixels that PIL would clip when it converts to RGB."""
    if image.mode in _DEEP_MODES:
        raise ValueError(
            f"expected 8 bits per channel, got PIL mode {image.mode!r}; scale it to 8 bits"
        )


def image_hw(image: Tensor) -> tuple[int, int]:
    """Return the height and width of an image `[..., H, W]`."""
    return image.shape[-2], image.shape[-1]


def load_images(
    images: ImageInput,
    do_convert_rgb: bool | None = None,
    input_data_format: str | None = None,
    device: torch.device | str | None = None,
    first: int = 0,
) -> list[Tensor]:
    """Return the images as a flat list of `[C, H, W]` tensors, in the memory layout they have.

    Args:
        images: PIL images, arrays, tensors, paths, URLs, `data:image/` strings or the bytes of
            image files, single or nested.
        do_convert_rgb: None: convert to RGB as PIL does, which drops transparency. True: lay
            transparent pixels over white first. False: leave the channels as they are.
        input_data_format: "channels_first" or "channels_last" for arrays and tensors; None infers
            it.
        device: Where the tensors go; None leaves them where they are.
        first: Number of the first image in error messages.

    Raises:
        TypeError: An entry is not an image, or its dtype is not that of pixels.
        ValueError: The list is empty, or a shape has no channel axis.
        OSError: A file cannot be read, or is not a complete image.
    """
    if input_data_format not in (None, "channels_first", "channels_last"):
        raise ValueError(
            "input_data_format: expected 'channels_first', 'channels_last' or None, "
            f"got {input_data_format!r}"
        )
    flat = _flatten(images)
    if not flat:
        raise ValueError("images: expected at least one image, got an empty list")
    tensors = []
    for position, image in enumerate(flat, first):
        name = f"images[{position}]"
        if isinstance(image, str | os.PathLike | bytes):
            tensor = _from_file(image, name, do_convert_rgb, device)
        elif isinstance(image, Image.Image):
            tensor = _from_pil(image, name, do_convert_rgb, warn_if_turned=True)
        else:
            tensor = _from_array(image, name, do_convert_rgb, input_data_format)
        tensors.append(tensor.to(device=device))
    return tensors


def _flatten(images: Any) -> list[Any]:
    """Return the single images of any nesting of lists and batches."""
    if isinstance(images, list | tuple):
        return [image for item in images for image in _flatten(item)]
    if isinstance(images, np.ndarray | Tensor):
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, Image.Image | str | os.PathLike | bytes):
        return [images]
    raise TypeError(
        "images: expected PIL images, numpy arrays, tensors, paths or lists of them, "
        f"got {type(images).__name__}"
    )


def _read(source: str | os.PathLike[str]) -> bytes:
    """Read an image file, an http(s) URL, or a `data:image/` string."""
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        with urllib.request.urlopen(source, timeout=_URL_TIMEOUT_SECONDS) as response:
            return response.read()
    if isinstance(source, str) and source.startswith("data:image/"):
        return base64.b64decode(source.partition(",")[2])
    return Path(source).read_bytes()


def _from_file(
    source: str | os.PathLike[str] | bytes,
    name: str,
    do_convert_rgb: bool | None,
    device: torch.device | str | None,
) -> Tensor:
    """Return the image in a file, upright and RGB, as a tensor `[C, H, W]`."""
    if isinstance(source, bytes):
        content = source
    else:
        content = _read(source)
        name = os.fspath(source)[:200]  # a data: string may be megabytes long
    try:
        return _decoded(content, name, do_convert_rgb, device)
    except UnidentifiedImageError as error:
        raise UnidentifiedImageError(f"{name}: not an image that can be read") from error
    except (OSError, SyntaxError) as error:  # PIL raises the second for damaged PNG files
        raise OSError(f"{name}: {error}") from error


def _decoded(
    content: bytes, name: str, do_convert_rgb: bool | None, device: torch.device | str | None
) -> Tensor:
    image = Image.open(BytesIO(content))  # reads only the header
    # torchvision converts other modes (CMYK) differently. MPO is a JPEG with more images behind it.
    is_jpeg = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")
    if is_jpeg and do_convert_rgb is not False and hasattr(io, "decode_jpeg"):
        data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        upright = image.getexif().get(_EXIF_ORIENTATION, 1) == 1
        on_cuda = device is not None and torch.device(device).type == "cuda"
        # PIL gets what torchvision refuses. Its decoders are deprecated since 0.29, with a warning
        # that a user may have turned into an error.
        with contextlib.suppress(RuntimeError, DeprecationWarning):
            if on_cuda and upright:  # nvJPEG does not rotate images
                return io.decode_jpeg(data, mode=io.ImageReadMode.RGB, device=device)
            return io.decode_jpeg(data, mode=io.ImageReadMode.RGB, apply_exif_orientation=True)
    return _from_pil(image, name, do_convert_rgb, warn_if_turned=False)


def _from_pil(
    image: Image.Image, name: str, do_convert_rgb: bool | None, warn_if_turned: bool
) -> Tensor:
    """Return a PIL image, upright and RGB, as a tensor `[C, H, W]`.

    transformers reads the pixels of a PIL image without rotating it, and only of mode RGB.
    """
    orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    if orientation != 1:
        size_before = image.size
        image = ImageOps.exif_transpose(image)
        if warn_if_turned and image.size != size_before:
            warnings.warn(
                f"{name}: turned upright by its EXIF orientation {orientation}: its size is now "
                f"{image.height} x {image.width} (height x width); take target sizes from there",
                stacklevel=4,
            )
    if do_convert_rgb is not False and image.mode != "RGB":
        try:
            require_8_bits(image)
        except ValueError as error:
            raise ValueError(
                f"{name}: {error}, or pass an array with a fitting rescale_factor"
            ) from error
        has_alpha = "A" in image.getbands() or "transparency" in image.info
        if do_convert_rgb and has_alpha:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
        image = image.convert("RGB")
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)


def _from_array(
    image: np.ndarray | Tensor,
    name: str,
    do_convert_rgb: bool | None,
    input_data_format: str | None,
) -> Tensor:
    """Return an array or tensor as an RGB tensor `[C, H, W]`."""
    if isinstance(image, np.ndarray):
        if image.dtype.kind not in "uif":
            raise TypeError(f"{name}: expected integers or floats, got {image.dtype}")
        # Flipped views and read-only arrays cannot share memory with a tensor.
        image = torch.from_numpy(np.require(image, requirements=("C", "W")))
    elif image.is_complex() or image.dtype == torch.bool:
        raise TypeError(f"{name}: expected integers or floats, got {image.dtype}")
    if image.dtype in (torch.uint16, torch.uint32, torch.uint64):
        image = image.to(torch.float32)  # torch resizes no unsigned type but uint8

    if image.dim() == 2:
        image = image[None]
    elif image.dim() != 3:
        raise ValueError(
            f"{name}: expected [H, W], [C, H, W] or [H, W, C], got {list(image.shape)}"
        )
    elif _is_channels_last(image, name, input_data_format):
        image = image.permute(2, 0, 1)
    if min(image.shape) == 0:
        raise ValueError(f"{name}: expected at least one pixel, got {list(image.shape)}")

    if do_convert_rgb is False or image.shape[0] == 3:
        return image
    if image.shape[0] == 1:
        return image.expand(3, -1, -1)
    return _over_white(image, name) if do_convert_rgb else image[:3]


def _is_channels_last(image: Tensor, name: str, input_data_format: str | None) -> bool:
    """Return whether the last axis holds the channels; if both could, the first does."""
    if input_data_format is not None:
        last = input_data_format == "channels_last"
    else:
        last = image.shape[0] not in _CHANNELS
    channels = image.shape[2 if last else 0]
    if channels not in _CHANNELS:
        raise ValueError(f"{name}: expected 1, 3 or 4 channels, got shape {list(image.shape)}")
    return last


def _over_white(image: Tensor, name: str) -> Tensor:
    """Lay an RGBA image over white; uint8, or floats in [0, 1]."""
    if image.is_floating_point() and (image.amin() < 0 or image.amax() > 1):
        raise ValueError(
            f"{name}: expected RGBA floats in [0, 1], "
            f"got [{image.amin().item()}, {image.amax().item()}]"
        )
    from torchvision.transforms.v2 import functional as tvF  # 15 ms, once

    rgba = tvF.to_dtype(image, torch.float32, scale=True)
    color, alpha = rgba[:3], rgba[3:]
    return tvF.to_dtype(color * alpha + (1 - alpha), image.dtype, scale=True)
