"""The application: its commands, and errors as one line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from cdetr_fast.cli.benchmark import benchmark
from cdetr_fast.cli.build_native import build_native
from cdetr_fast.cli.convert import convert
from cdetr_fast.cli.demo import demo
from cdetr_fast.cli.detect import detect
from cdetr_fast.cli.errors import UserError
from cdetr_fast.cli.evaluate import evaluate
from cdetr_fast.cli.export import export
from cdetr_fast.cli.info import info
from cdetr_fast.cli.options import Command
from cdetr_fast.cli.qualify import qualify
from cdetr_fast.cli.serve import serve
from cdetr_fast.cli.train import train
from cdetr_fast.training.errors import DataError, TrainingStopped

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # one-line usage errors
    help="Conditional DETR: detect objects, train and evaluate, see what runs on this machine.",
)
for _command in (
    detect,
    serve,
    demo,
    train,
    evaluate,
    convert,
    export,
    info,
    qualify,
    build_native,
):
    app.command(cls=Command)(_command)
app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(benchmark)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    The exit code is 2 for wrong usage, 1 for another error or a skipped image, 128 + n after a
    signal n that ended a training run.

    Args:
        arguments: Command and flags; None takes those of the process.
    """
    try:
        app(arguments, prog_name="cdetr-fast")
    except TrainingStopped as error:
        _fail(error, error.exit_code)
    except (UserError, DataError) as error:
        # One process of a training run reports what all of them have raised.
        _fail(None if getattr(error, "reported_elsewhere", False) else error, 1)


def _fail(error: Exception | None, code: int) -> None:
    if error is not None:
        print(f"cdetr-fast: {error}", file=sys.stderr)
    sys.exit(code)
