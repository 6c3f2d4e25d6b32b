"""`cdetr-fast convert`: other data sets as COCO files, COCO files divided or as shards."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from cdetr_fast.cli.errors import require_packages
from cdetr_fast.cli.options import LIST, ExifOption, list_of

_SHARDS, _SPLIT = "shards", "division"


def convert(
    kind: Annotated[
        Literal["voc", "yolo", "coco", "shards"], typer.Argument(help="What to convert.")
    ],
    source: Annotated[
        str,
        typer.Argument(
            metavar="PATH", help="Folder of the data set; for coco and shards, its COCO JSON file."
        ),
    ],
    output: Annotated[str, typer.Option(metavar="PATH", help="Folder for what is written.")],
    images: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Folder of the images of a COCO file, if they are not found beside it.",
        ),
    ] = None,
    exif: ExifOption = "auto",
    split: Annotated[
        Any,
        typer.Option(
            metavar=f"FLOAT{LIST}",
            parser=list_of(float),
            help="Fractions of the images for train, val (and test), stratified by class, for a "
            "set without splits: 0.8 0.1 0.1.",
            rich_help_panel=_SPLIT,
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(metavar="INTEGER", min=0, help="Of the division.", rich_help_panel=_SPLIT),
    ] = 0,
    images_per_shard: Annotated[
        int, typer.Option(metavar="INTEGER", help="Images in a tar file.", rich_help_panel=_SHARDS)
    ] = 1000,
    bad_labels: Annotated[
        Literal["stop", "drop"],
        typer.Option(help="What to do with invalid labels.", rich_help_panel=_SHARDS),
    ] = "stop",
) -> None:
    """Convert a data set to COCO files or shards, or divide it.

    voc and yolo are folders of Pascal VOC and YOLO; coco divides a COCO file by --split. Shards are
    tar files for WebDataset.
    """
    require_packages("yaml", extra="train")
    if kind == "shards":
        from cdetr_fast.training.data.shards import write_shards

        path = write_shards(source, output, images, images_per_shard, bad_labels, exif)
        print(f"--train-annotations {path}")
        return
    from cdetr_fast.training.data import conversion

    folder = conversion.image_folder(kind, source, images)  # before anything is written
    written = conversion.convert(kind, source, output, split or (), seed, exif)
    print("\n".join(conversion.summary_lines(written, folder, exif)))
