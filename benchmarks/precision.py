"""What lower precision costs: scores, boxes and AP of `optimize(model, dtype=...)` against fp32.

    python -m benchmarks.precision --threads 2
    python -m benchmarks.precision --model runs/first/best --annotations test.json --images folder

Without `--annotations` the images are scenes that no training has seen, as in `cdetr-fast demo`.
All models see an image before the next one is read, so their times are interleaved. Errors are
those of the queries that fp32 finds something with; boxes are measured in pixels of the image.
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import cdetr_fast
from benchmarks.measure import print_table, save
from cdetr_fast.cli.detect import IMAGE_SUFFIXES
from cdetr_fast.demo import DEMO
from cdetr_fast.demo.scenes import TRAIN_SEED, draw_scene, write_coco_dataset
from cdetr_fast.training.data.coco import read_coco
from cdetr_fast.training.data.index import CocoIndex
from cdetr_fast.training.evaluation.detection import Detections, evaluate_detections

REFERENCE = "fp32"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
INT8 = "int8 backbone"
PRECISIONS = [*DTYPES, INT8]
WARMUP = 2
CALIBRATION = 32  # images


@dataclasses.dataclass
class Record:
    """What a model gave so far.

    Attributes:
        scores: Of each image, `[Q, K]` in [0, 1].
        boxes: Of each image, cxcywh `[Q, 4]` in pixels.
        seconds: Of each forward pass.
        found: Of each image, detections as numpy arrays: labels, scores and boxes_xyxy.
    """

    scores: list[Tensor] = dataclasses.field(default_factory=list)
    boxes: list[Tensor] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    found: list[tuple[np.ndarray, ...]] = dataclasses.field(default_factory=list)

    def detections(self) -> Detections:
        images = np.repeat(np.arange(len(self.found)), [len(f[0]) for f in self.found])
        columns = (np.concatenate(column) for column in zip(*self.found, strict=True))
        evaluated = np.arange(len(self.found))
        return Detections(images, *columns, failures=[], evaluated=evaluated)


def run(models: dict[str, Any], processor: Any, index: CocoIndex) -> dict[str, Record]:
    """Runs all models on each image of a data set."""
    records = {name: Record() for name in models}
    for position in range(-WARMUP, len(index)):
        image = [str(index.image_path(max(position, 0)))]
        features = processor(image, return_tensors="pt")
        height, width = (int(n) for n in index.sizes_hw[max(position, 0)])
        for name, model in models.items():
            pixel_values = features["pixel_values"].to(model.device, model.dtype)
            start = time.perf_counter()
            with torch.inference_mode():
                outputs = model(pixel_values)
            if pixel_values.is_cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            if position < 0:
                continue
            record = records[name]
            record.seconds.append(seconds)
            record.scores.append(outputs.logits[0].float().sigmoid().cpu())
            size = torch.tensor([width, height, width, height])
            record.boxes.append(outputs.pred_boxes[0].float().cpu() * size)
            (found,) = processor.post_process_object_detection(
                outputs, threshold=0.0, target_sizes=[(height, width)]
            )
            values = (found[key].float().cpu().numpy() for key in ("labels", "scores", "boxes"))
            labels, scores, boxes_xyxy = values
            record.found.append((labels.astype(np.int64), scores, boxes_xyxy))
    return records


def rows_of(records: dict[str, Record], index: CocoIndex, threshold: float) -> list[dict[str, Any]]:
    """One row a model: AP, time, and errors against fp32."""
    reference = records[REFERENCE]
    certain = [scores.amax(-1) > threshold for scores in reference.scores]
    rows = []
    for name, record in records.items():
        stats = evaluate_detections(index, record.detections()).stats
        score_errors, box_errors = (
            torch.cat(
                [
                    (got[kept] - expected[kept]).abs().amax(-1)
                    for got, expected, kept in zip(values, theirs, certain, strict=True)
                ]
            )
            for values, theirs in (
                (record.scores, reference.scores),
                (record.boxes, reference.boxes),
            )
        )
        paired = zip(reference.seconds, record.seconds, strict=True)
        rows.append(
            {
                "precision": name,
                "images": len(index),
                "ms": 1e3 * statistics.median(record.seconds),
                "speed-up": statistics.median(a / b for a, b in paired),
                "AP": 100 * stats["AP"],
                "AP50": 100 * stats["AP50"],
                "mean score error": score_errors.mean().item(),
                "max score error": score_errors.max().item(),
                "mean box error, px": box_errors.mean().item(),
                "max box error, px": box_errors.max().item(),
            }
        )
    for row in rows:
        row["AP lost"] = rows[0]["AP"] - row["AP"]
    return rows


def calibration_images(model: Any, folder: Path | None) -> list[Tensor]:
    """Images that are not among those that are scored: training scenes, or those of a folder."""
    if folder is None:
        images = [draw_scene(TRAIN_SEED + i)[0] for i in range(CALIBRATION)]
    else:
        images = sorted(path for path in folder.iterdir() if path.suffix in IMAGE_SUFFIXES)
        images = [str(path) for path in images[:CALIBRATION]]
    process = model.image_processor
    return [process([image], return_tensors="pt")["pixel_values"] for image in images]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.precision", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--model", default=str(DEMO), help="folder or hub name")
    parser.add_argument("--annotations", type=Path, help="COCO JSON file")
    parser.add_argument("--images", type=Path, help="folder of its images")
    parser.add_argument("--count", type=int, default=300, help="scenes, or most images of the file")
    parser.add_argument("--precisions", nargs="*", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--calibration", type=Path, help="folder of images for int8's ranges")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--threshold", type=float, default=0.3, help="score that counts as found")
    parser.add_argument("--output", help="name of the file in benchmarks/results to write")
    options = parser.parse_args(arguments)
    if options.annotations and INT8 in options.precisions and options.calibration is None:
        parser.error("int8 with --annotations: expected --calibration FOLDER, training images")
    torch.set_num_threads(options.threads)
    model = cdetr_fast.ConditionalDetrForObjectDetection.from_pretrained(
        options.model, dtype=torch.float32
    ).to(options.device)
    with tempfile.TemporaryDirectory() as folder:
        annotations = options.annotations or write_coco_dataset(folder, range(options.count))
        names = [model.config.id2label[i] for i in range(model.config.num_labels)]
        index = read_coco(annotations, options.images).with_classes(names, "the model")
        first = np.arange(len(index)) < options.count
        index = index.select(first, np.ones(len(index.labels), dtype=bool))
        models = {REFERENCE: cdetr_fast.optimize(model)}
        for name in options.precisions:
            settings = {"dtype": DTYPES.get(name)}
            if name == INT8:
                settings["int8_calibration"] = calibration_images(model, options.calibration)
            models[name] = cdetr_fast.optimize(model, **settings)
        rows = rows_of(run(models, model.image_processor, index), index, options.threshold)
    print_table(rows)
    if options.output:
        print("written to", save(options.output, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
