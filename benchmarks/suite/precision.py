r"""Cost of lower precision: scores, boxes and AP of `optimize(model, dtype=...)` against fp32.

    python -m benchmarks precision --threads 2
    python -m benchmarks precision --model runs/bccd/best --annotations instances_test.json \
        --images photographs --calibration training_photographs --precisions bf16 \
        int8 "openvino fp32" "openvino bf16" "openvino int8"

Without `--annotations` the images are scenes that no training has seen, as in `cdetr-fast demo`.
All models see an image before the next one is read, so their times are interleaved. Errors are
those of the queries that fp32 finds something with; boxes are measured in pixels of the image. AP
is the figure to look at; the gate refuses what is no longer the same model, with scores that are
off by 0.05 on average.
"""

import argparse
import dataclasses
import functools
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import cdetr_fast
from benchmarks.case import Case, OptionError, Within
from benchmarks.results import Row
from benchmarks.timing import summarised, time_in_turns
from cdetr_fast.common.errors import first_line
from cdetr_fast.demo import DEMO
from cdetr_fast.demo.scenes import TRAIN_SEED, draw_scene, write_coco_dataset
from cdetr_fast.images.load import image_files
from cdetr_fast.training.data.coco import read_coco
from cdetr_fast.training.data.index import CocoIndex
from cdetr_fast.training.evaluation.detection import Detections, evaluate_detections

REFERENCE = "fp32"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
INT8 = "int8"
BF16: dict[str, Any] = {"dtype": torch.bfloat16}
OPENVINO: dict[str, Any] = {"engine": "openvino"}
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"dtype": dtype} for name, dtype in DTYPES.items()},
    INT8: {},
    f"{INT8}, the rest bf16": BF16,
    "openvino fp32": OPENVINO,
    "openvino bf16": OPENVINO | BF16,
    "openvino int8": OPENVINO,
    "openvino int8, the rest bf16": OPENVINO | BF16,
}
"""Options of `optimize` by precision; those of int8 get calibration images too."""
PRECISIONS = [*DTYPES, INT8]
WARMUP = 2
CALIBRATION = 32  # images


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=str(DEMO), help="folder or hub name")
    parser.add_argument("--annotations", type=Path, help="COCO JSON file")
    parser.add_argument("--images", type=Path, help="folder of its images")
    parser.add_argument("--count", type=int, default=300, help="scenes, or most images of the file")
    parser.add_argument("--precisions", nargs="*", default=PRECISIONS, choices=list(OPTIONS))
    parser.add_argument("--calibration", type=Path, help="folder of images for int8's ranges")
    parser.add_argument("--threshold", type=float, default=0.3, help="score that counts as found")


def cases(options: argparse.Namespace) -> Iterator[Case]:
    has_int8 = any("int8" in name for name in options.precisions)
    if options.annotations and has_int8 and options.calibration is None:
        raise OptionError("int8 with --annotations: expected --calibration FOLDER, training images")
    model = cdetr_fast.ConditionalDetrForObjectDetection.from_pretrained(
        options.model, dtype=torch.float32
    ).to(options.device)
    models: dict[str, Any] = {REFERENCE: cdetr_fast.optimize(model)}
    refused: dict[str, str] = {}
    images = calibration_images(model, options.calibration) if has_int8 else []
    for name in options.precisions:
        calibration: dict[str, Any] = {"int8_calibration": images} if "int8" in name else {}
        try:
            models[name] = cdetr_fast.optimize(model, **OPTIONS[name], **calibration)
        except RuntimeError as error:  # a package or instructions that are missing
            refused[name] = first_line(error)
    with tempfile.TemporaryDirectory() as folder:
        annotations = options.annotations or write_coco_dataset(folder, range(options.count))
        names = [model.config.id2label[i] for i in range(model.config.num_labels)]
        index = read_coco(annotations, options.images).with_classes(names, "the model")
        first = np.arange(len(index)) < options.count
        index = index.select(first, np.ones(len(index.labels), dtype=bool))
        records = {name: Record() for name in models}

        def derive(row: Row) -> dict[str, float]:
            record, reference = records[row["provider"]], records[REFERENCE]
            found = record.average_precision(index)
            paired = zip(reference.ms, record.ms, strict=True)
            lost = reference.average_precision(index)["AP"] - found["AP"]
            return {"speed-up": statistics.median(a / b for a, b in paired), **found,
                    "AP lost": lost}  # fmt: skip

        yield Comparison(
            work="forward",
            shape=f"{len(index)} images",
            device=model.device,
            providers=models,
            refused=refused,
            records=records,
            processor=model.image_processor,
            index=index,
            result=records.__getitem__,
            gate=Within(functools.partial(errors, options.threshold), {"mean score error": 0.05}),
            gate_after=True,
            columns={"images": len(index)},
            derive=derive,
        )


