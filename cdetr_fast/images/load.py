"""Images of every kind, loaded as `[C, H, W]` tensors.

PIL images of any 8-bit mode, and files, are turned upright by their EXIF orientation and converted
to RGB. JPEG files are decoded by torchvision, to the pixels that PIL gives in a third to nine
tenths of its time (1.4 ms instead of 3.9 ms at 640x480, quality 90); on a CUDA device by nvJPEG,
whose pixels may differ by a few levels.
Arrays and tensors may be `[H, W]`, `[C, H, W]` or `[H, W, C]` with 1, 3 or 4 channels.

Every error of a file names it and is an OSError or a ValueError, whatever PIL raises.
"""

import base64
import contextlib
import os
import urllib.request
import warnings
from collections.abc import Collection, Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision import io

from cdetr_fast.common.errors import first_line

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
"""Suffixes of images in a folder; a file that is named may be called anything."""

# One image, or any nesting of lists of images; a 4-d array or tensor is a batch.
Buffer = bytes | bytearray | memoryview
ImageInput = (
    Image.Image | np.ndarray | Tensor | str | os.PathLike[str] | Buffer | BinaryIO | Sequence[Any]
)

_CHANNELS = (1, 3, 4)
_EXIF_ORIENTATION = 0x0112
_QUARTER_TURN = 5  # the lowest orientation that swaps height and width
# Axes to flip for each orientation, those from 5 on after height and width are swapped.
_FLIPS = {2: (-1,), 3: (-2, -1), 4: (-2,), 6: (-1,), 7: (-2, -1), 8: (-2,)}
_INVERSE = {6: 8, 8: 6}  # the others are their own inverse
_TIFF_LENGTH, _TIFF_WIDTH = 257, 256  # tags
_URL_TIMEOUT_SECONDS = 30
_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # torch cannot resize them
# Floats up to this limit are taken to be from 0 to 1 where the pixels are multiplied by less than
# this factor next. Interpolation overshoots both ends, by a fraction of the largest value.
_UNIT_LIMIT, _UNIT_FACTOR = 1.5, 0.1
_OVERSHOOT = 0.25
# PIL stores more than 8 bits per channel in these modes, and clips them when it converts to RGB.
_DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


def _require_8_bits(image: Image.Image) -> None:
    """Raise ValueError for pixels that PIL would clip when it converts to RGB."""
    if image.mode in _DEEP_MODES:
        raise ValueError(
            f"expected 8 bits per channel, got PIL mode {image.mode!r}; scale it to 8 bits, or "
            "pass an array with a fitting rescale_factor"
        )


def exif_orientation(image: Image.Image) -> int:
    """Return how an image has to be turned, from 1 (not at all) to 8, as EXIF or XMP has it.

    Metadata that cannot be parsed says nothing about the picture: 1, as viewers show it.
    """
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # a damaged header makes PIL's parser raise a dozen different kinds
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def turned_upright(pixels: Tensor, orientation: int) -> Tensor:
    """Turn pixels `[..., H, W]` as an EXIF orientation says."""
    if orientation >= _QUARTER_TURN:
        pixels = pixels.transpose(-2, -1)
    flips = _FLIPS.get(orientation)
    return pixels if flips is None else pixels.flip(flips)


class ImageHeader(NamedTuple):
    """Size and orientation from the header of an image file.

    Attributes:
        stored_hw: Height and width as they are stored.
        orientation: EXIF orientation, 1 to 8.
    """

    stored_hw: tuple[int, int]
    orientation: int

    @property
    def upright_hw(self) -> tuple[int, int]:
        """Height and width of the picture as it is seen."""
        height, width = self.stored_hw
        return (width, height) if self.orientation >= _QUARTER_TURN else (height, width)


def read_header(path: str | os.PathLike[str]) -> ImageHeader:
    """Read the header of an image file.

    Raises:
        OSError: The file cannot be read; the message names it.
        ValueError: Likewise.
    """
    from PIL.TiffImagePlugin import TiffImageFile  # 5 ms, where no file is read

    try:
        with Image.open(path) as image:
            stored_hw = image.height, image.width
            if isinstance(image, TiffImageFile):  # PIL turns the size of these
                stored_hw = image.tag_v2[_TIFF_LENGTH], image.tag_v2[_TIFF_WIDTH]
            return ImageHeader(stored_hw, exif_orientation(image))
    except Exception as error:  # PIL raises dozens of kinds for damaged files
        raise named_error(error, os.fspath(path)) from error


