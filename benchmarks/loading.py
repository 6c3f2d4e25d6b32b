"""Training images per second out of JPEG files: ours against transformers' image processor.

    python -m benchmarks.loading --images 64

Photographs of 640 x 480 pixels with seven boxes, read, decoded, resized to a shortest edge of 800
and padded into batches of 4, by 0 to 2 loading processes with one thread each. transformers: its
image processor in a torch `DataLoader`, as its object detection example has it, which also
normalises there (ours does that on the device, from uint8). Ours once at the same size, where the
batches have to agree before anything is reported, and once with the paper's augmentation.
Loading processes are started before the time is taken.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.measure import interleaved, print_table, save
from benchmarks.preprocessing import make_photo
from cdetr_fast.training import TrainingConfig, setup
from cdetr_fast.training.data.coco import read_coco
from cdetr_fast.training.data.index import CocoIndex

BATCH = 4
SIZE = {"shortest_edge": 800, "longest_edge": 1333}
BOXES = 7


class Processed(Dataset):
    """Images through transformers' processor, with their annotations."""

    def __init__(self, path: Path) -> None:
        self.folder = path.parent
        content = json.loads(path.read_text())
        self.images = content["images"]
        self.objects = {image["id"]: [] for image in self.images}
        for item in content["annotations"]:
            self.objects[item["image_id"]].append(item)
        self.processor = transformers.ConditionalDetrImageProcessor(size=SIZE)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        image = self.images[index]
        picture = Image.open(self.folder / image["file_name"]).convert("RGB")
        target = {"image_id": image["id"], "annotations": self.objects[image["id"]]}
        encoded = self.processor(images=picture, annotations=target, return_tensors="pt")
        return {"pixel_values": encoded["pixel_values"][0], "labels": encoded["labels"][0]}

    @staticmethod
    def collate(items: list[dict]) -> dict:
        """Stacks images of one size, as the example does."""
        pixels = torch.stack([x["pixel_values"] for x in items])
        return {"pixel_values": pixels, "labels": [x["labels"] for x in items]}


def write_photographs(folder: Path, images: int) -> Path:
    """Writes JPEG files and their annotations; returns the COCO file."""
    photo, rng = make_photo(None), np.random.default_rng(0)
    content = {"images": [], "annotations": [], "categories": [{"id": 0, "name": "thing"}]}
    for i in range(images):
        photo.rotate(i).save(folder / f"{i}.jpg", quality=90)
        content["images"].append(
            {"id": i, "file_name": f"{i}.jpg", "width": photo.width, "height": photo.height}
        )
        for corner in rng.uniform(0, 200, (BOXES, 2)).round(1).tolist():
            box = [*corner, 200.0, 150.0]
            content["annotations"].append(
                {"id": len(content["annotations"]), "image_id": i, "category_id": 0, "bbox": box,
                 "area": 30_000.0, "iscrowd": 0}
            )  # fmt: skip
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    return path


def loaders(path: Path, index: CocoIndex, workers: int) -> dict[str, object]:
    """Returns the loaders of a number of processes by name."""
    theirs = Processed(path)
    config = TrainingConfig(
        train_annotations=str(path), batch_size=BATCH, num_workers=workers, device="cpu"
    )
    accelerator = setup.make_accelerator(config)
    return {
        "transformers, 800": DataLoader(
            theirs,
            BATCH,
            num_workers=workers,
            collate_fn=theirs.collate,
            persistent_workers=workers > 0,
        ),
        "cdetr_fast, 800": setup.evaluation_loader(index, BATCH, SIZE, workers, multiple=1),
        "cdetr_fast, augmented": setup.training_loader(config, index, accelerator)[1],
    }


def error(theirs: dict, ours) -> float:
    """Largest difference of pixels, in units of uint8, and of boxes, relative to the image."""
    mean, std = (
        torch.tensor(values).reshape(3, 1, 1) * 255
        for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    pixels = (theirs["pixel_values"] * std + mean - ours.pixels).abs().max().item()
    boxes = max(
        (a["boxes"] - b["boxes"]).abs().max().item()
        for a, b in zip(theirs["labels"], ours.labels, strict=True)
    )
    return max(pixels, 1e3 * boxes)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", help="name of the file in benchmarks/results to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = write_photographs(Path(folder), options.images)
        index = read_coco(path)
        for workers in options.workers:
            ways = loaders(path, index, workers)
            theirs, ours = (next(iter(ways[name])) for name in list(ways)[:2])
            if (worst := error(theirs, ours)) > 1:
                print(f"the batches disagree by {worst}: nothing is reported", file=sys.stderr)
                return 1
            calls = {
                name: lambda loader=loader: sum(1 for _ in loader) for name, loader in ways.items()
            }
            times = interleaved(calls, options.repeats, warmup=1)
            first = times[next(iter(calls))]["ms"]
            rows += [
                {
                    "way": name,
                    "loading processes": workers,
                    **found,
                    "images/s": 1e3 * options.images / found["ms"],
                    "speed-up": first / found["ms"],
                }
                for name, found in times.items()
            ]
    print_table(rows)
    if options.output:
        print("written to", save(options.output, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
