"""Training and evaluation: from COCO-format data to a checkpoint, on one CPU or many hosts.

`config` has the settings, `setup` builds the parts of a run, and `engine` loops over `step`. Data
comes from `data`, figures and pictures from `evaluation`; `run` is what surrounds the loop:
processes, signals, log, and the state that a run resumes from.
"""

import importlib
from typing import Any

_MODULES = {
    "DataError": "errors",
    "TrainingConfig": "config",
    "TrainingStopped": "errors",
    "evaluate": "evaluation.checkpoint",
    "train": "engine",
}
__all__ = ["DataError", "TrainingConfig", "TrainingStopped", "evaluate", "train"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
