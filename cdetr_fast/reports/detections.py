"""Report of detections in a folder of images: pages of pictures, filtered by class and score."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from cdetr_fast.common.files import write_text
from cdetr_fast.reports.charts import bar_chart
from cdetr_fast.reports.page import describe_settings, number, render
from cdetr_fast.reports.pictures import Picture, boxes_over, css_colour, embed

if TYPE_CHECKING:
    from cdetr_fast.images.results import DetectionResult

IMAGES_OF_PAGE = 200
MOST_IMAGES = 4000
_BYTES_OF_PAGE = 8_000_000
_EDGE = 320  # pixels of a picture's longest edge


def _masks(result: DetectionResult, picture: Picture) -> Callable[[int], np.ndarray] | None:
    """Return what gives the masks of a result in the resolution of its picture, if it has any."""
    from cdetr_fast.images.results import SegmentationResult

    if not isinstance(result, SegmentationResult):
        return None
    size = round(picture.width), round(picture.height)
    segmentation = Image.fromarray(result.segmentation.numpy())
    owner = np.asarray(segmentation.resize(size, Image.Resampling.NEAREST))
    return lambda i: owner == result.segment_ids[i]


class DetectionReport:
    """Collects results image by image, as small JPEGs, and writes them as pages.

    Args:
        threshold: Lowest score that was asked for.
        most_images: Images that get a picture; later ones are counted only.
    """

    def __init__(self, threshold: float, most_images: int = MOST_IMAGES) -> None:
        self.threshold = threshold
        self.most_images = most_images
        self.pages: list[list[dict[str, Any]]] = [[]]
        self.bytes_of_page = 0
        self.images = 0
        self.without_objects = 0
        self.scores: dict[int, list[float]] = {}
        self.images_of_class: Counter[int] = Counter()
        self.names: dict[int, str] = {}

    def add(
        self, name: str, image: Image.Image, result: DetectionResult, file: str | None = None
    ) -> None:
        """Add the result of an image.

        Args:
            name: What the page calls the image.
            image: The upright image.
            result: Its objects.
            file: Name of an annotated picture beside the report, for a link.
        """
        self.images += 1
        self.without_objects += len(result) == 0
        labels = result.labels.tolist()
        self.images_of_class.update(set(labels))
        for label, class_name, score in zip(
            labels, result.names, result.scores.tolist(), strict=True
        ):
            self.scores.setdefault(label, []).append(score)
            self.names[label] = class_name
        if self.images > self.most_images:
            return
        picture = embed(image, _EDGE, quality=72)
        full = self.bytes_of_page + len(picture.uri) > _BYTES_OF_PAGE
        if len(self.pages[-1]) == IMAGES_OF_PAGE or (full and self.pages[-1]):
            self.pages.append([])
            self.bytes_of_page = 0
        self.bytes_of_page += len(picture.uri)
        boxes = boxes_over(
            picture,
            result.boxes_xyxy.numpy(),
            result.labels.numpy(),
            result.scores.numpy(),
            result.id2label,
            _masks(result, picture),
        )
        self.bytes_of_page += sum(len(box.mask.uri) for box in boxes if box.mask is not None)
        self.pages[-1].append(
            {
                "name": name,
                "link": None if file is None else quote(os.fsencode(file)),
                "picture": picture,
                "boxes": boxes,
                "count": len(result),
            }
        )

    def write(
        self,
        folder: Path,
        model: str,
        environment: list[tuple[str, str]],
        settings: dict[str, Any],
    ) -> list[Path]:
        """Write report.html, and report_2.html and so on if there are many images.

        Args:
            folder: An existing folder.
            model: Name of the model.
            environment: From `describe_environment`.
            settings: To be listed.

        Returns:
            The files.
        """
        names = ["report.html"] + [f"report_{i}.html" for i in range(2, len(self.pages) + 1)]
        objects = sum(map(len, self.scores.values()))
        content = {
            "title": "Detections",
            "version": dict(environment)["cdetr_fast"],
            "subtitle": f"model {model}, {dict(environment)['date']}",
            "figures": [
                ("images", f"{self.images:,}", ""),
                ("objects", f"{objects:,}", f"scores from {self.threshold:.2f}"),
                ("objects per image", f"{objects / max(self.images, 1):.1f}", ""),
                ("images without objects", f"{self.without_objects:,}", ""),
                ("classes found", f"{len(self.scores):,}", ""),
            ],
            "classes": self._classes(),
            "threshold": self.threshold,
            "histogram": self._histogram(),
            "pages": names,
            "not_shown": max(0, self.images - self.most_images),
            "settings": describe_settings(settings) + environment,
        }
        for page, entries in enumerate(self.pages):
            text = render("detections.html", page=page, entries=entries, **content)
            write_text(folder / names[page], text)
        return [folder / name for name in names]

    def _classes(self) -> list[dict[str, Any]]:
        order = sorted(self.scores, key=lambda label: -len(self.scores[label]))
        return [
            {
                "label": label,
                "name": self.names[label],
                "colour": css_colour(label),
                "objects": len(self.scores[label]),
                "images": self.images_of_class[label],
                "score": number(float(np.mean(self.scores[label])), 2),
            }
            for label in order
        ]

    def _histogram(self) -> Any:
        scores = [score for values in self.scores.values() for score in values]
        counts, edges = np.histogram(scores, bins=10, range=(0, 1))
        bars = [(f"{low:.1f}", float(c)) for low, c in zip(edges[:-1], counts, strict=True)]
        return bar_chart(bars, "score from", "objects")
