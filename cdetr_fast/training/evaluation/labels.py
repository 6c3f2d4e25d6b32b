"""Content of the label report: how many objects of which class and size, and what looks wrong."""

from __future__ import annotations

from typing import Any

import numpy as np

from cdetr_fast.reports.charts import bar_chart
from cdetr_fast.reports.pictures import css_colour
from cdetr_fast.training.data.index import CocoIndex
from cdetr_fast.training.data.label_checks import LabelReport
from cdetr_fast.training.data.shards import ShardSet

_SIDES = (0, 1, 2, 4, 8, 16, 32, 64, 100)  # per cent of the image's side
_PER_IMAGE = (0, 1, 2, 3, 5, 10, 20, 50, 100)
_TINY = 2.0  # pixels
_THIN = 20.0  # longer side over shorter
_WHOLE = 0.98  # of the image
_SHOWN = 8


def label_section(title: str, index: CocoIndex | ShardSet, report: LabelReport) -> dict[str, Any]:
    """Return what the page shows of the labels of a set.

    Args:
        title: Heading.
        index: The set, after `check_labels`; of shards only the numbers are known.
        report: What `check_labels` found.
    """
    kinds = [("cannot be used", kind, ids) for kind, ids in report.bad.items()]
    kinds += [("worth a look", kind, ids) for kind, ids in report.notes.items()]
    section: dict[str, Any] = {
        "title": title,
        "path": str(report.path),
        "charts": [],
        "classes": [],
    }
    section["figures"] = [
        (name, f"{count:,}", "") for name, count in report.counts.items() if name[:3] != "of "
    ]
    if isinstance(index, CocoIndex):
        kinds += [("worth a look", kind, ids) for kind, ids in _suspicious(index).items()]
        section["figures"] += _figures(index)
        section["charts"] = _charts(index)
        section["classes"] = _classes(index)
    section["findings"] = [
        {
            "weight": weight,
            "kind": kind.removesuffix(", ids").removesuffix(", annotation ids"),
            "count": len(ids),
            "ids": ", ".join(map(str, ids[:_SHOWN])) + (", ..." if len(ids) > _SHOWN else ""),
        }
        for weight, kind, ids in kinds
    ]
    return section


def _figures(index: CocoIndex) -> list[tuple[str, str, str]]:
    counts = np.bincount(index.image_of_object()[~index.crowd], minlength=len(index))
    return [
        ("objects per image", f"{counts.mean():.1f}", f"{counts.max()} at most"),
        ("images without objects", f"{int((counts == 0).sum()):,}", ""),
        ("classes", f"{len(index.classes):,}", ""),
    ]


def _charts(index: CocoIndex) -> list[tuple[str, Any]]:
    counts = np.bincount(index.image_of_object()[~index.crowd], minlength=len(index))
    sides = 100 * np.sqrt(_share_of_image(index))
    return [
        (
            "Box sizes",
            bar_chart(_histogram(sides, _SIDES), "side from, % of the image's", "objects"),
        ),
        (
            "Objects per image",
            bar_chart(_histogram(counts, _PER_IMAGE), "objects from", "images"),
        ),
    ]


def _histogram(values: np.ndarray, edges: tuple[int, ...]) -> list[tuple[str, float]]:
    counts, _ = np.histogram(values, bins=[*edges, np.inf])
    return [(str(edge), float(count)) for edge, count in zip(edges, counts, strict=True)]


def _share_of_image(index: CocoIndex) -> np.ndarray:
    """Return the area of each box relative to its image's, fp64 `[M]`."""
    areas = index.sizes_hw.astype(np.float64).prod(1)[index.image_of_object()]
    return index.boxes_xywh[:, 2:].clip(0).prod(1) / areas.clip(1)


def _classes(index: CocoIndex) -> list[dict[str, Any]]:
    owner = index.image_of_object()
    sides = np.sqrt(index.boxes_xywh[:, 2:].clip(0).prod(1))
    total = max(1, index.num_objects)
    rows = []
    for label, name in enumerate(index.classes):
        mine = index.labels == label
        count = int(mine.sum())
        rows.append(
            {
                "name": name,
                "colour": css_colour(label),
                "objects": count,
                "share": count / total,
                "images": len(np.unique(owner[mine])),
                "side": f"{np.median(sides[mine]):.0f}" if count else "-",
            }
        )
    return rows


def _suspicious(index: CocoIndex) -> dict[str, list[Any]]:
    """Return kinds of boxes that are often mistakes, with the ids of their images."""
    owner = index.image_of_object()
    sides = index.boxes_xywh[:, 2:]
    shorter, longer = sides.min(1, initial=np.inf), sides.max(1, initial=0)
    rows = np.column_stack([owner, index.labels, index.boxes_xywh.round(1)])
    _, first = np.unique(rows, axis=0, return_index=True)
    repeated = np.ones(len(owner), dtype=bool)
    repeated[first] = False
    kinds = {
        f"boxes with a side below {_TINY:g} pixels, of images": shorter < _TINY,
        f"boxes more than {_THIN:g} times as long as wide, of images": longer > _THIN * shorter,
        "boxes of the whole image, of images": _share_of_image(index) > _WHOLE,
        "boxes that come twice, of images": repeated,
    }
    return {
        kind: index.image_ids[owner[found & ~index.crowd]].tolist()
        for kind, found in kinds.items()
        if (found & ~index.crowd).any()
    }
