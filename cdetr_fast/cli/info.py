"""`cdetr-fast info`: versions, devices, and the path of each operator."""

from __future__ import annotations

import os
import platform
from importlib import metadata


def info() -> None:
    """Show versions, devices, threads, and which path each operator takes and why."""
    import torch
    from rich.console import Console
    from rich.table import Table

    import cdetr_fast
    from cdetr_fast.loss.assignment import solver_choice
    from cdetr_kernels import evidence, native, registry

    table = Table("what", "value", box=None, show_header=False, pad_edge=False)
    table.add_row("cdetr_fast", cdetr_fast.__version__)
    table.add_row("python", f"{platform.python_version()}, {platform.platform()}")
    for name in ("torch", "torchvision", "triton", "timm", "transformers"):
        try:
            table.add_row(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            table.add_row(name, "not installed")
    table.add_row(
        "cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads per operation"
    )
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            table.add_row(
                f"cuda:{i}",
                f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
                f"compute capability {properties.major}.{properties.minor}",
            )
    else:
        table.add_row("cuda", f"no device (torch is built for CUDA {torch.version.cuda})")
    for part, state in native.parts().items():
        table.add_row(part, state)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    table.add_row("records", str(evidence.user_folder()))
    table.add_row("assignment", solver_choice(device))
    operators = Table("operator", "path", "reason", box=None, pad_edge=False)
    choices = registry.report(device)
    if any(entry.figure for entry in choices):
        for column in ("calls", "figure", "date"):
            operators.add_column(column)
    for entry in choices:
        cells = (entry.op, entry.path, entry.reason, entry.calls, entry.figure, entry.date)
        operators.add_row(*cells[: len(operators.columns)])
    console = Console(highlight=False, markup=False)
    console.print(table)
    console.print()
    console.print(operators)