@dataclasses.dataclass
class Record:
    """Results of a model so far.

    Attributes:
        scores: Of each image, `[Q, K]` in [0, 1].
        boxes: Of each image, cxcywh `[Q, 4]` in pixels.
        ms: Of each forward pass.
        found: Of each image, detections as numpy arrays: labels, scores and boxes_xyxy.
    """

    scores: list[Tensor] = dataclasses.field(default_factory=list)
    boxes: list[Tensor] = dataclasses.field(default_factory=list)
    ms: list[float] = dataclasses.field(default_factory=list)
    found: list[tuple[np.ndarray, ...]] = dataclasses.field(default_factory=list)

    def average_precision(self, index: CocoIndex) -> dict[str, float]:
        """Return AP and AP50 in percent."""
        images = np.repeat(np.arange(len(self.found)), [len(f[0]) for f in self.found])
        labels, scores, boxes = (np.concatenate(x) for x in zip(*self.found, strict=True))
        evaluated = np.arange(len(self.found))
        found = Detections(images, labels, scores, boxes, failures=[], evaluated=evaluated)
        stats = evaluate_detections(index, found).stats
        return {name: 100 * stats[name] for name in ("AP", "AP50")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison(Case):
    """Models that see the images of a data set in turns, one after the other.

    Args:
        records: Filled by the timed calls.
        processor: Image processor of all models.
        index: The data set.
    """

    records: dict[str, Record]
    processor: Any
    index: CocoIndex

    def time(self, providers: list[str], repeats: int) -> dict[str, dict[str, float]]:
        """Run the models on each image once; the first image also warms them up."""
        for position in [0] * WARMUP + list(range(len(self.index))):
            image = [str(self.index.image_path(position))]
            features = self.processor(image, return_tensors="pt")["pixel_values"]
            size_hw = tuple(int(n) for n in self.index.sizes_hw[position])
            for name in providers:
                self._run(name, features, size_hw)
        for record in self.records.values():  # of the warm-up
            for values in (record.scores, record.boxes, record.ms, record.found):
                del values[:WARMUP]
        return {name: summarised(self.records[name].ms) for name in providers}

    def _run(self, name: str, features: Tensor, size_hw: tuple[int, ...]) -> None:
        model: Any = self.providers[name]
        record = self.records[name]
        pixel_values = features.to(model.device, model.dtype)
        outputs: list[Any] = []
        with torch.inference_mode():
            times = time_in_turns(
                {name: lambda: outputs.append(model(pixel_values))}, 1, warmup=0, device=self.device
            )
        record.ms.append(times[name]["ms"])
        record.scores.append(outputs[0].logits[0].float().sigmoid().cpu())
        record.boxes.append(
            outputs[0].pred_boxes[0].float().cpu() * torch.tensor(size_hw[::-1] * 2)
        )
        (found,) = self.processor.post_process_object_detection(
            outputs[0], threshold=0.0, target_sizes=[size_hw]
        )
        labels, scores, boxes = (
            found[key].float().cpu().numpy() for key in ("labels", "scores", "boxes")
        )
        record.found.append((labels.astype(np.int64), scores, boxes))


def errors(threshold: float, got: Record, expected: Record) -> dict[str, float]:
    """Return the errors of the queries that the reference finds something with."""
    certain = [scores.amax(-1) > threshold for scores in expected.scores]
    found: dict[str, float] = {}
    for name, values, theirs in (
        ("score error", got.scores, expected.scores),
        ("box error, px", got.boxes, expected.boxes),
    ):
        differences = torch.cat(
            [
                (a[kept] - b[kept]).abs().amax(-1)
                for a, b, kept in zip(values, theirs, certain, strict=True)
            ]
        )
        found |= {
            f"mean {name}": differences.mean().item(),
            f"max {name}": differences.max().item(),
        }
    return found


def calibration_images(model: Any, folder: Path | None) -> list[Tensor]:
    """Return images that are not scored: training scenes, or those of a folder."""
    images: list[Any]
    if folder is None:
        images = [draw_scene(TRAIN_SEED + i)[0] for i in range(CALIBRATION)]
    else:
        files = image_files(folder)
        images = [str(path) for path in files[:CALIBRATION]]
    process = model.image_processor
    return [process([image], return_tensors="pt")["pixel_values"] for image in images]
