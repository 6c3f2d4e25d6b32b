"""`cdetr-fast qualify`: which kernels are right and faster on this GPU."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from cdetr_fast.cli.errors import UserError
from cdetr_fast.cli.options import DeviceOption


def qualify(
    operators: Annotated[
        list[str] | None, typer.Argument(help="Names of operators; all by default.")
    ] = None,
    level: Annotated[
        Literal["quick", "full"],
        typer.Option(help="full tries all sizes, dtypes and tiles, in up to half an hour."),
    ] = "quick",
    device: DeviceOption = None,
) -> None:
    """Find out which kernels are right and faster on this GPU.

    Those are used from then on. Takes at most 90 seconds. Each operator runs in a process of its
    own, so that a crash or a hang is a line of the report. What is found is kept in the user's
    cache (CDETR_FAST_CACHE).
    """
    import cdetr_kernels
    from cdetr_fast.common import progress

    display = progress.current()
    try:
        with display.task(f"trying kernels ({level})", len(operators or ()) or None) as task:

            def say(line: str) -> None:
                display.result(line)
                task.advance()

            report = cdetr_kernels.qualify(device, operators or None, level, say=say)
    except (RuntimeError, ValueError) as error:
        raise UserError(str(error)) from error
    for line in report.details():
        print(f"  {line}")
    print(report.summary())
