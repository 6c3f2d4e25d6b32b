"""The application: its commands, the options that all of them share, and errors as one line."""

from __future__ import annotations

import inspect
import io
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from cdetr_fast.cli.benchmark import benchmark
from cdetr_fast.cli.build_native import build_native
from cdetr_fast.cli.convert import convert
from cdetr_fast.cli.demo import demo
from cdetr_fast.cli.detect import detect
from cdetr_fast.cli.errors import UserError, errors_as_lines
from cdetr_fast.cli.evaluate import evaluate
from cdetr_fast.cli.export import export
from cdetr_fast.cli.info import info
from cdetr_fast.cli.options import Command
from cdetr_fast.cli.qualify import qualify
from cdetr_fast.cli.reporting import Verbosity, reporting
from cdetr_fast.cli.serve import serve
from cdetr_fast.cli.train import train

_SHARED = {
    "quiet": "Only results and errors: no progress, notes or warnings.",
    "verbose": "Also debug messages, every warning with its place, and the traceback of an error.",
}

_FORKING = (train, evaluate)  # their data loaders start processes


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command with --quiet and --verbose, whose errors are lines."""

    def run(*, quiet: bool = False, verbose: bool = False, **given: Any) -> None:
        if quiet and verbose:
            raise typer.BadParameter("--quiet and --verbose exclude each other")
        with (
            reporting(Verbosity(quiet, verbose), command not in _FORKING) as reporter,
            errors_as_lines(reporter.write, with_traceback=verbose),
        ):
            command(**given)

    signature = inspect.signature(command, eval_str=True)
    shared = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=False,
            annotation=Annotated[
                bool, typer.Option(f"--{name}", f"-{name[0]}", help=help, show_default=False)
            ],
        )
        for name, help in _SHARED.items()
    ]
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = signature.replace(  # type: ignore[attr-defined] # typer reads it
        parameters=[*signature.parameters.values(), *shared]
    )
    return run


app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # one-line usage errors
    help="Conditional DETR: detect objects, train and evaluate, see what runs on this machine.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from cdetr_fast import __version__

        print(f"cdetr-fast {__version__}")
        raise typer.Exit


@app.callback()
def _before_commands(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None: ...


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
    benchmark,
):
    app.command(cls=Command)(reported(_command))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    The exit code is 2 for wrong usage, 1 for another error or a skipped image, 128 + n after a
    signal n that ended the command.

    Args:
        arguments: Command and flags; None takes those of the process.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # names of files and classes may have letters that its encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app(arguments, prog_name="cdetr-fast")
    except UserError as error:  # of an option's value, before the command runs
        print(f"cdetr-fast: {error}", file=sys.stderr)
        sys.exit(1)
