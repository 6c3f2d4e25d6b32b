"""`cdetr-fast detect`: objects in image files and folders."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cdetr_fast.cli.detector import Detector, read_image
from cdetr_fast.cli.errors import UserError
from cdetr_fast.cli.options import DeviceOption, ModelOption, RevisionOption, ThresholdOption
from cdetr_fast.cli.output import PictureNames, make_output_folder
from cdetr_fast.common.files import write_json

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
"""Suffixes of images in a folder; a file named on the command line may be called anything."""


def detect(
    images: Annotated[
        list[Path], typer.Argument(help="Image files, and folders whose images are taken.")
    ],
    model: ModelOption = None,
    threshold: ThresholdOption = 0.5,
    output: Annotated[Path, typer.Option(metavar="PATH", help="Folder for the results.")] = Path(
        "output/detect"
    ),
    device: DeviceOption = None,
    batch_size: Annotated[
        int, typer.Option(metavar="INTEGER", min=1, help="Images in one forward pass.")
    ] = 1,
    revision: RevisionOption = None,
    top_k: Annotated[
        int, typer.Option(metavar="INTEGER", min=1, help="Most detections per image.")
    ] = 100,
) -> None:
    """Detect objects in images.

    Writes detections.json (COCO results), images.json (the COCO images and categories that its
    ids mean) and an annotated picture of each image. An image that cannot be read is reported
    and skipped, and the exit code is then 1.
    """
    from rich.console import Console
    from rich.progress import Progress

    paths = _list_images(images)
    make_output_folder(output)
    detector = Detector(model, revision, device)
    detector.optimize_for(len(paths))
    console = Console(stderr=True)
    records: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    names = PictureNames(output, paths)
    read: deque[tuple[int, Path, Image.Image]] = deque()

    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("detecting", total=len(paths))

        def readable() -> Iterator[Image.Image]:  # in a thread of its own, ahead of the model
            for image_id, path in enumerate(paths):
                try:
                    image = read_image(path)
                except UserError as error:
                    message = f"cdetr-fast: skipped: {error}"
                    console.print(message, markup=False, highlight=False, soft_wrap=True)
                    progress.advance(task)
                else:
                    read.append((image_id, path, image))
                    yield image

        for result in detector.predict_each(readable(), threshold, top_k, batch_size):
            image_id, path, image = read.popleft()
            picture = names.take(path)
            result.draw(image).save(picture, quality=92)
            records.append(
                {
                    "id": image_id,
                    "file_name": str(path),
                    "width": image.width,
                    "height": image.height,
                    "picture": picture.name,
                }
            )
            results.extend(result.to_coco(image_id))
            progress.advance(task)
    skipped = len(paths) - len(records)

    if not records:
        raise UserError(f"none of {len(paths)} images could be read")
    categories = [{"id": i, "name": name} for i, name in sorted(detector.id2label.items())]
    index = {"info": {}, "images": records, "annotations": [], "categories": categories}
    write_json(output / "images.json", index, indent=1, sort_keys=False)
    write_json(output / "detections.json", results, indent=1, sort_keys=False)
    note = f", {skipped} skipped" if skipped else ""
    print(f"{len(records)} images, {len(results)} detections{note}: {output}")
    if skipped:
        raise typer.Exit(1)


def _list_images(arguments: Iterable[Path]) -> list[Path]:
    """List files as they are named and folders as their images by name, each file once."""
    paths: dict[Path, Path] = {}
    for argument in arguments:
        found = [argument]
        if argument.is_dir():
            found = sorted(p for p in argument.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise UserError(f"{argument}: no images in this folder")
        for path in found:
            paths.setdefault(path.resolve(), path)
    return list(paths.values())