def named_error(error: Exception, name: str) -> OSError | ValueError:
    """Return what an image file's error is to the user: an OSError or ValueError that names it."""
    if isinstance(error, UnidentifiedImageError):
        return UnidentifiedImageError(f"{name}: cannot be read (not an image)")
    reason = getattr(error, "strerror", None) or first_line(error)
    text = f"{name}: cannot be read ({reason})"
    if isinstance(error, ValueError):
        return ValueError(text)
    # FileNotFoundError and the like, which callers tell apart
    is_builtin = isinstance(error, OSError) and type(error).__module__ == "builtins"
    return type(error)(text) if is_builtin else OSError(text)  # type: ignore[return-value]  # mypy does not narrow it


def image_files(folder: Path, recursive: bool = False) -> list[Path]:
    """Return the images of a folder, sorted; hidden files and folders are left out.

    Those are copies or no pictures: .ipynb_checkpoints, macOS's ._photo.jpg and __MACOSX.
    """
    return visible(folder, folder.rglob("*") if recursive else folder.iterdir(), IMAGE_SUFFIXES)


def visible(folder: Path, paths: Iterable[Path], suffixes: Collection[str]) -> list[Path]:
    """Return the paths with one of the suffixes, sorted, that are not hidden within the folder."""
    return sorted(
        path
        for path in paths
        if path.suffix.lower() in suffixes
        and not any(
            part.startswith(".") or part == "__MACOSX" for part in path.relative_to(folder).parts
        )
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
    warn_if_turned: bool = False,
    rescale_factor: float | None = None,
    recognizes_floats: bool = False,
) -> list[Tensor]:
    """Return the images as a flat list of `[C, H, W]` tensors, in the memory layout they have.

    Args:
        images: PIL images, arrays, tensors, paths, URLs, `data:image/` strings, or image files as
            bytes or open in binary mode, single or nested.
        do_convert_rgb: None: convert to RGB as PIL does, which drops transparency. True: lay
            transparent pixels over white first. False: leave the channels as they are.
        input_data_format: "channels_first" or "channels_last" for arrays and tensors; None infers
            it.
        device: Where the tensors go; None leaves them where they are.
        first: Number of the first image in error messages.
        warn_if_turned: Whether to warn of every PIL image that is turned upright, and not only
            where that swaps height and width.
        rescale_factor: What the pixels will be multiplied by, so that they end up from 0 to 1;
            arrays and tensors are checked against it. None checks nothing.
        recognizes_floats: Whether floats that are from 0 to 1 already are divided by
            `rescale_factor`, and other floats that do not fit are an error. Otherwise a warning
            says so, and they stay as they are, as in transformers.

    Raises:
        TypeError: An entry is not an image, or its dtype is not that of pixels.
        ValueError: The list is empty, a shape has no channel axis, pixels have more than 8 bits, or
            their range does not fit.
        OSError: A file cannot be read, or is not a complete image; the message names it.
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
            if not isinstance(image, bytes):
                name = os.fspath(image)[:200]  # a data: string may be megabytes long
            tensor = turned_upright(*read_file(image, name, do_convert_rgb, device))
        elif isinstance(image, Image.Image):
            tensor = _from_pil(image, name, do_convert_rgb, warn_if_turned)
        else:
            tensor = _from_array(
                image, name, do_convert_rgb, input_data_format, rescale_factor, recognizes_floats
            )
        tensors.append(tensor.to(device=device))
    return tensors


def as_picture(image: ImageInput) -> Image.Image:
    """Return one image as an upright PIL image.

    Args:
        image: As for `load_images`, but only one. PIL images keep their mode; others come out as
            RGB.

    Raises:
        As `load_images`; and ValueError for several images.
    """
    if isinstance(image, Image.Image):
        return image if exif_orientation(image) == 1 else ImageOps.exif_transpose(image)
    found = load_images([image], rescale_factor=1 / 255, recognizes_floats=True)
    if len(found) != 1:
        raise ValueError(f"image: expected one image, got {len(found)}")
    pixels = found[0].cpu().float().round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _flatten(images: Any) -> list[Any]:
    """Return the single images of any nesting of lists and batches."""
    if isinstance(images, list | tuple):
        return [image for item in images for image in _flatten(item)]
    if isinstance(images, np.ndarray | Tensor):
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, Image.Image | str | os.PathLike):
        return [images]
    if isinstance(images, Buffer):
        return [bytes(images)]
    if hasattr(images, "read"):
        with contextlib.suppress(AttributeError, OSError):  # a pipe cannot
            images.seek(0)  # as PIL does: it may have been read before
        return [images.read()]
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


def read_file(
    source: str | os.PathLike[str] | bytes,
    name: str,
    do_convert_rgb: bool | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, int]:
    """Return the pixels of an image file as they are stored, and the EXIF orientation.

    Args:
        source: Path, URL, `data:image/` string, or the bytes of a file.
        name: Name of the file in messages.
        do_convert_rgb: As in `load_images`.
        device: Where a JPEG file may be decoded.

    Returns:
        A tensor `[C, H, W]`, on the CPU or on `device`; and a number for `turned_upright`.

    Raises:
        OSError: The file cannot be read, or is not a complete image; the message names it.
        ValueError: Likewise.
    """
    try:
        content = source if isinstance(source, bytes) else _read(source)
        return _decoded(content, do_convert_rgb, device)
    except Exception as error:  # PIL raises dozens of kinds for damaged files
        raise named_error(error, name) from error


def _decoded(
    content: bytes, do_convert_rgb: bool | None, device: torch.device | str | None
) -> tuple[Tensor, int]:
    image = Image.open(BytesIO(content))  # reads only the header
    orientation = exif_orientation(image)
    # torchvision converts other modes (CMYK) differently. MPO is a JPEG with more images behind it.
    is_jpeg = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")
    if is_jpeg and do_convert_rgb is not False and hasattr(io, "decode_jpeg"):
        data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        on_cuda = device is not None and torch.device(device).type == "cuda"
        where = {"device": device} if on_cuda else {}  # by nvJPEG
        # PIL gets what torchvision refuses. Its decoders are deprecated since 0.29, with a warning
        # that a user may have turned into an error.
        with contextlib.suppress(RuntimeError, DeprecationWarning):
            return io.decode_jpeg(data, mode=io.ImageReadMode.RGB, **where), orientation
    pixels = _pixels(image, do_convert_rgb)
    if exif_orientation(image) != orientation:  # PIL turns TIFF files when it decodes them
        pixels = turned_upright(pixels, _INVERSE.get(orientation, orientation))
    return pixels, orientation


def _from_pil(
    image: Image.Image, name: str, do_convert_rgb: bool | None, warn_if_turned: bool
) -> Tensor:
    """Return a PIL image, upright and RGB, as a tensor `[C, H, W]`.

    transformers reads the pixels of a PIL image without rotating it, and only of mode RGB.
    """
    try:
        stored = _pixels(image, do_convert_rgb)
    except Exception as error:  # an image that was opened is decoded here
        name = f"{name} ({path})" if (path := getattr(image, "filename", "")) else name
        raise named_error(error, name) from error
    orientation = exif_orientation(image)  # that of a TIFF file is gone once it is decoded
    pixels = turned_upright(stored, orientation)
    if orientation != 1 and (warn_if_turned or pixels.shape != stored.shape):
        height, width = image_hw(pixels)
        warnings.warn(
            f"{name}: turned upright by its EXIF orientation {orientation}: its size is now "
            f"{height} x {width} (height x width); take target sizes and labels from there, or "
            "pass numpy.asarray(image) to take the pixels as they are stored",
            stacklevel=5,
        )
    return pixels


def _pixels(image: Image.Image, do_convert_rgb: bool | None) -> Tensor:
    """Return the pixels of a PIL image as they are stored, `[C, H, W]`."""
    if do_convert_rgb is not False and image.mode != "RGB":
        _require_8_bits(image)
        has_alpha = "A" in image.getbands() or "transparency" in image.info
        if do_convert_rgb and has_alpha:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
        image = image.convert("RGB")
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)


def _in_range(
    image: Tensor, name: str, rescale_factor: float, recognizes_floats: bool
) -> tuple[Tensor, float]:
    """Return an image whose values suit the rescaling that follows, and the value of its white.

    See `load_images`. White is 1 where floats are taken to be from 0 to 1, as they come or because
    others are an error of their own.
    """
    if image.dtype == torch.uint8:
        return image, 255
    countable = image.to(torch.int64) if image.dtype in _UNSIGNED else image
    low, high = (value.item() for value in countable.aminmax())
    largest = max(255, round(1 / rescale_factor))
    may_leave = False
    if not image.is_floating_point():
        fits = low >= 0 and high <= largest
    elif rescale_factor < _UNIT_FACTOR and low >= -_OVERSHOOT and high <= _UNIT_LIMIT:
        if recognizes_floats:
            return image / rescale_factor, 1 / rescale_factor
        fits, may_leave = high == 0, True
    else:
        fits = low >= -_OVERSHOOT * high and high <= (1 + _OVERSHOOT) * largest
        may_leave = not recognizes_floats
    is_unit = image.is_floating_point() and not (recognizes_floats and high > _UNIT_LIMIT)
    white = 1 if is_unit else largest
    if fits:
        return image, white
    kind = str(image.dtype).removeprefix("torch.")
    text = (
        f"{name}: expected pixels from 0 to {largest}, got {kind} in the range {low:g} to "
        f"{high:g}; scale them, or set do_rescale=False if they are from 0 to 1, and "
        "do_normalize=False too if they are normalised"
    )
    if not may_leave:
        raise ValueError(text)
    warnings.warn(text, stacklevel=6)
    return image, white


def _from_array(
    image: np.ndarray | Tensor,
    name: str,
    do_convert_rgb: bool | None,
    input_data_format: str | None,
    rescale_factor: float | None,
    recognizes_floats: bool,
) -> Tensor:
    """Return an array or tensor as an RGB tensor `[C, H, W]`."""
    if isinstance(image, np.ndarray):
        if image.dtype.kind not in "uif":
            raise TypeError(f"{name}: expected integers or floats, got {image.dtype}")
        # Flipped views and read-only arrays cannot share memory with a tensor.
        image = torch.from_numpy(np.require(image, requirements=("C", "W")))
    elif image.is_complex() or image.dtype == torch.bool:
        raise TypeError(f"{name}: expected integers or floats, got {image.dtype}")

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
    white: float = 1 if image.is_floating_point() else 255
    if rescale_factor is not None:
        image, white = _in_range(image, name, rescale_factor, recognizes_floats)
    if image.dtype in _UNSIGNED:
        image = image.to(torch.float32)

    if do_convert_rgb is False or image.shape[0] == 3:
        return image
    if image.shape[0] == 1:
        return image.expand(3, -1, -1)
    return _over_white(image, name, white) if do_convert_rgb else image[:3]


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


def _over_white(image: Tensor, name: str, white: float) -> Tensor:
    """Lay an RGBA image with values from 0 to `white` over white."""
    if white == 1 and (image.amin() < 0 or image.amax() > 1):  # others were checked before
        raise ValueError(
            f"{name}: expected RGBA floats in [0, 1], "
            f"got [{image.amin().item()}, {image.amax().item()}]"
        )
    if image.dtype == torch.uint8:
        from torchvision.transforms.v2 import functional as tvF  # 15 ms, once

        rgba = tvF.to_dtype(image, torch.float32, scale=True)
        return tvF.to_dtype(_laid_over_white(rgba), torch.uint8, scale=True)
    laid = _laid_over_white(image.to(torch.float32) / white) * white
    return laid.to(image.dtype) if image.is_floating_point() else laid.round().to(image.dtype)


def _laid_over_white(rgba: Tensor) -> Tensor:
    color, alpha = rgba[:3], rgba[3:].clamp(0, 1)
    return color * alpha + (1 - alpha)
