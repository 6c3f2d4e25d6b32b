"""COCO's AP and AR of boxes, by faster-coco-eval; the demo needs nothing else of training."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

_STATS: tuple[str, ...] = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
_STATS += ("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large")


@dataclass
class BoxScores:
    """COCO's figures of boxes, in [0, 1].

    Attributes:
        stats: AP (mean over IoU 0.50 to 0.95), AP50, AP75, AP and AR by size of object and number
            of detections; NaN where there is nothing to measure.
        precision: `[10, 101, K]`, of IoU 0.50 to 0.95, recall 0 to 1, and class; -1 for classes
            without objects.
        recall: `[10, K]`, highest recall, likewise.
        outcomes: int8 `[n]` of each result: 1 if it is the match of an object of its class at IoU
            0.50, -1 if it is on a crowd, which counts for nothing, else 0.
    """

    stats: dict[str, float]
    precision: np.ndarray
    recall: np.ndarray
    outcomes: np.ndarray


def score_boxes(
    truth: dict[str, Any],
    results: list[dict[str, Any]] | np.ndarray,
    kind: Literal["bbox", "segm"] = "bbox",
) -> BoxScores:
    """Score detections by COCO's rules: 100 detections per image at most.

    Args:
        truth: A COCO detection dictionary.
        results: COCO results; or rows `[n, 7]` of image id, left, top, width, height, score and
            category id, in fp64.
        kind: "segm" scores masks, for which truth and results have run lengths.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    def quiet(*_: object) -> None:
        return None

    index = COCO(truth, print_function=quiet)
    if len(results):
        found = index.loadRes(results)
    else:  # which `loadRes` takes from faster-coco-eval 1.8 on
        found = COCO(truth | {"annotations": []}, print_function=quiet)
    evaluation = COCOeval_faster(index, found, kind, print_function=quiet)
    with contextlib.redirect_stdout(None):
        evaluation.run()
    values = evaluation.stats[: len(_STATS)]
    return BoxScores(
        {k: float(v) if v >= 0 else float("nan") for k, v in zip(_STATS, values, strict=True)},
        # Both end with the axes size of object (all first) and number of detections (100 last).
        evaluation.eval["precision"][..., 0, -1],
        evaluation.eval["recall"][..., 0, -1],
        _outcomes(evaluation.eval["matched"], truth, results),
    )


def _outcomes(
    matched: dict[str, float], truth: dict[str, Any], results: list[dict[str, Any]] | np.ndarray
) -> np.ndarray:
    """Return `BoxScores.outcomes` from the pairs that were matched at any IoU.

    An object may have one match at each IoU; that of 0.50 has the highest score, since detections
    choose in the order of their scores.
    """
    outcomes = np.zeros(len(results), dtype=np.int8)
    if not matched:
        return outcomes
    # "17_4": the 17th result with the annotation of id 4
    pairs = np.array([key.split("_") for key in matched], dtype=np.int64)
    rows, annotations = pairs[:, 0] - 1, pairs[:, 1]
    if isinstance(results, np.ndarray):
        scores = results[rows, 5]
    else:
        scores = np.array([results[row]["score"] for row in rows.tolist()])
    crowds = [one["id"] for one in truth["annotations"] if one["iscrowd"]]
    on_crowd = np.isin(annotations, np.array(crowds, dtype=np.int64))
    outcomes[rows[on_crowd]] = -1
    order = np.argsort(-scores, kind="stable")
    order = order[~on_crowd[order]]
    _, first = np.unique(annotations[order], return_index=True)
    outcomes[rows[order[first]]] = 1
    return outcomes
