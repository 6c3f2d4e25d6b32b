"""Training images per second out of JPEG files: ours against transformers' image processor.

    python -m benchmarks loading --images 64

Photographs of 640 x 480 pixels with seven boxes, read, decoded, resized to a shortest edge of 800
and padded into batches of 4, by 0 to 2 loading processes with one thread each. transformers: its
image processor in a torch `DataLoader`, as its object detection example has it, which also
normalises there (ours does that on the device, from uint8). Ours once at the same size, where the
batches are compared, and once with the paper's augmentation. Loading processes are started before
the time is taken.
"""

import argparse
import functools
import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.case import Case, Within, largest_difference
from benchmarks.inputs import write_photographs
from cdetr_fast.training import TrainingConfig, setup
from cdetr_fast.training.data.coco import read_coco
from cdetr_fast.training.data.index import CocoIndex

BATCH = 4
SIZE = {"shortest_edge": 800, "longest_edge": 1333}
BOXES = 7
THEIRS, OURS = "transformers, 800", "cdetr_fast, 800"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="+", default=(0, 1, 2))
    parser.set_defaults(repeats=5, threads=1)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    with tempfile.TemporaryDirectory() as folder:
        path = write_annotations(Path(folder), options.images)
        index = read_coco(path)
        for workers in options.workers:
            loaders = make_loaders(path, index, workers)
            first = {name: next(iter(loaders[name])) for name in (THEIRS, OURS)}
            yield Case(
                work="loading",
                shape=f"{options.images} files of 640x480",
                providers={
                    name: functools.partial(_count, loader) for name, loader in loaders.items()
                },
                result=first.get,
                gate=lambda name, got, expected: GATE(name, got, expected) if got else {},
                columns={"loading processes": workers},
                derive=lambda row: {"images/s": 1e3 * options.images / row["ms"]},
            )


def _count(loader: Iterable) -> int:
    return sum(1 for _ in loader)


def _errors(got: Any, expected: dict) -> dict[str, float]:
    """Return the largest difference of pixels, in units of uint8, and of relative boxes."""
    if got is expected:
        return {"max |dpixel|": 0.0, "max |dbox|": 0.0}
    mean, std = (
        torch.tensor(values).reshape(3, 1, 1) * 255
        for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    boxes = (
        largest_difference(a["boxes"], b["boxes"])
        for a, b in zip(expected["labels"], got.labels, strict=True)
    )
    pixels = largest_difference(expected["pixel_values"] * std + mean, got.pixels)
    return {"max |dpixel|": pixels, "max |dbox|": max(boxes)}


GATE = Within(_errors, {"max |dpixel|": 1.0, "max |dbox|": 1e-3})


class Processed(Dataset):
    """Images through transformers' processor, with their annotations."""

    def __init__(self, path: Path) -> None:
        self.folder = path.parent
        content = json.loads(path.read_text())
        self.images = content["images"]
        self.objects: dict[int, list[dict]] = {image["id"]: [] for image in self.images}
        for item in content["annotations"]:
            self.objects[item["image_id"]].append(item)
        self.processor = transformers.ConditionalDetrImageProcessor(size=SIZE)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        image = self.images[index]
        picture = Image.open(self.folder / image["file_name"]).convert("RGB")
        target = {"image_id": image["id"], "annotations": self.objects[image["id"]]}
        processor: Any = self.processor  # its call is typed without annotations
        encoded = processor(images=picture, annotations=target, return_tensors="pt")
        return {"pixel_values": encoded["pixel_values"][0], "labels": encoded["labels"][0]}

    @staticmethod
    def collate(items: list[dict]) -> dict:
        """Stack images of one size, as the example does."""
        pixels = torch.stack([x["pixel_values"] for x in items])
        return {"pixel_values": pixels, "labels": [x["labels"] for x in items]}


def write_annotations(folder: Path, images: int) -> Path:
    """Write JPEG files and the COCO file of their annotations."""
    rng = np.random.default_rng(0)
    records: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i, path in enumerate(write_photographs(folder, images)):
        records.append({"id": i, "file_name": path.name, "width": 640, "height": 480})
        for corner in rng.uniform(0, 200, (BOXES, 2)).round(1).tolist():
            annotations.append(
                {"id": len(annotations), "image_id": i, "category_id": 0,
                 "bbox": [*corner, 200.0, 150.0], "area": 30_000.0, "iscrowd": 0}
            )  # fmt: skip
    path = folder / "annotations.json"
    categories = [{"id": 0, "name": "thing"}]
    content = {"images": records, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))
    return path


def make_loaders(path: Path, index: CocoIndex, workers: int) -> dict[str, Iterable]:
    """Return the loaders of a number of processes by name."""
    theirs = Processed(path)
    config = TrainingConfig(
        train_annotations=str(path), batch_size=BATCH, num_workers=workers, device="cpu"
    )
    accelerator = setup.make_accelerator(config)
    options: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0}
    return {
        THEIRS: DataLoader(theirs, BATCH, collate_fn=theirs.collate, **options),
        OURS: setup.evaluation_loader(index, BATCH, SIZE, workers, multiple=1),
        "cdetr_fast, augmented": setup.training_loader(config, index, accelerator)[1],
    }
