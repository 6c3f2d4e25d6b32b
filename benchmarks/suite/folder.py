"""Folder of JPEG photographs to boxes on a CPU: images per second against transformers.

    python -m benchmarks folder --threads 2
    python -m benchmarks folder --images 100 --repeats 1 --only "optimize|processor"

transformers: its image processor, model (sdpa) and post-processing, image by image; the same with
its model in ONNX Runtime and in OpenVINO, exported with open sizes. Ours: `predict` of a list of
paths, with and without reading ahead in a thread, and of `optimize(model)`, also on OpenVINO. The
detections of the timed calls are compared: matched by class and place, those that are clear of the
number of detections must all be found. A runtime that is missing is a row with the reason.
"""

import argparse
import functools
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor

import cdetr_fast
from benchmarks.case import Case, GateFailed, Within
from benchmarks.detections import LIMITS, detection_errors
from benchmarks.exported import on_onnx_runtime, on_openvino
from benchmarks.inputs import write_photographs
from cdetr_fast.common.errors import first_line
from cdetr_fast.models import predict as prediction

REFERENCE = "transformers"

Detect = Callable[[list[str]], list[Any]]
"""From files to the detections of each."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=15)
    parser.add_argument("--edges", type=int, nargs=2, default=(800, 1333), help="after resizing")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--threshold", type=float, default=0.0)
    parser.add_argument(
        "--only", default="", metavar="REGEX", help="rows to measure, besides the reference"
    )
    parser.set_defaults(repeats=5)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    theirs, ours = make_models(options.backbone)
    size = dict(zip(("shortest_edge", "longest_edge"), options.edges, strict=True))
    ours.image_processor = cdetr_fast.ConditionalDetrImageProcessor(size=size)
    makers: dict[str, Callable[[], Detect]] = {
        REFERENCE: lambda: with_their_processor(theirs, size, options.threshold),
        "ONNX Runtime, transformers' processor": lambda: with_their_processor(
            on_onnx_runtime(theirs, options.threads), size, options.threshold
        ),
        "OpenVINO, transformers' processor": lambda: with_their_processor(
            on_openvino(theirs, options.threads), size, options.threshold
        ),
        "cdetr_fast, nothing read ahead": lambda: _without_reading_ahead(ours, options.threshold),
        "cdetr_fast": lambda: _predict(ours, options.threshold),
        "cdetr_fast, optimize(model)": lambda: _predict(
            cdetr_fast.optimize(ours), options.threshold
        ),
        'cdetr_fast, engine="openvino"': lambda: _predict(
            cdetr_fast.optimize(ours, engine="openvino"), options.threshold
        ),
    }
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(path) for path in write_photographs(Path(folder), options.images)]
        results: dict[str, Any] = {}
        calls: dict[str, Callable[[], None]] = {}
        refused: dict[str, str] = {}
        for name, make in makers.items():
            if name != REFERENCE and not re.search(options.only, name):
                continue
            try:
                detect = make()
                detect(paths[:1])  # what the first image prepares
            except (GateFailed, RuntimeError) as error:
                refused[name] = first_line(error)
            else:
                calls[name] = functools.partial(_keep, results, name, detect, paths)
        yield Case(
            work="files to boxes",
            shape=f"{options.images} files of 640x480 at {options.edges[0]}",
            providers=calls,
            refused=refused,
            gate=Within(
                lambda got, expected: detection_errors(got, expected, options.threshold), LIMITS
            ),
            result=results.__getitem__,
            gate_after=True,
            columns={"images": options.images},
            derive=lambda row: {
                "images/s": 1e3 * options.images / row["ms"],
                "detections": sum(len(found["labels"]) for found in results[REFERENCE]),
            },
        )


def _keep(results: dict[str, Any], name: str, detect: Detect, paths: list[str]) -> None:
    results[name] = detect(paths)


def _predict(model: Any, threshold: float) -> Detect:
    return lambda paths: model.predict(paths, threshold)


def _without_reading_ahead(model: Any, threshold: float) -> Detect:
    def detect(paths: list[str]) -> list[Any]:
        with mock.patch.object(prediction, "_ahead", lambda images: images):
            return model.predict(paths, threshold)

    return detect


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


def with_their_processor(
    model: Callable[[Tensor], Any], size: dict[str, int], threshold: float
) -> Detect:
    """Return a function from files to detections, image by image, with transformers' processor.

    Args:
        model: Takes images `[1, 3, H, W]`, unpadded.
        size: Edges of a resized image.
        threshold: Lowest score of a detection.
    """
    processor = transformers.ConditionalDetrImageProcessor(size=size)

    @torch.inference_mode()
    def detect(paths: list[str]) -> list[Any]:
        results: list[Any] = []
        for path in paths:
            image = transformers.image_utils.load_image(path)
            outputs = model(processor(image, return_tensors="pt")["pixel_values"])
            results += processor.post_process_object_detection(
                outputs, threshold, [(image.height, image.width)]
            )
        return results

    return detect
