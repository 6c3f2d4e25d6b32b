"""`cdetr-fast evaluate`: figures of a checkpoint, and their report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cdetr_fast.cli.errors import require_training
from cdetr_fast.cli.options import ExifOption

if TYPE_CHECKING:
    from cdetr_fast.training.evaluation.detection import Evaluation

_COLUMNS = ("AP", "AP50", "AR100")
_SEGMENT_COLUMNS = ("PQ", "SQ", "RQ", "mask_AP", "mask_AP50")


def evaluate(
    model: Annotated[
        str, typer.Option(metavar="TEXT", help="Folder, hub name or the authors' .pth.")
    ],
    annotations: Annotated[
        str, typer.Option(metavar="PATH", help="COCO JSON file, or a split's folder of an export.")
    ],
    images: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Folder of its images, if they are not found beside it."),
    ] = None,
    masks: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="Folder of panoptic PNG files: measures panoptic quality too."
        ),
    ] = None,
    output: Annotated[
        str, typer.Option(metavar="PATH", help="Folder for the results.")
    ] = "output/evaluate",
    batch_size: Annotated[
        int, typer.Option(metavar="INTEGER", help="Images per forward pass.")
    ] = 1,
    num_workers: Annotated[
        int, typer.Option(metavar="INTEGER", help="Processes that load images.")
    ] = 2,
    device: Annotated[
        Literal["auto", "cpu"], typer.Option(help="cpu ignores the GPUs of the machine.")
    ] = "auto",
    threshold: Annotated[
        float,
        typer.Option(metavar="FLOAT", help="Lowest score in confusion, pictures and segments."),
    ] = 0.5,
    bad_labels: Annotated[
        Literal["stop", "drop"], typer.Option(help="What to do with invalid labels.")
    ] = "stop",
    bad_images: Annotated[
        Literal["stop", "skip"],
        typer.Option(help="skip leaves images that cannot be read out of the figures."),
    ] = "stop",
    exif: ExifOption = "auto",
    against: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="Output of an earlier evaluation, or a run, to compare with."
        ),
    ] = None,
) -> None:
    """Score a checkpoint by COCO's rules.

    Prints the figures, and writes report.html, figures and detections.
    """
    require_training()
    from cdetr_fast.training.evaluation.checkpoint import evaluate as run
    from cdetr_fast.training.run.launch import end_process_group

    try:
        evaluation = run(
            model,
            annotations,
            images,
            output,
            masks=masks,
            batch_size=batch_size,
            num_workers=num_workers,
            device=device,
            threshold=threshold,
            bad_labels=bad_labels,
            bad_images=bad_images,
            exif=exif,
            against=against,
        )
        if evaluation is not None:
            _print_evaluation(evaluation)
            print(f"report: {output}/report.html")
    finally:
        end_process_group()


def _print_evaluation(evaluation: Evaluation) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = _COLUMNS + tuple(name for name in _SEGMENT_COLUMNS if name in evaluation.stats)
    table = Table("class", "objects", *columns, box=None, pad_edge=False)
    for one in evaluation.classes:
        table.add_row(one["class"], str(one["objects"]), *(f"{one[k]:.3f}" for k in columns))
    console = Console(highlight=False, markup=False)
    console.print(table)
    for name, value in evaluation.stats.items():
        console.print(f"{name:14} {value:.3f}")
