"""Two evaluations of the same images side by side: classes and images that got better or worse."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cdetr_fast.reports.page import number
from cdetr_fast.reports.pictures import css_colour
from cdetr_fast.training.evaluation.scored import Scored

_FIGURES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR100", "PQ", "mask_AP")


def compare(ours: Scored, theirs: Scored) -> dict[str, Any]:
    """Return what the page shows of a comparison.

    Args:
        ours: This evaluation.
        theirs: The other one, on the same index and at the same threshold.
    """
    change = ours.errors - theirs.errors
    stats, other = ours.evaluation.stats, theirs.evaluation.stats
    classes = [
        {"name": one["class"], "colour": css_colour(label), "objects": one["objects"]}
        | _change(one["AP"], before["AP"])
        for label, (one, before) in enumerate(
            zip(ours.evaluation.classes, theirs.evaluation.classes, strict=True)
        )
        if one["objects"]
    ]
    return {
        "figures": [
            {"name": name} | _change(stats[name], other[name])
            for name in _FIGURES
            if name in stats and name in other
        ],
        "classes": sorted(classes, key=lambda row: row["difference"]),
        "better": int((change < 0).sum()),
        "worse": int((change > 0).sum()),
        "same": int((change == 0).sum()),
    }


def changed_images(ours: Scored, theirs: Scored, count: int) -> tuple[list[int], list[int]]:
    """Return the images with most errors less, and those with most errors more than before."""
    change = ours.errors - theirs.errors
    order = np.argsort(change, kind="stable").tolist()
    better = [image for image in order[:count] if change[image] < 0]
    worse = [image for image in order[::-1][:count] if change[image] > 0]
    return better, worse


def _change(now: float, before: float) -> dict[str, Any]:
    difference = now - before
    known = not math.isnan(difference)
    return {
        "before": number(before),
        "now": number(now),
        "difference": difference if known else 0.0,
        "shown": f"{difference:+.3f}" if known else "-",
    }
