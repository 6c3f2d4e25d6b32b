"""Detections from a model's outputs on a CPU: the list form, and the selection alone.

    python -m benchmarks topk --threads 2

Against transformers' `post_process_object_detection`, and against sigmoid + torch.topk + gather.
Logits are those of an untrained head with some confident queries, so a few detections of each image
are above the threshold. Labels have to be equal, scores and boxes to agree.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import ConditionalDetrImageProcessor as Theirs

from benchmarks.case import Case, Within, largest_difference
from cdetr_fast import ConditionalDetrImageProcessor as Ours
from cdetr_kernels import detection_topk

THRESHOLD = 0.5
ERRORS = ("labels that differ", "max |dscore|", "max box error, px")
Detections = tuple[Tensor, Tensor, Tensor]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--head", nargs="+", default=["300x91", "900x365"], metavar="QxK")
    parser.add_argument("--k", type=int, nargs="+", default=[100, 300], help="detections kept")
    parser.set_defaults(repeats=30)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    for head in options.head:
        queries, classes = (int(n) for n in head.split("x"))
        for k in options.k:
            for batch in options.batch:
                yield from cases_of_size(batch, queries, classes, k)


def cases_of_size(batch: int, queries: int, classes: int, k: int) -> Iterator[Case]:
    """Compare list forms, then selections, of the outputs of a batch."""
    outputs = make_outputs(batch, queries, classes)
    sizes = torch.tensor([[480 + i, 640] for i in range(batch)])
    arguments: dict[str, Any] = {
        "threshold": THRESHOLD,
        "target_sizes": [tuple(size) for size in sizes.tolist()],
        "top_k": k,
    }
    theirs, ours = Theirs(), Ours()
    selected = (outputs.logits, outputs.pred_boxes, sizes, k)
    works: dict[str, tuple[dict[str, Callable[[], Any]], Within]] = {
        "list": (
            {
                "transformers": lambda: theirs.post_process_object_detection(outputs, **arguments),
                "cdetr_fast": lambda: ours.post_process_object_detection(outputs, **arguments),
            },
            Within(errors_of_lists, dict(zip(ERRORS, (0.0, 1e-6, 1e-3), strict=True))),
        ),
        "selection": (
            {
                "sigmoid, topk, gather": lambda: plain(outputs, sizes, k),
                "detection_topk": lambda: detection_topk(*selected),
                "detection_topk, torch": lambda: detection_topk(*selected, "torch"),
            },
            Within(errors, dict(zip(ERRORS, (0.0, 1e-6, 1e-3), strict=True))),
        ),
    }
    for work, (providers, gate) in works.items():
        yield Case(
            work=work,
            shape=f"B={batch} {queries}x{classes} k={k}",
            providers=providers,
            gate=gate,
            columns={"queries": queries, "batch": batch, "classes": classes, "k": k},
            warmup=4,
            inference=True,
        )


def make_outputs(batch: int, queries: int, classes: int) -> SimpleNamespace:
    """Return random outputs of a head, seven queries of each image confident."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, queries, classes, generator=generator) - 4.6
    logits[:, :7, 3] += 8.0
    boxes = torch.rand(batch, queries, 4, generator=generator) * 0.5 + 0.2
    return SimpleNamespace(logits=logits, pred_boxes=boxes)


def plain(outputs: SimpleNamespace, sizes: Tensor, k: int) -> Detections:
    """Compute what transformers does, without its conversions and lists."""
    scores, index = outputs.logits.sigmoid().flatten(1).topk(k, dim=1)
    classes = outputs.logits.shape[2]
    boxes = outputs.pred_boxes.gather(1, (index // classes)[..., None].expand(-1, -1, 4))
    center, half = boxes[..., :2], 0.5 * boxes[..., 2:]
    corners = torch.cat((center - half, center + half), dim=-1)
    return scores, index % classes, corners * sizes.flip(1).repeat(1, 2)[:, None]


def errors(got: Sequence[Tensor], expected: Detections) -> dict[str, float]:
    """Return the errors of scores, labels and boxes (first in `got`)."""
    (scores, labels, boxes), (scores_, labels_, boxes_) = got[:3], expected
    if labels.shape != labels_.shape:
        return dict.fromkeys(ERRORS, float("inf"))
    differing = int((labels != labels_).sum())
    found = (differing, largest_difference(scores, scores_), largest_difference(boxes, boxes_))
    return dict(zip(ERRORS, map(float, found), strict=True))


def errors_of_lists(
    got: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]
) -> dict[str, float]:
    """Return the largest errors of the detections of any image; an image without any is wrong."""
    names = ("scores", "labels", "boxes")
    found = [
        errors([a[x] for x in names], (b["scores"], b["labels"], b["boxes"]))
        if len(b["labels"])
        else dict.fromkeys(ERRORS, float("inf"))
        for a, b in zip(got, expected, strict=True)
    ]
    return {name: max(image[name] for image in found) for name in ERRORS}
