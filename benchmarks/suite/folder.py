"""Folder of JPEG photographs to boxes on a CPU: images per second against transformers.

    python -m benchmarks folder --threads 2 --images 100

transformers: its image processor, model (sdpa) and post-processing, image by image. Ours: `predict`
of a list of paths, with and without reading ahead in a thread, and of `optimize(model)`. The
detections of the timed calls are compared.
"""

import argparse
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from torch import nn

import cdetr_fast
from benchmarks.case import Case, GateFailed, Within
from benchmarks.inputs import write_photographs
from cdetr_fast.models import predict as prediction

MOST = "max box error, px"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--edges", type=int, nargs=2, default=(800, 1333), help="after resizing")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--threshold", type=float, default=0.0)
    parser.set_defaults(repeats=1)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    theirs, ours = make_models(options.backbone)
    size = dict(zip(("shortest_edge", "longest_edge"), options.edges, strict=True))
    ours.image_processor = cdetr_fast.ConditionalDetrImageProcessor(size=size)
    fast = cdetr_fast.optimize(ours)
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(path) for path in write_photographs(Path(folder), options.images)]
        results: dict[str, Any] = {}

        def without_reading_ahead() -> Any:
            with mock.patch.object(prediction, "_ahead", lambda images: images):
                return ours.predict(paths, options.threshold)

        def kept(name: str, call: Callable[[], Any]) -> None:
            results[name] = call()

        calls = {
            "transformers": transformers_call(theirs, size, paths, options.threshold),
            "cdetr_fast, nothing read ahead": without_reading_ahead,
            "cdetr_fast": lambda: ours.predict(paths, options.threshold),
            "cdetr_fast, optimize(model)": lambda: fast.predict(paths, options.threshold),
        }

        def found() -> int:
            return sum(len(result["labels"]) for result in results["transformers"])

        def errors(got: Any, expected: Any) -> dict[str, float]:
            if not found():
                raise GateFailed("no detection is above --threshold")
            if got is expected:
                return {MOST: 0.0}
            return {MOST: max(box_error(a, b) for a, b in zip(expected, got, strict=True))}

        yield Case(
            work="files to boxes",
            shape=f"{options.images} files of 640x480 at {options.edges[0]}",
            providers={name: functools.partial(kept, name, call) for name, call in calls.items()},
            gate=Within(errors, {MOST: 0.5}),
            result=results.__getitem__,
            gate_after=True,
            columns={"images": options.images},
            derive=lambda row: {
                "images/s": 1e3 * options.images / row["ms"],
                "detections": found(),
            },
        )


def make_models(backbone: str) -> tuple[Any, Any]:
    """Return transformers' model and ours with the same random weights; some scores are high."""
    torch.manual_seed(0)
    make_config: Any = transformers.ConditionalDetrConfig  # its fields come by inheritance
    config = make_config(backbone=backbone, use_timm_backbone=True, use_pretrained_backbone=False)
    theirs = transformers.ConditionalDetrForObjectDetection(config).eval()
    with torch.no_grad():
        theirs.model.query_position_embeddings.weight.normal_()
        theirs.class_labels_classifier.weight.normal_(std=0.1)
    ours = cdetr_fast.ConditionalDetrForObjectDetection(
        cdetr_fast.ConditionalDetrConfig.from_dict(config.to_dict())
    ).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def transformers_call(
    model: nn.Module, size: dict[str, int], paths: list[str], threshold: float
) -> Callable[[], list[dict]]:
    """Return a call of transformers for all files."""
    processor = transformers.ConditionalDetrImageProcessor(size=size)

    @torch.inference_mode()
    def call() -> list[dict]:
        results = []
        for path in paths:
            image = transformers.image_utils.load_image(path)
            outputs = model(**processor(image, return_tensors="pt"))
            results += processor.post_process_object_detection(
                outputs, threshold, [(image.height, image.width)]
            )
        return results

    return call


def box_error(expected: dict, result: Any) -> float:
    """Return the largest distance, in pixels, from a box to the nearest of its class in a result.

    Scores of random weights are close together: their order, and which is the last, may differ.
    """
    if len(expected["scores"]) == 0:
        return 0.0 if len(result) == 0 else float("inf")
    clear = expected["scores"] > expected["scores"][-1] + 1e-4
    if not clear.any():
        return 0.0
    distance = (expected["boxes"][clear][:, None] - result.boxes_xyxy).abs().amax(dim=2)
    others = expected["labels"][clear][:, None] != result.labels
    return distance.masked_fill(others, float("inf")).amin(dim=1).max().item()
