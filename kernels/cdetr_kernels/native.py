"""Loading of the extension, the C++ and CUDA kernels that are built from csrc/.

Importing this module loads what has been built; `UNAVAILABLE` says what is missing and why.
Schemas, fakes and gradients of the operators are in the module `native` of each one's folder.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from cdetr_kernels.gpu.support import unsupported_capability

FOLDER = Path(__file__).parent


def _load(part: str, name: str) -> str | None:
    """Load one part of the extension; return why that fails, None if it does not."""
    file = FOLDER / f"_native_{part}.so"
    if not file.is_file():
        return f"the {name} part of the extension is not built: run `cdetr-fast build-native`"
    try:
        torch.ops.load_library(file)
    except OSError as error:
        return f"{file.name} does not load ({error}): run `cdetr-fast build-native`"
    return None


UNAVAILABLE = {"cpu": _load("cpu", "C++"), "cuda": _load("cuda", "CUDA")}
"""Why a part of the extension cannot be used, None if it can, by device type."""


def unsupported_device(tensor: Tensor) -> str | None:
    """Return why the extension cannot run where a tensor is, None if it can."""
    device_type = tensor.device.type
    if device_type in UNAVAILABLE:
        reason = UNAVAILABLE[device_type]
        if reason is None and tensor.is_cuda:
            reason = unsupported_capability(tensor.get_device())
        return reason
    return f"the extension is for CPUs and CUDA, and the tensors are on {device_type}"


def missing_kernel(name: str) -> str | None:
    """Return that an older library has no CPU kernel of an operator; None if it has one."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"):
        return None
    return f"the extension was built before it had {name}: run `cdetr-fast build-native`"


def parts() -> dict[str, str]:
    """Return the state of each part of the extension: loaded, or why it is not."""
    states = {
        "native C++": UNAVAILABLE["cpu"] or "loaded",
        "native CUDA": UNAVAILABLE["cuda"] or "loaded",
    }
    report = FOLDER / "_native_cuda.txt"
    if UNAVAILABLE["cuda"] is None and report.is_file():
        compiled = set(re.findall(r"for '(sm_\w+)'", report.read_text(encoding="utf-8")))
        names = sorted(compiled, key=lambda name: (len(name), name))
        states["native CUDA"] += " for " + ", ".join(names)
    return states
