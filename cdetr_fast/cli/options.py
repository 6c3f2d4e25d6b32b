"""Parts of commands: options that several share, lists of values, grouped help."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from cdetr_fast.common.validation import did_you_mean

LIST = "..."
"""End of the metavar of an option that takes a list of values."""

METAVARS: dict[type, str] = {int: "INTEGER", float: "FLOAT", str: "TEXT"}
"""Names of types in the help."""

_FLAG = re.compile(r"--?[a-zA-Z]")
_END = "--"  # of the options: what follows are arguments, even with a dash in front

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="TEXT",
        help="Folder, hub name or the authors' .pth. Default: the checkpoint in the package.",
        show_default=False,
    ),
]
RevisionOption = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="Branch, tag or commit of a hub name.", show_default=False),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT", help="cpu, cuda, cuda:1 ... Default: cuda if available.", show_default=False
    ),
]
EngineOption = Annotated[
    Literal["torch", "openvino", "auto"],
    typer.Option(help="What runs the model; openvino on a CPU. auto goes by cdetr-fast benchmark."),
]
ThresholdOption = Annotated[
    float,
    typer.Option(
        metavar="FLOAT", min=0.0, max=1.0, help="Lowest score that counts as a detection."
    ),
]

ExifOption = Annotated[
    Literal["auto", "upright", "stored"],
    typer.Option(
        help="Picture that labels are on where its size does not show it: as its EXIF orientation "
        "turns it, as it is stored, or as the other images show (else upright)."
    ),
]


def list_of(item: type) -> Callable[[str], list[Any]]:
    """Return the parser of an option that takes a list of values of a type."""

    def parse(text: str) -> list[Any]:
        try:
            return [item(value) for value in shlex.split(text)]
        except ValueError as error:
            raise typer.BadParameter(f"expected {METAVARS[item]}{LIST}, got {text!r}") from error

    return parse


class Command(TyperCommand):
    """A command with grouped help, suggestions for unknown flags, and flags that take lists.

    Click has no options with lists of values, like `--scales 480 512`. Here the values up to the
    next flag become one, quoted as in a shell, which the option's parser splits again with `shlex`.
    Of a flag that comes twice the last counts.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rich_markup_mode = "rich"  # for panels in the help; errors stay one line
        self.help = re.sub(r"(?<=\S)\n(?=\S)", " ", self.help or "")  # rich keeps line breaks

    # typer has its own copy of click, or not: the type of the context depends on its version
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        options = self.get_params(ctx)
        known = {flag for option in options for flag in (*option.opts, *option.secondary_opts)}
        end = args.index(_END) if _END in args else len(args)
        for flag in (argument.partition("=")[0] for argument in args[:end]):
            if flag.startswith("--") and flag not in known:
                ctx.fail(f"No such option: {flag}{did_you_mean(flag, known)}")
        lists = {
            flag
            for option in options
            if (getattr(option, "metavar", None) or "").endswith(LIST)
            for flag in option.opts
        }
        joined = _join_lists(args[:end], lists) + args[end:]
        rest = super().parse_args(ctx, joined)
        for option in options:
            value = ctx.params.get(option.name)
            if isinstance(value, float) and not math.isfinite(value):
                # an option's limits need not exclude it: nan is neither below nor above them
                ctx.fail(f"Invalid value for '{option.opts[0]}': {value} is not a finite number.")
        return rest


def _join_lists(args: Sequence[str], flags: set[str]) -> list[str]:
    joined: list[str] = []
    values: list[str] | None = None  # of the list that is being read
    for argument in args:
        if values is not None and not _FLAG.match(argument):
            values.append(argument)
            continue
        if values is not None:
            joined.append(shlex.join(values))
            values = None
        flag, equals, value = argument.partition("=")
        if flag not in flags:
            joined.append(argument)
        elif equals:
            joined += [flag, shlex.join([value])]
        else:
            joined.append(flag)
            values = []
    return joined if values is None else [*joined, shlex.join(values)]
