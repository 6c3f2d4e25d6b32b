"""`cdetr-fast benchmark`: the whole model against transformers, from a checkout."""

import os
import subprocess
import sys
from pathlib import Path

import typer

from cdetr_fast.cli.errors import UserError


def benchmark(context: typer.Context) -> None:
    """Time the whole model against transformers on this machine (from a checkout)."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "run.py").is_file():
        raise UserError("benchmark needs a checkout of the project, with its folder benchmarks/")
    command = [sys.executable, "-m", "benchmarks", "model", *context.args]
    paths = [str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    raise typer.Exit(subprocess.run(command, cwd=root, env=environment, check=False).returncode)
