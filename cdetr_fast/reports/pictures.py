"""Pictures inside a page: small JPEGs as data URIs; the browser draws boxes and masks on them."""

from __future__ import annotations

import base64
import io
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torchvision.ops import box_convert

from cdetr_fast.images.draw import MASK_OPACITY, class_colour, inner_edge

_LONGEST_CAPTION = 28  # characters
_MOST_BOXES = 300  # of a picture
_LINE = 13.0  # units, height of a caption
_LETTER = 6.8  # units, width of a letter on average
_WIDEST = 1.1  # of a caption, relative to that estimate
_CAPTIONED = 0.25  # most of a picture's area that captions cover


@dataclass(frozen=True)
class Picture:
    """A picture that a page contains.

    Attributes:
        uri: Its data URI.
        width: Units of the drawing over it, whose longest edge is the same for all images.
        height: Likewise.
        scale: Units per pixel of the image.
    """

    uri: str
    width: float
    height: float
    scale: float


@dataclass(frozen=True)
class Mask:
    """A mask over a picture, in the picture's units.

    Attributes:
        left: Likewise `top`, `width` and `height`.
        uri: Data URI of a PNG that is transparent outside the mask.
    """

    left: float
    top: float
    width: float
    height: float
    uri: str


@dataclass(frozen=True)
class Caption:
    """A caption over a picture.

    Attributes:
        x: Its left end, or its right one.
        y: Its base line.
        text: Class name and score, shortened.
        ends: Whether `x` is the right end: browsers' letters differ in width, and the picture's
            edge cuts them off.
    """

    x: float
    y: float
    text: str
    ends: bool


@dataclass(frozen=True)
class Box:
    """A box over a picture, in the picture's units.

    Attributes:
        left: Likewise `top`, `width` and `height`.
        colour: Of the class, for CSS.
        label: Class index.
        score: In [0, 1]; None for labels.
        title: Class name and score, in full.
        caption: None if it has no room.
        mask: Of the object; None without one.
    """

    left: float
    top: float
    width: float
    height: float
    colour: str
    label: int
    score: float | None
    title: str
    caption: Caption | None
    mask: Mask | None = None


def embed(image: Image.Image, edge: int, quality: int = 78) -> Picture:
    """Return an image for a page.

    Args:
        image: Any size and mode.
        edge: Longest edge of the picture, in units; and in pixels, unless the image is smaller.
        quality: Of the JPEG.
    """
    scale = edge / max(image.size)
    sides = [max(1.0, round(side * scale, 1)) for side in image.size]
    small = image.convert("RGB")
    if scale < 1:
        small = small.resize((round(sides[0]), round(sides[1])), reducing_gap=2.0)
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=quality)
    content = base64.b64encode(stream.getvalue()).decode("ascii")
    return Picture(f"data:image/jpeg;base64,{content}", sides[0], sides[1], scale)


def boxes_over(
    picture: Picture,
    boxes_xyxy: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray | None,
    id2label: Mapping[int, str],
    mask_of: Callable[[int], np.ndarray] | None = None,
) -> list[Box]:
    """Return the boxes of an image over its picture, the highest score last, which is on top.

    Args:
        picture: Of the image.
        boxes_xyxy: `[n, 4]` pixels of the image; those that are not finite are left out.
        labels: `[n]` class indices.
        scores: `[n]`, or None.
        id2label: Class names; an index without one is written as a number.
        mask_of: Returns the mask of an object by its index, bool `[h, w]` over the whole image in
            any resolution.
    """
    order = np.arange(len(labels)) if scores is None else np.argsort(scores, kind="stable")
    order = order[np.isfinite(boxes_xyxy[order]).all(1)][-_MOST_BOXES:]
    corners = boxes_xyxy.astype(np.float64) * picture.scale
    corners = corners.clip(0, [picture.width, picture.height] * 2)
    placed = box_convert(torch.from_numpy(corners), "xyxy", "xywh").numpy().round(1)
    placed[:, 2:] = placed[:, 2:].clip(min=1)
    captions = _Captions(picture)
    found = []
    for i in order[::-1].tolist():  # the highest score chooses its caption's place first
        left, top, width, height = placed[i].tolist()
        label = int(labels[i])
        name = id2label.get(label, str(label))
        score = None if scores is None else round(float(scores[i]), 4)
        shown = "" if score is None else f" {score:.2f}"
        short = name if len(name) <= _LONGEST_CAPTION else f"{name[: _LONGEST_CAPTION - 1]}…"
        found.append(
            Box(
                *(left, top, width, height),
                colour=css_colour(label),
                label=label,
                score=score,
                title=name + shown,
                caption=captions.place(short + shown, left, top, top + height),
                mask=None if mask_of is None else _mask_over(picture, mask_of(i), label),
            )
        )
    return found[::-1]


def _mask_over(picture: Picture, mask: np.ndarray, label: int) -> Mask | None:
    """Return a mask as `draw_masks` draws it; None if it has no pixel of the picture."""
    size = round(picture.width), round(picture.height)
    inside = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    if not len(rows):
        return None
    top, left = int(rows[0]), int(columns[0])
    part = inside[top : rows[-1] + 1, left : columns[-1] + 1]
    levels = part.astype(np.uint8)
    levels[inner_edge(part)] = 2
    drawn = Image.fromarray(levels)
    drawn.putpalette([0, 0, 0, *class_colour(label) * 2])
    stream = io.BytesIO()
    opacities = bytes([0, round(255 * MASK_OPACITY), 255])
    drawn.save(stream, "PNG", optimize=True, bits=2, transparency=opacities)
    uri = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
    return Mask(left, top, part.shape[1], part.shape[0], uri)


class _Captions:
    """Places of captions: above, inside or below their boxes, and none over another.

    The first ones count; there are no further ones when they cover `_CAPTIONED` of the picture.
    """

    def __init__(self, picture: Picture) -> None:
        self.picture = picture
        self.taken: list[tuple[float, float, float]] = []

    def place(self, text: str, left: float, top: float, bottom: float) -> Caption | None:
        covered = sum(end - start for start, end, _ in self.taken) * _LINE
        if covered > _CAPTIONED * self.picture.width * self.picture.height:
            return None
        wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
        width = (len(text) + wide) * _LETTER
        ends = left + 2 + _WIDEST * width > self.picture.width > width
        left = self.picture.width - width if ends else round(left + 2, 1)
        if width > self.picture.width:
            left = 0.0
        for base in (top - 3, top + _LINE - 2, bottom + _LINE - 2, bottom - 3):
            base = round(base, 1)
            if not _LINE - 3 <= base <= self.picture.height - 2:
                continue
            if not any(
                abs(base - other) < _LINE and left < end and start < left + width
                for start, end, other in self.taken
            ):
                self.taken.append((left, left + width, base))
                x = round(self.picture.width - 2, 1) if ends else left
                return Caption(x, base, text, ends)
        return None


def css_colour(label: int) -> str:
    """Return the colour of a class, the one it has in every picture of this package."""
    return "#{:02x}{:02x}{:02x}".format(*class_colour(label))
