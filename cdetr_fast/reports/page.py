"""A page from a template of this package, and the description of where it was made."""

from __future__ import annotations

import datetime
import functools
import os
import platform
from collections.abc import Sequence
from typing import Any

import jinja2
import torch

from cdetr_fast.common.machine import installed_version

_PACKAGES = ("torch", "torchvision", "timm", "triton")


def render(template: str, **content: Any) -> str:
    """Return the page of a template; every value is escaped unless it is `Markup`.

    Letters that UTF-8 does not have become question marks: those of file names in another encoding.

    Args:
        template: File name in `templates`.
        **content: Values of the template's names; a missing one is an error.
    """
    text = _templates().get_template(template).render(content)
    return text.encode("utf-8", "replace").decode("utf-8")


@functools.cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("cdetr_fast.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def number(value: float | None, digits: int = 3) -> str:
    """Return a figure as text, "-" for NaN and None."""
    return "-" if value is None or value != value else f"{value:.{digits}f}"


def describe_environment(device: torch.device, version: str) -> list[tuple[str, str]]:
    """Return names and values: date, versions, machine and device.

    Args:
        device: What the model ran on.
        version: Of this package.
    """
    now = datetime.datetime.now().astimezone()
    rows = [("date", f"{now:%Y-%m-%d %H:%M %Z}"), ("cdetr_fast", version)]
    versions = ((name, installed_version(name)) for name in _PACKAGES)
    rows += [(name, version) for name, version in versions if version]  # triton is for Linux alone
    rows.append(("python", f"{platform.python_version()}, {platform.platform()}"))
    if device.type == "cuda":
        rows.append(("device", f"{device}, {torch.cuda.get_device_name(device)}"))
    else:
        threads = torch.get_num_threads()
        rows.append(("device", f"{device}, {threads} threads of {os.cpu_count()} cores"))
    return rows


def describe_settings(settings: dict[str, Any]) -> list[tuple[str, str]]:
    """Return names and values as text; lists as their items, mappings as pairs."""
    return [(name, _setting(value)) for name, value in settings.items()]


def _setting(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={_setting(item)}" for name, item in value.items()) or "none"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_setting, value)) or "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None or value == "" else str(value)
