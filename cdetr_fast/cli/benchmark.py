"""`cdetr-fast benchmark`: which engine is right and faster on this machine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cdetr_fast.cli.detector import Detector
from cdetr_fast.cli.errors import UserError
from cdetr_fast.cli.options import LIST, ModelOption, RevisionOption, list_of
from cdetr_fast.common import progress
from cdetr_fast.common.errors import first_line

if TYPE_CHECKING:
    from torch import Tensor

    from cdetr_fast.inference.engine_records import Finding, Precision
    from cdetr_fast.inference.engine_trial import Shape

_CALIBRATION = 8  # images at least


def benchmark(
    model: ModelOption = None,
    shapes: Annotated[
        str,
        typer.Option(
            metavar=f"TEXT{LIST}",
            parser=list_of(str),
            help="Batches to try, as BxHxW in pixels; a p behind it pads all images but the first.",
        ),
    ] = "1x800x1066",
    precisions: Annotated[
        str,
        typer.Option(
            metavar=f"TEXT{LIST}",
            parser=list_of(str),
            help="Of fp32, bf16, int8 and int8-bf16; int8 takes minutes.",
        ),
    ] = "fp32 bf16",
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Folder of images to compare outputs on, and to find ranges for int8 with. "
            "Default: drawn scenes.",
            show_default=False,
        ),
    ] = None,
    repeats: Annotated[
        int, typer.Option(metavar="INTEGER", min=1, help="Timed calls of each engine.")
    ] = 10,
    revision: RevisionOption = None,
) -> None:
    """Find out which engine is right and faster for a model on this CPU.

    PyTorch and OpenVINO, if that is installed, run in turns, with as many threads as
    OMP_NUM_THREADS says. What is found is kept in the user's cache (CDETR_FAST_CACHE), and
    engine="auto" goes by it from then on.
    """
    from cdetr_fast.inference import engine_records
    from cdetr_fast.inference.engine_trial import try_engines

    wanted = [_shape(text) for text in shapes]
    kinds = [_precision(text) for text in precisions]
    detector = Detector(model, revision, "cpu")
    if detector.segments:
        raise UserError(f"--model {detector.name}: segments; only PyTorch runs such models")
    machine = engine_records.machine()
    findings: list[Finding] = []
    for shape in wanted:
        with progress.task(f"measuring {shape}"):
            count = 1 + any("int8" in kind for kind in kinds) * -(-_CALIBRATION // shape.batch)
            batch, *calibration = _batches(detector, images, shape, count)
            findings += try_engines(detector.model, shape, batch, kinds, calibration, repeats)
    _print_findings(findings)
    try:
        path = engine_records.write(machine, findings)
    except OSError as error:
        raise UserError(
            f"the record cannot be written ({first_line(error)}); name another folder in "
            "CDETR_FAST_CACHE"
        ) from error
    known, _ = engine_records.read(machine)
    chosen = engine_records.choices(known)
    for work in dict.fromkeys((finding.model, finding.precision) for finding in findings):
        print(f'engine="auto" in {work[1]} is {chosen[work].engine}: {chosen[work].reason}')
    print(f"record: {path}")


def _shape(text: str) -> Shape:
    from cdetr_fast.inference.engine_trial import Shape

    try:
        return Shape.parse(text)
    except ValueError as error:
        raise typer.BadParameter(f"--shapes: {error}") from error


def _precision(text: str) -> Precision:
    from cdetr_fast.inference.engine_trial import PRECISIONS

    for precision in PRECISIONS:
        if precision == text:
            return precision
    raise typer.BadParameter(f"--precisions: expected some of {', '.join(PRECISIONS)}, got {text}")


def _batches(detector: Detector, folder: Path | None, shape: Shape, count: int) -> list[Tensor]:
    """Return batches of prepared images; those of a folder come again if there are too few."""
    from itertools import cycle, islice

    import torch

    from cdetr_fast.cli.detector import read_image
    from cdetr_fast.demo.scenes import draw_scene
    from cdetr_fast.images.load import image_files

    size = shape.height, shape.width
    if folder is None:
        pictures = (draw_scene(seed, size)[0] for seed in range(count * shape.batch))
    elif folder.is_dir() and (paths := image_files(folder)):
        pictures = (read_image(path) for path in islice(cycle(paths), count * shape.batch))
    else:
        raise UserError(f"--images {folder}: expected a folder with images")
    edges = {"height": shape.height, "width": shape.width}
    prepared = [
        detector.model.image_processor([picture], size=edges, return_tensors="pt")["pixel_values"]
        for picture in pictures
    ]
    return list(torch.cat(prepared).split(shape.batch))


def _print_findings(findings: Iterable[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table

    header = ("shape", "precision", "engine", "ms", "fastest", "logits off by", "boxes off by", "")
    table = Table(*header, box=None, pad_edge=False)
    for one in findings:
        times = ("-" if x is None else f"{x:.1f}" for x in (one.ms, one.min_ms))
        errors = ("-" if x is None else f"{x:.0e}" for x in (one.logits_error, one.boxes_error))
        table.add_row(one.shape, one.precision, one.engine, *times, *errors, one.verdict)
    Console(highlight=False, markup=False).print(table)
