"""`cdetr-fast export`: a model as a file for another runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cdetr_fast.cli.detector import Detector
from cdetr_fast.cli.errors import UserError
from cdetr_fast.cli.options import DeviceOption, ModelOption, RevisionOption
from cdetr_fast.common.errors import first_line

_CALIBRATION = 64  # images at most


def export(
    output: Annotated[Path, typer.Argument(help="The file: .pt2, or .onnx, .xml.")],
    model: ModelOption = None,
    format: Annotated[
        Literal["torch", "aoti", "onnx", "openvino"], typer.Option(help="Kind of file.")
    ] = "torch",
    size: Annotated[
        tuple[int, int],
        typer.Option(metavar="INTEGER INTEGER", help="Height and width of the images to try."),
    ] = (800, 1066),
    batch: Annotated[int, typer.Option(metavar="INTEGER", min=1, help="Images in a batch.")] = 1,
    static: Annotated[
        bool, typer.Option("--static", help="Only for this size and batch; constants folded.")
    ] = False,
    masked: Annotated[
        bool, typer.Option("--masked", help="Take padding masks as a second input, as numbers.")
    ] = False,
    int8: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Put an openvino file into 8 bits, with ranges from the images of this folder.",
            show_default=False,
        ),
    ] = None,
    device: DeviceOption = None,
    revision: RevisionOption = None,
) -> None:
    """Export to torch.export, AOTInductor, ONNX or OpenVINO.

    The file is loaded, and its outputs are compared with those of the model.
    """
    from cdetr_fast.inference.export import export as write

    detector = Detector(model, revision, device)
    calibration = None if int8 is None else detector.prepared_images(int8, _CALIBRATION)
    try:
        error = write(
            detector.model,
            output,
            format,
            size=size,
            batch=batch,
            dynamic=not static,
            masked=masked,
            int8_calibration=calibration,
        )
    except (OSError, RuntimeError, TypeError, ValueError) as failure:
        raise UserError(first_line(failure)) from failure
    weights = output.with_suffix(".bin")  # of openvino's format
    files = [output, weights] if format == "openvino" else [output]
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    print(f"{output}, {megabytes:.1f} MB; its outputs are within {error:.0e} of the model's")
