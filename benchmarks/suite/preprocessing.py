"""Preprocessing on a CPU: a 640x480 photograph to model inputs, against transformers' default.

    python -m benchmarks preprocessing --threads 2 --batch 1 8

The processors have to give the same values. `--steps` also times each step of ours.
"""

import argparse
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image

from benchmarks.case import Case, Within, largest_difference
from benchmarks.inputs import photograph
from benchmarks.results import Row
from cdetr_fast.images import ConditionalDetrImageProcessor
from cdetr_fast.images import resize as transforms
from cdetr_fast.images.load import load_images

GATE = Within(
    lambda got, expected: {
        "max |dvalue|": largest_difference(got["pixel_values"], expected["pixel_values"]),
        "masks differ": float(not torch.equal(got["pixel_mask"], expected["pixel_mask"])),
    },
    {"max |dvalue|": 0.0, "masks differ": 0.0},
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--photo", type=Path, help="a photograph instead of a drawn one")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", action="store_true", help="time each step of ours")
    parser.set_defaults(repeats=30)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    photo = photograph(options.photo)
    ours = ConditionalDetrImageProcessor()
    processors: dict[str, Any] = {
        "transformers": transformers.ConditionalDetrImageProcessor(),
        "cdetr_fast": ours,
    }
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("PIL", "JPEG file"):
            for batch in options.batch:
                images = make_inputs(photo, kind, batch, Path(folder))
                shape = f"{batch} x {kind}"
                yield Case(
                    work="preprocessing",
                    shape=shape,
                    providers={
                        name: functools.partial(processor, images, return_tensors="pt")
                        for name, processor in processors.items()
                    },
                    gate=GATE,
                    warmup=1,
                    derive=functools.partial(_per_image, batch),
                )
                if options.steps:
                    yield case_of_steps(images, shape, ours)


def _per_image(batch: int, row: Row) -> Row:
    return {"ms per image": row["ms"] / batch}


def make_inputs(photo: Image.Image, kind: str, batch: int, folder: Path) -> list[Any]:
    """Return images as a user has them."""
    if kind == "PIL":
        return [photo.copy() for _ in range(batch)]
    paths = [folder / f"photo_{i}.jpg" for i in range(batch)]
    for path in paths:
        photo.save(path, quality=90)
    return [str(path) for path in paths]


def case_of_steps(images: list[Any], shape: str, processor: ConditionalDetrImageProcessor) -> Case:
    """Time the steps of our processor; the last one has to give what the processor gives."""
    tensors = load_images(images)
    resized = transforms.resized(tensors, processor)
    batch_hw = transforms.batch_size_hw([(i.shape[-2], i.shape[-1]) for i in resized], None)
    expected = processor(images, return_tensors="pt")["pixel_values"]
    steps: dict[str, Callable[[], Any]] = {
        "read": lambda: load_images(images),
        "resize": lambda: transforms.resized(tensors, processor),
        "normalise and pad": lambda: transforms.normalized_batch(resized, processor, batch_hw),
    }

    def errors(_: Any, __: Any) -> dict[str, float]:
        values = steps["normalise and pad"]()[0]
        return {"max |dvalue|": largest_difference(values, expected)}

    return Case(
        work="step of preprocessing",
        shape=shape,
        providers=steps,
        gate=Within(errors, {"max |dvalue|": 0.0}),
        speed_up=False,
        warmup=1,
    )
