"""`cdetr-fast train`: every setting of `TrainingConfig` is a flag."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
import types
import typing
from typing import Annotated, Any, Literal

import typer

from cdetr_fast.cli.errors import require_packages, require_training
from cdetr_fast.cli.options import LIST, METAVARS, list_of
from cdetr_fast.common.validation import field_types
from cdetr_fast.training.config import Setting, TrainingConfig, parse_yaml, read_yaml


def train(config: str | None = None, **given: Any) -> None:
    """Train on COCO-format data. Every setting is a flag and a key of the YAML file."""
    require_training()
    values = {name: value for name, value in given.items() if value is not None}
    source = config or "cdetr-fast train"
    merged = TrainingConfig.from_dict((read_yaml(config) if config else {}) | values, source)

    from accelerate import PartialState

    from cdetr_fast.training.engine import train as run
    from cdetr_fast.training.run.launch import end_process_group

    try:
        result = run(merged)
        if PartialState().is_main_process:
            figures = "".join(
                f", {k} {result[k]:.3f}" for k in ("AP", "AP50", "PQ", "mask_AP") if k in result
            )
            print(f"{result['step']} steps{figures}: {merged.output}")
            print(f"report: {merged.output}/report.html")
    finally:
        end_process_group()


def _flag(setting: dataclasses.Field[Any], annotation: Any) -> inspect.Parameter:
    """Return a parameter for typer that is None unless its flag is given."""
    flag = "--" + setting.name.replace("_", "-")
    group, help = next(part for part in annotation.__metadata__ if isinstance(part, Setting))
    kind = _plain(annotation)
    origin = typing.get_origin(kind)
    options: dict[str, Any] = {
        "help": help + _shown(setting.default),
        "rich_help_panel": group,
    }
    if kind is bool:
        flag += f"/--no-{flag[2:]}"
    elif origin is dict:
        options |= {"metavar": f"NAME=VALUE{LIST}", "parser": _pairs}
        kind = str
    elif origin is tuple:
        item = _plain(typing.get_args(kind)[0])
        options |= {"metavar": f"{METAVARS[item]}{LIST}", "parser": list_of(item)}
        kind = str
    elif origin is not Literal:
        options["metavar"] = METAVARS[kind]
    return inspect.Parameter(
        setting.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, typer.Option(flag, **options)],
    )


def _plain(annotation: Any) -> Any:
    """Return the type in `Annotated[type, ...] | None`."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _plain(typing.get_args(annotation)[0])
    if origin in (types.UnionType, typing.Union):
        return _plain(next(k for k in typing.get_args(annotation) if k is not types.NoneType))
    return annotation


def _shown(default: Any) -> str:
    if default in (None, "", dataclasses.MISSING):
        return ""
    if isinstance(default, bool):
        default = "on" if default else "off"
    elif isinstance(default, tuple):
        default = " ".join(map(str, default)) or "none"
    return f" (default: {default})"


def _pairs(text: str) -> dict[str, Any]:
    """Parse NAME=VALUE pairs, the values as YAML."""
    require_packages("yaml", extra="train")
    pairs = {}
    for pair in shlex.split(text):
        name, equals, value = pair.partition("=")
        if not equals:
            raise typer.BadParameter(f"expected NAME=VALUE, got {pair!r}")
        try:
            pairs[name] = parse_yaml(value)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise typer.BadParameter(
                f"expected a value in YAML behind {name}=, got {value!r} ({reason})"
            ) from error
    return pairs


train.__signature__ = inspect.Signature(  # type: ignore[attr-defined] # typer reads it
    [
        inspect.Parameter(
            "config",
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                str | None,
                typer.Option(metavar="PATH", help="YAML file of settings; flags override it."),
            ],
        ),
        *(
            _flag(setting, field_types(TrainingConfig)[setting.name])
            for setting in dataclasses.fields(TrainingConfig)
        ),
    ]
)
