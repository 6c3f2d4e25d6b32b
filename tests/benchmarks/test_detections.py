"""Comparison of detections: matched by class and place, and never passed for want of a match."""

import pytest
import torch

from benchmarks.case import GateFailed, Within
from benchmarks.detections import ERRORS, LIMITS, Found, detection_errors
from cdetr_fast.images.results import DetectionResult


def found(count=20, seed=0, scores=None):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 400
    boxes = torch.cat((corner, corner + 20 + torch.rand(count, 2, generator=generator) * 200), 1)
    labels = torch.randint(0, 3, (count,), generator=generator)
    if scores is None:
        scores = torch.rand(count, generator=generator).sort(descending=True).values
    return {"scores": scores, "labels": labels, "boxes": boxes}


def passes(got, expected, **options):
    errors = detection_errors(got, expected, **options)
    try:
        Within(lambda *_: errors, LIMITS)("ours", got, expected)
    except GateFailed:
        return False
    return True


def changed(image, **changes):
    return {name: changes.get(name, lambda x: x)(x.clone()) for name, x in image.items()}


def at(place, value):
    def change(x):
        x[place] = value
        return x

    return change


def test_equal_detections_have_no_errors_in_any_form():
    image = found()
    result = DetectionResult(
        image["scores"], image["labels"], image["boxes"], (480, 640), {0: "a", 1: "b", 2: "c"}
    )
    assert detection_errors([result], [image]) == dict.fromkeys(ERRORS, 0.0)
    assert Found.of(result) == Found.of(image)


def test_order_does_not_count():
    image = found()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    assert detection_errors([{k: x[order] for k, x in image.items()}], [image]) == dict.fromkeys(
        ERRORS, 0.0
    )


@pytest.mark.parametrize(
    ("change", "error", "size"),
    [
        ({"boxes": lambda x: x + 0.75}, "max box error, px", 0.75),
        ({"scores": lambda x: x + 0.01}, "max score error", 0.01),
        ({"labels": at(3, 7)}, "lost", 2),
        ({"boxes": at(3, torch.tensor([900.0, 900, 950, 950]))}, "lost", 2),
        ({"labels": lambda x: x + 1}, "share without match", 1),
    ],
)
def test_what_differs_fails(change, error, size):
    image = found(scores=torch.linspace(0.9, 0.2, 20))
    got = changed(image, **change)
    assert detection_errors([got], [image])[error] == pytest.approx(size, rel=1e-3)
    assert not passes([got], [image])


def test_equal_scores_are_compared_too():
    image = found(scores=torch.full((20,), 0.5))
    assert passes([image], [image], most=20)
    assert not passes([changed(image, boxes=lambda x: x + 1)], [image], most=20)
    other = found(seed=1, scores=torch.full((20,), 0.5))
    assert not passes([other], [image], most=20)


def test_what_may_be_on_either_side_of_the_last_one_is_not_lost():
    image = found(scores=torch.linspace(0.9, 0.2, 20))
    fewer = {name: x[:19] for name, x in image.items()}
    assert detection_errors([fewer], [image], threshold=0.1)["lost"] == 1
    assert detection_errors([fewer], [image], threshold=0.1995)["lost"] == 0
    assert detection_errors([fewer], [image], threshold=0.1, most=19)["lost"] == 0
    assert passes([fewer], [image], threshold=0.1, most=19)


def test_images_without_detections():
    none = found(0)
    assert passes([none, found()], [none, found()])
    assert not passes([none], [found()])
    with pytest.raises(GateFailed, match="no detections to compare"):
        detection_errors([none], [none])
    with pytest.raises(ValueError, match="zip"):
        detection_errors([none], [none, none])
