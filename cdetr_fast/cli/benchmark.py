"""`cdetr-fast benchmark`: the whole model against transformers, from a checkout."""

import os
import subprocess
import sys
from pathlib import Path

import typer

from cdetr_fast.cli.errors import UserError


def benchmark(context: typer.Context) -> None:
    """Time the model against transformers, in a checkout."""
    from cdetr_fast.common import progress

    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "run.py").is_file():
        raise UserError(
            "benchmark needs the folder benchmarks/, which is not installed: run it in a checkout"
        )
    command = [sys.executable, "-m", "benchmarks", "model", *context.args]
    if not progress.current().shows_lines:
        command.append("--quiet")
    paths = [str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    raise typer.Exit(subprocess.run(command, cwd=root, env=environment, check=False).returncode)
