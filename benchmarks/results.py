"""Results: the one format of rows, the environment they were measured in, and their files.

A file in `benchmarks/results` is `{"environment": {...}, "rows": [...]}`: device, versions, commit
and command hold for all of its rows. A row says what was measured (`benchmark`, `work`, `shape`,
`dtype`, `provider`), how long it took (`ms`, the median, with `min_ms`, `p95_ms`, `max_ms`),
`speed-up` over the reference, and `accuracy`, the errors that the gate has seen. A provider that
failed has `not measured`, the reason, and no time.
"""

import dataclasses
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cdetr_fast.common.files import write_json
from cdetr_fast.common.machine import installed_version, processor_name

RESULTS = Path(os.environ.get("CDETR_FAST_RESULTS", Path(__file__).parent / "results"))

PACKAGES = ("triton", "timm", "transformers", "onnxruntime", "openvino", "nncf")
"""Whose versions a file has, besides torch's; null if they are not installed."""

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Results:
    """The content of a file."""

    name: str
    environment: dict[str, Any]
    rows: list[Row]


def save(name: str, rows: list[Row], command: str) -> Path:
    """Write rows and environment to `benchmarks/results/<name>.json`.

    Args:
        name: Name of the file, without suffix.
        rows: What was measured.
        command: What measured it, to be shown beside the figures.
    """
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment(command), "rows": rows}
    write_json(path, content, indent=1, sort_keys=False)
    return path


def command_line(name: str, arguments: Sequence[str] | None = None) -> str:
    """Return the command that runs a benchmark or tool; None takes this process's arguments."""
    given = sys.argv[1:] if arguments is None else arguments
    return shlex.join(["python", "-m", "benchmarks", name, *given])


def load(path: Path) -> Results:
    """Read a file of `save`."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return Results(path.stem, content["environment"], content["rows"])


def machine(environment: dict[str, Any]) -> str:
    """Return the processor of a file of `save`, and how many threads it used."""
    threads = environment["threads"]
    return f"{environment['processor']}, {threads} thread{'s' if threads != 1 else ''}"


def environment(command: str) -> dict[str, Any]:
    """Return what a reader needs to judge a figure: machine, versions, commit, command."""
    device = {}
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        device = {"device": torch.cuda.get_device_name(), "driver": _first_line(query)}
    return {
        "date": datetime.date.today().isoformat(),
        "command": command,
        "commit": _first_line(["git", "describe", "--always", "--dirty"]),
        "processor": processor_name(),
        **device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: installed_version(name) for name in PACKAGES},
    }


def print_table(rows: list[Row]) -> None:
    """Print rows as aligned columns; those that a row lacks are "-"."""
    flat = [{**row, **row.get("accuracy", {})} for row in rows]
    columns = [name for name in {name: None for row in flat for name in row} if name != "accuracy"]
    cells = [columns, *([_cell(row.get(name)) for name in columns] for row in flat)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _first_line(command: list[str]) -> str | None:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.splitlines()[0].strip() if answer else None
