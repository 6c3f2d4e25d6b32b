"""Training and evaluation: from COCO-format data to a checkpoint, on one CPU or many hosts.

Data flows `coco -> label_checks -> sampling -> dataset (transforms) -> step -> engine`, results
`evaluation -> pictures`; `run_state` keeps what a run needs to go on after any interruption.
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
