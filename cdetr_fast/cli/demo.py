"""`cdetr-fast demo`: drawn scenes detected and scored, or a photograph."""

from __future__ import annotations

import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cdetr_fast.cli.detector import COCO, Detector, read_image, save_picture
from cdetr_fast.cli.errors import UserError, is_installed
from cdetr_fast.cli.options import DeviceOption, ModelOption, ThresholdOption
from cdetr_fast.cli.output import PictureNames, make_output_folder
from cdetr_fast.common import progress

if TYPE_CHECKING:
    from PIL import Image

SCENES_PER_SEED = 10_000
"""Scenes of one `--seed`; those of 0 to 99,999 stay below the seeds of the training scenes."""

_SHEET_COLUMNS, _SHEET_ROWS = 4, 3
_SINGLE_PICTURES = 6
_NEXT = (
    (f"detect photo.jpg --model {COCO}", "COCO's 80 classes"),
    ("serve", "a page to drop pictures on"),
    ("train --help", "on data of your own"),
)


def demo(
    seed: Annotated[
        int,
        typer.Option(metavar="INTEGER", min=0, max=99_999, help="Other seeds draw other scenes."),
    ] = 0,
    count: Annotated[
        int,
        typer.Option(
            metavar="INTEGER", min=1, max=SCENES_PER_SEED, help="Scenes to draw and score."
        ),
    ] = 200,
    output: Annotated[Path, typer.Option(metavar="PATH", help="Folder for the pictures.")] = Path(
        "output/demo"
    ),
    image: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="A photograph instead of the scenes.", show_default=False
        ),
    ] = None,
    model: ModelOption = None,
    threshold: ThresholdOption = 0.4,
    device: DeviceOption = None,
) -> None:
    """Draw scenes, detect their objects, and score the result.

    No training has seen these scenes.
    """
    if image is None:
        _score_scenes(seed, count, output, model, threshold, device)
    else:
        _detect_photograph(image, output, model, threshold, device)
    width = max(len(arguments) for arguments, _ in _NEXT)
    lines = [f"  {_program()} {arguments:{width}}  # {use}" for arguments, use in _NEXT]
    progress.current().line("\n".join(["", "next:", *lines]))


def _program() -> str:
    """Return how to start this program from the same place again."""
    started = Path(sys.argv[0])
    if started.name == "__main__.py":
        return "python -m cdetr_fast"
    found = shutil.which(started.name)
    on_path = found is not None and started.exists() and Path(found).samefile(started)
    return started.name if on_path or not started.exists() else str(started)


def _score_scenes(
    seed: int, count: int, output: Path, model: str | None, threshold: float, device: str | None
) -> None:
    from cdetr_fast.demo import scenes
    from cdetr_fast.images.draw import contact_sheet
    from cdetr_fast.training.evaluation.box_scores import score_boxes

    make_output_folder(output)
    detector = Detector(model, None, device)
    names = [detector.id2label.get(i) for i in range(len(detector.id2label))]
    if names != list(scenes.CLASSES):
        raise UserError(
            f"--model {model}: expected the scenes' classes {', '.join(scenes.CLASSES)}; "
            "give --image to run another model on a photograph"
        )
    detector.optimize_for(count)
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    seconds: list[float] = []
    sheet: list[Image.Image] = []
    for i in progress.track(range(count), "detecting in drawn scenes"):
        scene, annotation = scenes.draw_scene(seed * SCENES_PER_SEED + i)
        start = time.perf_counter()
        result = detector.predict(scene, threshold=0.0)
        seconds.append(time.perf_counter() - start)
        annotations.append(annotation)
        results.extend(result.to_coco(i))
        if len(sheet) < _SHEET_COLUMNS * _SHEET_ROWS:
            zoomed = scene.resize((2 * scene.width, 2 * scene.height))
            sheet.append(result.above(threshold).draw(zoomed))

    for i, picture in enumerate(sheet[:_SINGLE_PICTURES]):
        picture.save(output / f"scene_{i}.png")
    contact_sheet(sheet, _SHEET_COLUMNS).save(output / "contact_sheet.png")
    objects = sum(len(annotation["labels"]) for annotation in annotations)
    print(f"model      {detector.describe()}")
    print(f"scenes     {count} unseen, {objects} objects, seed {seed}")
    if is_installed("faster_coco_eval"):
        with progress.task("scoring"):
            figures = score_boxes(scenes.coco_ground_truth(annotations), results).stats
        print(f"AP         {figures['AP']:.3f}")
        print(f"AP50       {figures['AP50']:.3f}")
    else:
        print("AP         not measured: pip install 'cdetr-fast[eval]'")
    print(
        f"time       {statistics.median(seconds) * 1e3:.1f} ms per image "
        f"(median; one image at a time, from picture to boxes, on {detector.describe_device()})"
    )
    print(f"pictures   {output / 'contact_sheet.png'}")


def _detect_photograph(
    path: Path, output: Path, model: str | None, threshold: float, device: str | None
) -> None:
    image = read_image(path)
    make_output_folder(output)
    detector = Detector(model, None, device)
    detector.note_its_classes()
    start = time.perf_counter()
    result = detector.predict(image, threshold)
    seconds = time.perf_counter() - start
    picture = PictureNames(output, [path]).take(path)
    save_picture(result.draw(image), picture)
    print(f"model      {detector.describe()}")
    for line in str(result).splitlines() if len(result) else ():
        score, _, rest = line.partition(" ")
        print(f"{score}       {rest}")
    if len(result) == 0:
        print(f"nothing    scores above {threshold}")
    print(f"time       {seconds * 1e3:.1f} ms (first call, on {detector.describe_device()})")
    print(f"picture    {picture}")
