"""Procedural detection scenes: textured shapes on a textured background, with exact boxes.

They need no download, so the demo, the tests and the embedded checkpoint work on any machine.
A scene is a pure function of its seed and size. Training uses seeds from `TRAIN_SEED` on; smaller
seeds are never trained on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("circle", "rectangle", "triangle", "star", "ring", "cross")
SIZE = (128, 128)
"""Default scene size, (height, width) in pixels: the size the embedded checkpoint is trained at."""
TRAIN_SEED = 1_000_000_000
"""First seed of the training scenes."""

OBJECT_SIZES = (0.08, 0.60)
"""Longer box side of an object, as a fraction of the shorter image side."""
MIN_VISIBLE = 0.6
"""Least fraction of an object's pixels that later objects leave visible."""
MIN_CONTRAST = 0.3
"""Least RGB distance (components in [0, 1]) between an object's colour and its surroundings."""
_OVERHANG = 0.15  # fraction of an object's box that may lie outside of the image, on each axis
_ATTEMPTS = 40
_SUPERSAMPLE = 4


def _ellipse(radius: float, ratio: float = 1.0) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    return np.stack([radius * np.cos(angle), radius * ratio * np.sin(angle)], 1)


def _spokes(radii: Iterable[float], count: int) -> np.ndarray:
    radius = np.tile(np.fromiter(radii, float), count)
    angle = np.arange(len(radius)) * 2 * np.pi / len(radius)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)


def _circle(rng: np.random.Generator) -> list[np.ndarray]:
    return [_ellipse(1.0, rng.uniform(0.8, 1.0))]


def _rectangle(rng: np.random.Generator) -> list[np.ndarray]:
    ratio = rng.uniform(0.5, 1.0)
    return [np.array([[-1, -ratio], [1, -ratio], [1, ratio], [-1, ratio]])]


def _triangle(rng: np.random.Generator) -> list[np.ndarray]:
    return [_spokes([1.0], 3) * [1.0, rng.uniform(0.8, 1.2)]]


def _star(rng: np.random.Generator) -> list[np.ndarray]:
    return [_spokes([1.0, rng.uniform(0.38, 0.48)], 5)]


def _ring(rng: np.random.Generator) -> list[np.ndarray]:
    return [_ellipse(1.0), _ellipse(rng.uniform(0.45, 0.65))]


def _cross(rng: np.random.Generator) -> list[np.ndarray]:
    a = rng.uniform(0.25, 0.36)
    quarter = np.array([[1, -a], [1, a], [a, a]])
    turn = np.array([[0, 1], [-1, 0]])  # row vectors: a quarter turn from +x to +y
    return [np.concatenate([quarter @ np.linalg.matrix_power(turn, i) for i in range(4)])]


# Each returns closed polygons around the origin: the outline, then the holes.
_OUTLINES: dict[str, Callable[[np.random.Generator], list[np.ndarray]]] = {
    "circle": _circle,
    "rectangle": _rectangle,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
}


