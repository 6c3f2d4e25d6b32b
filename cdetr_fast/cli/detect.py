"""`cdetr-fast detect`: objects in image files and folders; videos are in `detect_video`."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cdetr_fast.cli.detector import EMBEDDED, Detector, read_image, save_picture
from cdetr_fast.cli.errors import UserError
from cdetr_fast.cli.options import (
    DeviceOption,
    EngineOption,
    ModelOption,
    RevisionOption,
    ThresholdOption,
)
from cdetr_fast.cli.output import PictureNames, counted, listed_pictures, make_output_folder
from cdetr_fast.common import progress
from cdetr_fast.common.errors import first_line
from cdetr_fast.common.files import write_json
from cdetr_fast.common.pipeline import Background

if TYPE_CHECKING:
    from PIL import Image

    from cdetr_fast.images.results import DetectionResult

logger = logging.getLogger(__name__)

_WAITING = 4
"""Results that may wait to be written."""


def detect(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Image files and folders whose images are taken; or video files, a camera's "
            "index or a stream's URL."
        ),
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
    engine: EngineOption = "torch",
    revision: RevisionOption = None,
    top_k: Annotated[
        int, typer.Option(metavar="INTEGER", min=1, help="Most detections per image.")
    ] = 100,
    html: Annotated[
        bool,
        typer.Option("--report", help="Also write report.html: a page to look through and filter."),
    ] = False,
    frames: Annotated[
        int | None,
        typer.Option(
            metavar="INTEGER",
            min=1,
            help="Most frames of each video or camera. Default: all of them.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Detect objects in images, videos or what a camera sees.

    Writes detections.json (COCO results), images.json (the COCO images and categories that its
    ids mean) and an annotated picture of each image. An image that cannot be read is reported
    and skipped, and so is a picture that cannot be written; the exit code is then 1. With
    --report also report.html, and report_2.html and so on if there are many images.

    Of a video file every frame is used, and an annotated video is written. A camera or a stream
    runs until Ctrl-C, and frames that come while the model is busy are dropped. The extra "video"
    is needed.
    """
    import cdetr_fast
    from cdetr_fast.cli.detect_video import detect_videos, list_videos
    from cdetr_fast.reports.detections import DetectionReport
    from cdetr_fast.reports.page import describe_environment

    videos = list_videos(inputs)
    if videos and html:
        raise typer.BadParameter("--report shows images, not videos; leave it out")
    if frames is not None and not videos:
        raise typer.BadParameter("--frames is for videos, cameras and streams; leave it out")
    paths = [] if videos else _list_images(map(Path, inputs), output)
    make_output_folder(output)
    detector = Detector(model, revision, device)
    detector.note_its_classes()
    if videos or engine != "torch":
        detector.optimize(engine)
    else:
        detector.optimize_for(len(paths))
    if videos:
        detect_videos(detector, videos, output, threshold, top_k, batch_size, frames)
        return
    records: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    names = PictureNames(output, paths)
    read: deque[tuple[int, Path, Image.Image]] = deque()
    undrawn = 0
    page = DetectionReport(threshold) if html else None

    def write(item: tuple[int, Path, Image.Image, DetectionResult]) -> None:
        nonlocal undrawn
        image_id, path, image, result = item
        picture = names.take(path)
        is_drawn = True
        try:
            save_picture(result.draw(image), picture)
        except UserError as error:
            logger.error("not drawn: %s", error)
            is_drawn = False
            undrawn += 1
        records.append(
            {
                "id": image_id,
                "file_name": str(path),
                "width": image.width,
                "height": image.height,
                "picture": picture.name if is_drawn else None,
            }
        )
        results.extend(result.to_coco(image_id))
        if page is not None:
            page.add(str(path), image, result, picture.name if is_drawn else None)
        task.advance()

    # Images are read and resized in a thread ahead of the model, pictures written in one behind it.
    with progress.task("detecting", len(paths)) as task, Background(write, _WAITING) as writer:

        def readable() -> Iterator[Image.Image]:
            for image_id, path in enumerate(paths):
                try:
                    image = read_image(path)
                except UserError as error:
                    logger.error("skipped: %s", error)
                    task.advance()
                else:
                    read.append((image_id, path, image))
                    yield image

        def found() -> Iterator[DetectionResult]:
            try:
                yield from detector.predict_each(readable(), threshold, top_k, batch_size)
            except ValueError as error:  # the checkpoint does not take such images
                raise UserError(f"--model {detector.name}: {first_line(error)}") from error

        for result in found():
            writer.put((*read.popleft(), result))
    skipped = len(paths) - len(records)

    if not records:
        raise UserError(f"none of {len(paths)} images could be read; see above why")
    categories = [{"id": i, "name": name} for i, name in sorted(detector.id2label.items())]
    index = {"info": {}, "images": records, "annotations": [], "categories": categories}
    try:
        write_json(output / "images.json", index, indent=1, sort_keys=False)
        write_json(output / "detections.json", results, indent=1, sort_keys=False)
    except OSError as error:
        raise UserError(
            f"--output {output}: cannot be written ({first_line(error)}); name another folder"
        ) from error
    unwritten = False
    if page is not None:
        settings = {"threshold": threshold, "top_k": top_k, "batch_size": batch_size}
        environment = describe_environment(detector.device, cdetr_fast.__version__)
        try:
            with progress.task("writing the report"):
                page.write(output, detector.name, environment, settings)
        except OSError as error:
            logger.error("--report: %s cannot be written (%s)", output, first_line(error))
            unwritten = True
    notes = ((skipped, "skipped"), (undrawn, "without a picture"))
    note = "".join(f", {count} {what}" for count, what in notes if count)
    counts = f"{counted(len(records), 'image')}, {counted(len(results), 'detection')}"
    print(f"{counts}{note}: {output}")
    if not results and detector.name != EMBEDDED:
        progress.current().line(
            f"no score is above {threshold}; scores of a short training are low: lower --threshold"
        )
    if skipped or undrawn or unwritten:
        raise typer.Exit(1)


def _list_images(arguments: Iterable[Path], output: Path) -> list[Path]:
    """List files as they are named and folders as their images by name, each file once.

    Pictures that an earlier run has written into its own input folder are left out.
    """
    from cdetr_fast.images.load import image_files

    paths: dict[Path, Path] = {}
    for argument in arguments:
        found = [argument]
        if argument.is_dir():
            found = image_files(argument)
            if argument.resolve() == output.resolve():
                written = listed_pictures(output)
                found = [path for path in found if path.name not in written]
            if not found:
                raise UserError(
                    f"{argument}: no images in this folder; name one that holds them directly"
                )
        for path in found:
            paths.setdefault(path.resolve(), path)
    return list(paths.values())
