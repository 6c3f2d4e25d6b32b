"""COCO's figures of known cases."""

import pytest
import torch

from cdetr_fast.demo.scenes import coco_ground_truth, draw_scene
from cdetr_fast.images.results import DetectionResult
from cdetr_fast.training.evaluation.box_scores import score_boxes


def test_average_precision_of_known_cases(capsys):
    annotations = [draw_scene(seed)[1] for seed in range(6)]
    truth = coco_ground_truth(annotations)

    def detections(shift: float, images: int) -> list:
        results = []
        for i, annotation in enumerate(annotations[:images]):
            boxes = torch.tensor(annotation["boxes_xyxy"])
            width = (boxes[:, 2] - boxes[:, 0])[:, None] * torch.tensor([1.0, 0.0, 1.0, 0.0])
            labels = torch.tensor(annotation["labels"])
            found = DetectionResult(labels * 0 + 1.0, labels, boxes + shift * width, (128, 128), {})
            results += found.to_coco(i)
        return results

    def average_precision(results: list) -> tuple[float, float]:
        stats = score_boxes(truth, results).stats
        return stats["AP"], stats["AP50"]

    assert average_precision(detections(0.0, 6)) == pytest.approx((1.0, 1.0))
    # A shift by a quarter of the width has IoU 0.6: right at 0.50, 0.55 and 0.60 at most.
    ap, ap50 = average_precision(detections(0.24, 6))
    assert ap50 == pytest.approx(1.0)
    assert 0.2 <= ap <= 0.35
    assert 0 < average_precision(detections(0.0, 3))[1] < 0.9
    assert average_precision([]) == (0.0, 0.0)
    assert capsys.readouterr().out == ""