def _place(
    rng: np.random.Generator, label: int, height: int, width: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the polygons of a random object in image pixels, and its unclipped xyxy box."""
    polygons = _OUTLINES[CLASSES[label]](rng)
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = np.cos(angle), np.sin(angle)
    rotation = np.array([[cos, sin], [-sin, cos]])
    polygons = [polygon @ rotation for polygon in polygons]

    low, high = OBJECT_SIZES
    longer_side = (low + (high - low) * rng.uniform() ** 1.5) * min(height, width)
    scale = longer_side / np.ptp(polygons[0], axis=0).max()
    polygons = [polygon * scale for polygon in polygons]

    lower, upper = polygons[0].min(0), polygons[0].max(0)
    slack = _OVERHANG * (upper - lower)
    offset = rng.uniform(-slack - lower, np.array([width, height]) + slack - upper)
    return [p + offset for p in polygons], np.concatenate([lower + offset, upper + offset])


def _coverage(polygons: list[np.ndarray], x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    """Return the anti-aliased coverage in [0, 1] of the pixels [y0:y1, x0:x1], float32."""
    s = _SUPERSAMPLE
    mask = Image.new("L", ((x1 - x0) * s, (y1 - y0) * s))
    draw = ImageDraw.Draw(mask)
    for fill, polygon in zip([255] + [0] * (len(polygons) - 1), polygons, strict=True):
        # PIL addresses pixel centres, the boxes address pixel edges: half a fine pixel apart.
        draw.polygon(((polygon - [x0, y0]) * s - 0.5).ravel().tolist(), fill=fill)
    return np.asarray(mask.reduce(s), dtype=np.float32) / 255


def _texture(
    rng: np.random.Generator,
    colour: np.ndarray,
    height: int,
    width: int,
    strength: float,
    period: float,
) -> np.ndarray:
    """Return a [height, width, 3] patch that varies by `strength` around `colour`."""
    kind = rng.integers(4)
    if kind == 0:  # plain
        return np.broadcast_to(colour, (height, width, 3))
    other = np.clip(colour + strength * rng.uniform(-1, 1, 3), 0, 1).astype(np.float32)
    if kind == 1:  # smooth noise
        cells = rng.random((4, 4), dtype=np.float32)
        weight = np.asarray(
            Image.fromarray(cells).resize((width, height), Image.Resampling.BILINEAR)
        )
    else:
        angle = rng.uniform(0, 2 * np.pi)
        x = np.arange(width, dtype=np.float32) * np.float32(np.cos(angle))
        y = np.arange(height, dtype=np.float32) * np.float32(np.sin(angle))
        along = y[:, None] + x[None, :]
        if kind == 2:  # gradient
            along -= along.min()
            weight = along / max(float(along.max()), 1.0)
        else:  # stripes
            weight = 0.5 + 0.5 * np.sin(along * np.float32(2 * np.pi / period))
    return colour + np.multiply.outer(weight, other - colour)


def draw_scene(
    seed: int,
    size: tuple[int, int] = SIZE,
    min_objects: int = 1,
    max_objects: int = 10,
) -> tuple[Image.Image, dict[str, Any]]:
    """Draw one scene with its true boxes.

    Later objects cover earlier ones, but leave at least `MIN_VISIBLE` of each visible. Where the
    drawn number of objects does not fit under that rule, the scene has fewer; it always has at
    least one.

    Args:
        seed: Non-negative integer; the same seed and arguments give the same scene.
        size: (height, width) in pixels, each at least 32.
        min_objects: Fewest objects to draw.
        max_objects: Most objects to draw.

    Returns:
        The RGB image, and a dictionary with "boxes_xyxy" (float32 [T, 4], pixels, the extent of the
        whole object clipped to the image), "labels" (int64 [T], indices into `CLASSES`), "size"
        (height, width) and "seed".

    Raises:
        ValueError: If a size or a number of objects is out of range.
    """
    height, width = size
    if min(size) < 32:
        raise ValueError(f"size: expected height and width of at least 32, got {tuple(size)}")
    if not 1 <= min_objects <= max_objects:
        raise ValueError(
            "min_objects, max_objects: expected 1 <= min_objects <= max_objects, "
            f"got {min_objects}, {max_objects}"
        )
    rng = np.random.default_rng(seed)
    side = min(height, width)
    background = rng.uniform(0.1, 0.9, 3).astype(np.float32)
    period = rng.uniform(0.05, 0.3) * side
    canvas = np.array(_texture(rng, background, height, width, 0.4, period), dtype=np.float32)

    owner = np.zeros((height, width), dtype=np.int64)  # index of the object on top, from 1; 0 none
    visible, fewest = np.zeros(1), np.full(1, -np.inf)  # pixels, by owner
    boxes: list[np.ndarray] = []
    labels: list[int] = []
    count = rng.integers(min_objects, max_objects + 1)
    for _ in range(_ATTEMPTS):
        if len(labels) == count:
            break
        label = int(rng.integers(len(CLASSES)))
        polygons, box = _place(rng, label, height, width)
        box = box.clip(0, [width, height, width, height])
        x0, y0 = (int(v) for v in np.floor(box[:2]))
        x1, y1 = (int(v) for v in np.ceil(box[2:]))
        coverage = _coverage(polygons, x0, y0, x1, y1)
        patch, patch_owner = canvas[y0:y1, x0:x1], owner[y0:y1, x0:x1]
        solid = coverage > 0.5
        left = visible - np.bincount(patch_owner[solid], minlength=len(visible))
        if np.any(left < fewest):
            continue
        beneath = np.tensordot(coverage, patch, 2) / coverage.sum()
        colour = rng.random(3, dtype=np.float32)
        while np.linalg.norm(colour - beneath) < MIN_CONTRAST:
            colour = rng.random(3, dtype=np.float32)
        period = rng.uniform(0.15, 0.5) * max(x1 - x0, y1 - y0)
        fill = _texture(rng, colour, y1 - y0, x1 - x0, 0.35, period)
        patch += coverage[..., None] * (fill - patch)
        patch_owner[solid] = len(left)
        visible = np.append(left, solid.sum())
        fewest = np.append(fewest, MIN_VISIBLE * solid.sum())
        boxes.append(box)
        labels.append(label)

    noise = rng.uniform(0, 0.06)
    canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(noise)
    canvas *= 255
    image = Image.fromarray(np.rint(canvas.clip(0, 255, out=canvas), out=canvas).astype(np.uint8))
    return image, {
        "boxes_xyxy": np.array(boxes, dtype=np.float32).reshape(-1, 4),
        "labels": np.array(labels, dtype=np.int64),
        "size": (height, width),
        "seed": seed,
    }


def coco_ground_truth(annotations: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Build a COCO detection dictionary from the annotations of several scenes.

    Args:
        annotations: The dictionaries that `draw_scene` returns beside the images.

    Returns:
        A dictionary with "images" (ids count from 0 in the given order, files "<id>.png" with six
        digits), "annotations" (boxes as xywh pixels) and "categories" (ids are the labels).
    """
    import torch
    from torchvision.ops import box_convert

    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for image_id, annotation in enumerate(annotations):
        height, width = annotation["size"]
        name = f"{image_id:06d}.png"
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        boxes_xyxy = torch.from_numpy(annotation["boxes_xyxy"]).double()
        boxes_xywh = box_convert(boxes_xyxy, "xyxy", "xywh").tolist()
        for box, label in zip(boxes_xywh, annotation["labels"], strict=True):
            objects.append(
                {
                    "id": len(objects) + 1,  # evaluators take id 0 for "unmatched"
                    "image_id": image_id,
                    "category_id": int(label),
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES)]
    return {"info": {}, "images": images, "annotations": objects, "categories": categories}


def write_coco_dataset(
    folder: str | Path, seeds: Iterable[int], size: tuple[int, int] = SIZE
) -> Path:
    """Write scenes as PNG files with their COCO annotations.

    Args:
        folder: Destination; created if absent.
        seeds: Seeds of the scenes, one each.
        size: (height, width) in pixels.

    Returns:
        The path of "annotations.json", which is beside the images.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    annotations = []
    for index, seed in enumerate(seeds):
        image, annotation = draw_scene(seed, size)
        image.save(folder / f"{index:06d}.png")
        annotations.append(annotation)
    path = folder / "annotations.json"
    path.write_text(json.dumps(coco_ground_truth(annotations)))
    return path
