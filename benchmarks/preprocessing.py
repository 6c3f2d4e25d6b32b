"""Preprocessing on a CPU: a 640x480 photograph to model inputs, against transformers' default.

    python -m benchmarks.preprocessing --threads 2 --batch 1 8

The processors have to give the same values before anything is reported. With `--steps` the time
of each step of ours is printed too.
"""

import argparse
import io
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import interleaved, print_table, save
from cdetr_fast.images import ConditionalDetrImageProcessor
from cdetr_fast.images import resize as transforms
from cdetr_fast.images.load import load_images


def make_photo(path: Path | None) -> Image.Image:
    """The given file, or clouds of colour with noise, as hard to compress as a photograph."""
    if path is not None:
        return Image.open(path).convert("RGB").resize((640, 480))
    random = np.random.default_rng(0)
    cells = random.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    smooth = np.array(Image.fromarray(cells).resize((640, 480), Image.Resampling.BICUBIC))
    noisy = smooth + random.normal(0, 6, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def make_inputs(photo: Image.Image, kind: str, batch: int, folder: Path) -> list:
    if kind == "PIL":
        return [photo.copy() for _ in range(batch)]
    paths = [folder / f"photo_{i}.jpg" for i in range(batch)]
    content = io.BytesIO()
    photo.save(content, "JPEG", quality=90)
    for path in paths:
        path.write_bytes(content.getvalue())
    return [str(path) for path in paths]


def steps_of(images: list, processor: ConditionalDetrImageProcessor, repeats: int) -> dict:
    tensors = load_images(images)
    resized = transforms.resized(tensors, processor)
    batch_hw = transforms.batch_size_hw([tuple(i.shape[-2:]) for i in resized], None)
    steps = {
        "read": lambda: load_images(images),
        "resize": lambda: transforms.resized(tensors, processor),
        "normalise and pad": lambda: transforms.normalized_batch(resized, processor, batch_hw),
    }
    return interleaved(steps, repeats)


def main() -> int:
    import tempfile

    from transformers import ConditionalDetrImageProcessor as Theirs

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photo", type=Path, help="a photograph in place of a drawn one")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--steps", action="store_true", help="print the time of each step of ours")
    parser.add_argument("--output", help="name of the file in benchmarks/results to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    photo = make_photo(arguments.photo)
    processors = {"transformers": Theirs(), "cdetr_fast": ConditionalDetrImageProcessor()}
    rows, steps = [], []
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("PIL", "JPEG file"):
            for batch in arguments.batch:
                images = make_inputs(photo, kind, batch, Path(folder))
                calls = {
                    name: lambda processor=processor, images=images: processor(
                        images, return_tensors="pt"
                    )
                    for name, processor in processors.items()
                }
                theirs, ours = (calls[name]() for name in processors)
                error = (ours["pixel_values"] - theirs["pixel_values"]).abs().max().item()
                if error or not torch.equal(ours["pixel_mask"], theirs["pixel_mask"]):
                    print(f"{kind}: the processors disagree by {error}", file=sys.stderr)
                    return 1
                times = interleaved(calls, arguments.repeats)
                rows += [
                    {
                        "images": f"{batch} x {kind}",
                        "processor": name,
                        **times[name],
                        "ms an image": times[name]["ms"] / batch,
                        "speed-up": times["transformers"]["ms"] / times[name]["ms"],
                        "max |dvalue|": error,
                    }
                    for name in processors
                ]
                if arguments.steps:
                    measured = steps_of(images, processors["cdetr_fast"], arguments.repeats)
                    steps += [
                        {"images": f"{batch} x {kind}", "step": name, **values}
                        for name, values in measured.items()
                    ]
    print_table(rows)
    if steps:
        print_table(steps)
    if arguments.output:
        print("written to", save(arguments.output, rows + steps))
    return 0


if __name__ == "__main__":
    sys.exit(main())
