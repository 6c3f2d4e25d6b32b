"""`cdetr-fast info`: what runs fast here, what is missing, and the path of each operator."""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import typer

_MOST_COLUMNS = 100
_NATIVE = {"cpu": "C++", "cuda": "CUDA"}
_NAME_WIDTH = 14


def info(
    as_json: Annotated[
        bool, typer.Option("--json", help="Everything, as JSON.", show_default=False)
    ] = False,
) -> None:
    """Show what is fast here, what is missing, and why.

    Names the path that each operator takes, versions and places.
    """
    from cdetr_fast.cli.machine import facts
    from cdetr_fast.common import progress

    with progress.task("looking at this machine"):
        found = facts()
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        columns = min(shutil.get_terminal_size((80, 24)).columns, _MOST_COLUMNS)
        print("\n".join(lines(found, columns)))


def lines(found: dict[str, Any], columns: int = 80) -> Iterator[str]:
    """Yield the facts as text.

    Args:
        found: From `facts`.
        columns: Width of the lines, as far as their words fit.
    """
    yield from _wrapped(f"cdetr_fast {found['version']} on {_device(found)}", columns, "")
    yield from ("", "Fast here")
    for line in _fast(found):
        yield from _wrapped(line, columns, "  ")
    yield from ("", "Missing")
    if found["device"] == "cpu":
        build = f"built for CUDA {found['cuda']}" if found["cuda"] else "built without CUDA"
        yield from _wrapped(f"a GPU: torch {found['packages']['torch']}, {build}, sees none",
                            columns, "  ")  # fmt: skip
    for lack in found["missing"]:
        yield from _wrapped(f"{lack['what']}: {lack['why']}", columns, "  ")
        yield f"    {lack['command']}"
    if found["device"] != "cpu" and not found["missing"]:
        yield "  nothing"
    yield from ("", f"Operators on {found['device']}")
    yield from _operators(found["operators"], columns)
    yield from ("", "Versions and places")
    for name, value in _details(found).items():
        yield from _wrapped(value, columns, f"  {name:<{_NAME_WIDTH}}")


def _device(found: dict[str, Any]) -> str:
    if found["gpus"]:
        return ", ".join(gpu["name"] for gpu in found["gpus"])
    return f"the CPU ({_threads(found['cpu'])})"


def _threads(cpu: dict[str, Any]) -> str:
    return f"{cpu['cores']} cores, torch uses {cpu['threads']} of them"


def _fast(found: dict[str, Any]) -> Iterator[str]:
    """Yield what runs faster than PyTorch's own operators, and what does not."""
    paths: dict[str, set[str]] = {}
    for row in found["operators"]:
        paths.setdefault(row["operator"], set()).add(row["path"])
    kinds: dict[str, list[str]] = {}
    for operator, taken in paths.items():
        for path in taken - {"torch"}:
            kind = _NATIVE[found["device"]] if path == "native" else path
            kinds.setdefault(kind, []).append(operator)
    for kind, operators in sorted(kinds.items()):
        yield f"{kind} kernels: {', '.join(operators)}"
    if found["device"] == "cpu" and (dtypes := found["cpu"]["fused_convolutions"]):
        yield f"optimize(model): fused convolutions in {', '.join(dtypes)}"
    for one in found["engines"]["chosen"]:
        if one["engine"] != "torch":
            work = f"{one['precision']} of {one['model']}"
            yield f'optimize(model, engine="auto"): {one["engine"]} for {work}, as {one["reason"]}'
    plain = sum(taken == {"torch"} for taken in paths.values())
    if plain:
        yield f"PyTorch's own code: {plain} of {len(paths)} operators"


def _operators(rows: list[dict[str, Any]], columns: int) -> Iterator[str]:
    """Yield a line per operator with the numbers of its reasons, then each reason once."""
    numbers: dict[str, int] = {}
    by_name: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_name.setdefault(row["operator"], []).append(row)
    width = max(map(len, by_name))
    for name, own in by_name.items():
        reasons = dict.fromkeys(reason for row in own for reason in row["reasons"])
        marks = [str(numbers.setdefault(reason, len(numbers) + 1)) for reason in reasons]
        yield f"  {name:<{width}}  {_path(own)}  [{', '.join(marks)}]"
    yield ""
    for reason, number in numbers.items():
        yield from _wrapped(reason, columns, f"  [{number}] ")


def _path(rows: list[dict[str, Any]]) -> str:
    """Return the path of an operator, with what was measured if calls of several kinds were."""
    taken = [row for row in rows if row["path"] != "torch"]
    if rows[0]["calls"] is None or not taken:
        return f"{rows[0]['path'] if len(rows) == 1 else 'torch':<6}"
    ratios = [float(m[1]) for row in taken if (m := re.search(r"([\d.]+) times", row["figure"]))]
    speed = f", {min(ratios):.2f} to {max(ratios):.2f} times as fast" if ratios else ""
    path = "/".join(sorted({row["path"] for row in taken}))
    return f"{path} in {len(taken)} of {len(rows)} kinds of calls{speed}"


def _details(found: dict[str, Any]) -> dict[str, str]:
    cpu = found["cpu"]
    details = {
        "python": f"{found['python']}, {found['platform']}",
        **{name: version or "not installed" for name, version in found["packages"].items()},
        "cpu": f"{_threads(cpu)}, {cpu['capability']}",
    }
    for i, gpu in enumerate(found["gpus"]):
        details[f"cuda:{i}"] = (
            f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB, "
            f"compute capability {gpu['compute_capability']}"
        )
    for part, name in (("cpu", "C++"), ("cuda", "CUDA")):
        details[f"native {name}"] = found["native"][part]["state"]
    return details | {
        "records": found["records"],
        "engines": found["engines"]["source"],
        "assignment": found["assignment"],
    }


def _wrapped(text: str, columns: int, start: str) -> Iterable[str]:
    """Return lines of a text with a hanging indent; words longer than a line stay whole."""
    return textwrap.wrap(
        text,
        columns,
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_long_words=False,
        break_on_hyphens=False,
    )
