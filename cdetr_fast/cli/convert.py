"""`cdetr-fast convert`: other data sets as COCO files, COCO files as shards."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from cdetr_fast.cli.errors import require_packages

_SHARDS = "shards"


def convert(
    kind: Annotated[Literal["voc", "yolo", "shards"], typer.Argument(help="What to convert.")],
    source: Annotated[
        str,
        typer.Argument(
            metavar="PATH", help="Folder of the data set; for shards, its COCO JSON file."
        ),
    ],
    output: Annotated[str, typer.Option(metavar="PATH", help="Folder for what is written.")],
    images: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Folder of the images, if they are not found beside the file.",
            rich_help_panel=_SHARDS,
        ),
    ] = None,
    images_per_shard: Annotated[
        int, typer.Option(metavar="INTEGER", help="Images in a tar file.", rich_help_panel=_SHARDS)
    ] = 1000,
    bad_labels: Annotated[
        Literal["stop", "drop"],
        typer.Option(help="What to do with invalid labels.", rich_help_panel=_SHARDS),
    ] = "stop",
) -> None:
    """Write COCO JSON files for a Pascal VOC or YOLO folder, or a COCO set as shards.

    Shards are tar files for WebDataset.
    """
    require_packages("yaml", extra="train")
    if kind == "shards":
        from cdetr_fast.training.data.shards import write_shards

        path = write_shards(source, output, images, images_per_shard, bad_labels)
        print(f"--train-annotations {path}")
        return
    from cdetr_fast.training.data import conversion

    written = conversion.convert(kind, source, output)
    folder = conversion.image_folder(kind, source)
    print("\n".join(conversion.summary_lines(written, folder)))
