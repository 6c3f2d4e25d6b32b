"""Facts about this machine and installation: what runs fast here, and what would add to it."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from cdetr_fast.common.machine import installed_version

SCHEMA = 1
"""Version of `facts`; a key that is removed or changes its meaning raises it."""

PACKAGES = ("torch", "torchvision", "triton", "timm", "transformers", "onnxruntime", "openvino")
_FOR_DEVELOPERS = ("test", "docs", "dev")  # extras


def facts() -> dict[str, Any]:
    """Return all that `cdetr-fast info` shows, as JSON has it; see docs/guides/commands.md."""
    import torch

    import cdetr_fast
    from cdetr_fast.inference.convolution import has_onednn
    from cdetr_fast.loss.assignment import solver_choice
    from cdetr_kernels import native, registry

    has_gpu = torch.cuda.is_available()
    device = "cuda" if has_gpu else "cpu"
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return {
        "schema": SCHEMA,
        "version": cdetr_fast.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed_version(name) for name in PACKAGES},
        "device": device,
        "cpu": {
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "fused_convolutions": [str(x).removeprefix("torch.") for x in dtypes if has_onednn(x)],
        },
        "cuda": torch.version.cuda,
        "gpus": _gpus() if has_gpu else [],
        "native": {
            part: {"available": reason is None, "state": native.parts()[f"native {name}"]}
            for (part, reason), name in zip(
                native.UNAVAILABLE.items(), ("C++", "CUDA"), strict=True
            )
        },
        "records": _records(),
        "engines": _engines(),
        "assignment": solver_choice(device),
        "operators": [
            {
                "operator": choice.op,
                "path": choice.path,
                "reasons": list(choice.reasons),
                "calls": choice.calls or None,
                "figure": choice.figure or None,
                "date": choice.date or None,
            }
            for choice in registry.report(device)
        ],
        "missing": list(_missing()),
    }


def _gpus() -> list[dict[str, Any]]:
    import torch

    every = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [
        {
            "name": one.name,
            "memory_bytes": one.total_memory,
            "compute_capability": f"{one.major}.{one.minor}",
        }
        for one in every
    ]


def _records() -> str:
    from cdetr_kernels import evidence

    try:
        return str(evidence.user_folder())
    except OSError as error:
        return str(error)


def _engines() -> dict[str, Any]:
    from cdetr_fast.inference import engine_records

    findings, source = engine_records.read(engine_records.machine())
    return {
        "source": source,
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "chosen": [
            {"model": model, "precision": precision, **choice._asdict()}
            for (model, precision), choice in engine_records.choices(findings).items()
        ],
    }


def _missing() -> Iterator[dict[str, str]]:
    """Yield what is not there, and the command that adds it."""
    import torch

    from cdetr_fast.loss.assignment import device_solver
    from cdetr_kernels import native
    from cdetr_kernels.qualification.automatic import missing_operators

    gpu = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    for part, name in (("cpu", "C++"), ("cuda", "CUDA")):
        if native.UNAVAILABLE[part] is not None and (part == "cpu" or gpu is not None):
            yield _lack(f"{name} kernels", "not built", "cdetr-fast build-native")
    if gpu is not None and (names := missing_operators(gpu)):
        why = f"{len(names)} operators not tried on this GPU"
        yield _lack("triton kernels", why, "cdetr-fast qualify")
    if gpu is not None and device_solver(gpu) is None and not torch.version.hip:
        why = "training assigns on the host"
        yield _lack("torch-linear-assignment", why, "pip install 'cdetr-fast[gpu]'")
    set_to, cores = os.environ.get("OMP_NUM_THREADS"), os.cpu_count() or 1
    if gpu is None and set_to and torch.get_num_threads() < cores:
        why = f"OMP_NUM_THREADS={set_to} leaves torch {torch.get_num_threads()} of {cores} cores"
        yield _lack("threads", why, "unset OMP_NUM_THREADS")
    for extra, packages in _extras().items():
        absent = [name for name in packages if installed_version(name) is None]
        if absent and extra not in (*_FOR_DEVELOPERS, "gpu"):
            why = f"needs {', '.join(absent)}"
            yield _lack(extra, why, f"pip install 'cdetr-fast[{extra}]'")


def _lack(what: str, why: str, command: str) -> dict[str, str]:
    return {"what": what, "why": why, "command": command}


def _extras() -> dict[str, list[str]]:
    """Return the packages of each extra of the installed distribution; none of a bare checkout."""
    found: dict[str, list[str]] = {}
    try:
        required = metadata.requires("cdetr-fast") or []
    except metadata.PackageNotFoundError:
        return found
    for requirement in required:
        match = re.match(r"([\w.-]+).*\bextra == ['\"](\w+)['\"]", requirement)
        if match is not None:
            found.setdefault(match[2], []).append(match[1])
    return found
