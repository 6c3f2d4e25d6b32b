"""Detections, segments and attention maps drawn on pictures."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

Box = tuple[float, float, float, float]

MASK_OPACITY = 0.5
"""Of the colour inside a mask; its edge is opaque."""

_GOLDEN_RATIO = 0.618033988749895
# Colours of a heat map from its lowest to its highest value, evenly spaced.
_HEAT = np.array(
    [(40, 10, 90), (120, 28, 110), (187, 55, 84), (237, 105, 37), (251, 180, 26), (252, 255, 190)],
    dtype=np.float32,
)


def class_colour(label: int) -> tuple[int, int, int]:
    """Return the RGB colour of a class, the same in every picture.

    Args:
        label: Class index.

    Returns:
        Three integers from 0 to 255. The hues of successive labels are far apart.
    """
    hue = (0.02 + label * _GOLDEN_RATIO) % 1.0
    value = (1.0, 0.75, 0.9)[label % 3]
    saturation = (0.85, 0.95, 0.6)[label % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_detections(
    image: Image.Image,
    boxes_xyxy: torch.Tensor | np.ndarray | Sequence[Sequence[float]],
    labels: torch.Tensor | np.ndarray | Sequence[int],
    scores: torch.Tensor | np.ndarray | Sequence[float] | None,
    id2label: Mapping[int, str],
) -> Image.Image:
    """Draw boxes with their class names and scores on a copy of an image.

    Args:
        image: Picture of any mode and size.
        boxes_xyxy: `[T, 4]` pixels: left, top, right, bottom. Cut off at the image's edges.
        labels: `[T]` class indices.
        scores: `[T]` in [0, 1]; None draws names alone. The highest scores come out on top.
        id2label: Class names; an index without one is written as a number.

    Returns:
        A new RGB image of the same size.

    Raises:
        ValueError: If the lengths differ, or a box is not finite or has its corners swapped.
    """
    boxes = _to_numpy(boxes_xyxy, np.float64).reshape(-1, 4)
    classes = _to_numpy(labels, np.int64)
    if classes.shape != (len(boxes),):
        raise ValueError(f"labels: expected [{len(boxes)}], got {list(classes.shape)}")
    if not (np.isfinite(boxes).all() and (boxes[:, :2] <= boxes[:, 2:]).all()):
        raise ValueError("boxes_xyxy: expected finite boxes with left <= right and top <= bottom")
    captions = [id2label.get(int(label), str(int(label))) for label in classes]
    order = np.arange(len(boxes))
    if scores is not None:
        values = _to_numpy(scores, np.float64)
        if values.shape != (len(boxes),):
            raise ValueError(f"scores: expected [{len(boxes)}], got {list(values.shape)}")
        captions = [f"{name} {value:.2f}" for name, value in zip(captions, values, strict=True)]
        order = np.argsort(values, kind="stable")

    picture = image.convert("RGB")
    if picture is image:
        picture = image.copy()
    draw = ImageDraw.Draw(picture)
    line = _line_width(picture.size)
    corner = np.array([picture.width - 1, picture.height - 1] * 2)
    boxes = np.clip(boxes, 0, corner)
    for i in order:
        draw.rectangle(boxes[i].tolist(), outline=class_colour(int(classes[i])), width=line)

    captioner = _Captioner(draw, picture.size)
    for i in order[::-1]:  # the highest score chooses first among free positions
        left, top, _, bottom = boxes[i].tolist()
        captioner.write(captions[i], left, top, bottom, class_colour(int(classes[i])))
    return picture


def draw_masks(
    image: Image.Image,
    segmentation: torch.Tensor | np.ndarray,
    segments_info: Iterable[Mapping[str, Any]],
    id2label: Mapping[int, str],
    opacity: float = MASK_OPACITY,
) -> Image.Image:
    """Tint each segment of a segmentation result in the colour of its class, on a copy of an image.

    Args:
        image: Picture of any mode.
        segmentation: `[H, W]` integer segment ids, as the image processor's instance and panoptic
            post-processing return them; ids that `segments_info` does not list stay untouched.
        segments_info: One mapping per segment, with "id", "label_id" and, if there is one, "score".
        id2label: Class names; an index without one is written as a number.
        opacity: 0 leaves the picture as it is, 1 hides it below the colours.

    Returns:
        A new RGB image of the same size.

    Raises:
        ValueError: If the segmentation is not of the image's size.
    """
    segments = _to_numpy(segmentation, np.int64)
    if segments.shape != (image.height, image.width):
        raise ValueError(
            f"segmentation: expected [{image.height}, {image.width}], got {list(segments.shape)}"
        )
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32).copy()
    captions = []
    for info in segments_info:
        mask = segments == info["id"]
        if not mask.any():
            continue
        label = int(info["label_id"])
        colour = class_colour(label)
        pixels[mask] += opacity * (np.array(colour, dtype=np.float32) - pixels[mask])
        pixels[inner_edge(mask)] = colour
        name = id2label.get(label, str(label))
        score = info.get("score")
        rows, columns = np.nonzero(mask)  # a pixel of the segment; its centroid may be outside
        row = rows[len(rows) // 2]
        column = np.median(columns[rows == row])
        caption = name if score is None else f"{name} {score:.2f}"
        captions.append((caption, float(column), float(row), colour))

    picture = Image.fromarray((pixels + 0.5).astype(np.uint8))
    captioner = _Captioner(ImageDraw.Draw(picture), picture.size)
    for caption, left, top, colour in captions:
        captioner.write(caption, left, top, top, colour)
    return picture


def draw_heatmap(
    image: Image.Image,
    weights: np.ndarray,
    extent: tuple[float, float],
    box_xyxy: Sequence[float],
    point_xy: Sequence[float],
    label: int,
    caption: str,
) -> Image.Image:
    """Draw a map of weights over a picture, with a box and a point.

    Args:
        image: Picture of any mode; it appears dark and with little colour under the map.
        weights: `[h, w]`, 0 or more; the brightest colour stands for the largest.
        extent: Width and height of the picture in cells of the map, from its upper left corner on.
        box_xyxy: Pixels of the picture; cut off at its edges.
        point_xy: Pixels of the picture.
        label: Class index, which gives the colour of the caption.
        caption: Written into the upper left corner.

    Returns:
        A new RGB image of the same size.
    """
    largest = weights.max()
    scaled = weights / largest if largest > 0 else weights
    heat = np.asarray(
        Image.fromarray(scaled.astype(np.float32)).resize(
            image.size, Image.Resampling.BICUBIC, box=(0, 0, *extent)
        )
    ).clip(0, 1)
    steps = np.linspace(0, 1, len(_HEAT))
    colours = np.stack([np.interp(heat, steps, channel) for channel in _HEAT.T], axis=-1)
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    grey = np.asarray(image.convert("L"), dtype=np.float32)[..., None]
    background = 0.25 * pixels + 0.45 * grey
    opacity = 0.9 * (heat**0.75)[..., None]
    blended = background + opacity * (colours - background)

    picture = Image.fromarray((blended + 0.5).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    line = _line_width(picture.size)
    corner = np.array([picture.width - 1, picture.height - 1] * 2)
    box = np.clip(np.asarray(box_xyxy), 0, corner)
    around = np.array([-1, -1, 1, 1])
    draw.rectangle((box + around).tolist(), outline="black", width=line + 2)  # seen on any ground
    draw.rectangle(box.tolist(), outline="white", width=line)
    x, y = point_xy
    for radius, fill in ((2 * line + 1, "black"), (2 * line, "white")):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    # Larger than on a picture by itself: these are looked at side by side.
    _Captioner(draw, picture.size, 0.055).write(caption, 0, 0, 0, class_colour(label))
    return picture


def contact_sheet(images: Sequence[Image.Image], columns: int, gap: int = 6) -> Image.Image:
    """Lay pictures out on one sheet, row by row.

    Args:
        images: At least one picture; each cell has the size of the largest.
        columns: Pictures in a row, at least 1.
        gap: Pixels between the cells and around them.

    Returns:
        A new RGB image.

    Raises:
        ValueError: If the number of pictures or columns is 0.
    """
    if not images:
        raise ValueError("images: expected at least one, got none")
    if columns < 1:
        raise ValueError(f"columns: expected at least 1, got {columns}")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    width = max(image.width for image in images) + gap
    height = max(image.height for image in images) + gap
    sheet = Image.new("RGB", (columns * width + gap, rows * height + gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (gap + i % columns * width, gap + i // columns * height))
    return sheet


class _Captioner:
    """Writer of captions on filled plates that avoid earlier ones where possible.

    Args:
        draw: Draws on the picture.
        size: Width and height of the picture.
        height: Of the letters, as a fraction of the shorter side, but 10 pixels at least.
    """

    def __init__(
        self, draw: ImageDraw.ImageDraw, size: tuple[int, int], height: float = 0.025
    ) -> None:
        self.draw = draw
        self.width, self.height = size
        # 2.5 % reads well from thumbnails' 10 pixels up to posters.
        self.font = ImageFont.load_default(size=max(10, round(height * min(size))))
        self.padding = _line_width(size)
        self.taken: list[Box] = []

    def write(
        self, text: str, left: float, top: float, bottom: float, colour: tuple[int, int, int]
    ) -> None:
        """Write a caption above, inside or below a box that spans from `top` to `bottom`."""
        x0, y0, x1, y1 = self.draw.textbbox((0, 0), text, font=self.font)
        width, height = x1 - x0 + 2 * self.padding, y1 - y0 + 2 * self.padding
        left = max(0.0, min(left, self.width - width))
        plates = []
        for y in (top - height, top, bottom, bottom - height):
            y = max(0.0, min(y, self.height - height))
            plates.append((left, y, left + width, y + height))
        plate = next((p for p in plates if not self._is_taken(p)), plates[0])
        self.taken.append(plate)
        self.draw.rectangle((*plate[:2], plate[2] - 1, plate[3] - 1), fill=colour)
        luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
        origin = (plate[0] + self.padding - x0, plate[1] + self.padding - y0)
        ink = "black" if luminance > 128 else "white"
        self.draw.text(origin, text, fill=ink, font=self.font)

    def _is_taken(self, plate: Box) -> bool:
        return any(
            plate[0] < other[2]
            and other[0] < plate[2]
            and plate[1] < other[3]
            and other[1] < plate[3]
            for other in self.taken
        )


def _line_width(size: tuple[int, int]) -> int:
    return max(1, round(0.006 * min(size)))


def inner_edge(mask: np.ndarray) -> np.ndarray:
    """Return the pixels of a mask with a 4-neighbour outside it."""
    padded = np.pad(mask, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inside


def _to_numpy(values: Any, dtype: type) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = (
            values.detach().cpu().float().numpy()
            if values.is_floating_point()
            else values.cpu().numpy()
        )
    return np.asarray(values, dtype=dtype)
