"""Old names of modules that moved: importable for one version, with a `DeprecationWarning`."""

import importlib
import sys
import warnings
from types import ModuleType
from typing import Any

MOVED = {
    "assets": "demo",
    "assignment": "loss.assignment",
    "authors_files": "checkpoints.authors",
    "backbone_configuration": "config.backbone",
    "configuration": "config.model",
    "departures": "config.compat",
    "files": "common.files",
    "image_processing": "images",
    "image_processing.annotations": "images.targets",
    "image_processing.batch_feature": "images.batch_feature",
    "image_processing.inputs": "images.load",
    "image_processing.post_processing": "images.detections",
    "image_processing.processor": "images.processor",
    "image_processing.segmentation": "images.segments",
    "image_processing.settings": "images.settings",
    "image_processing.sizes": "images.resize",
    "image_processing.transforms": "images.resize",
    "key_maps": "checkpoints.key_maps",
    "losses": "loss.criterion",
    "models.prediction": "models.predict",
    "models.segmentation": "models.mask_head",
    "results": "images.results",
    "scenes": "demo.scenes",
    "suggestions": "common.validation",
    "targets": "loss.targets",
    "training.checkpoint_evaluation": "training.evaluation.checkpoint",
    "training.coco": "training.data.coco",
    "training.conversion": "training.data.conversion",
    "training.dataset": "training.data.dataset",
    "training.label_checks": "training.data.label_checks",
    "training.launch": "training.run.launch",
    "training.model_card": "training.run.model_card",
    "training.optimization": "training.optim",
    "training.panoptic": "training.evaluation.panoptic",
    "training.pictures": "training.evaluation.pictures",
    "training.reporting": "training.evaluation.report",
    "training.run_identity": "training.run.identity",
    "training.run_log": "training.run.log",
    "training.run_state": "training.run.state",
    "training.sampling": "training.data.sampling",
    "training.shard_stream": "training.data.shard_stream",
    "training.shards": "training.data.shards",
    "training.signals": "training.run.signals",
    "training.transforms": "training.data.transforms",
    "validation": "common.validation",
    "visualization": "images.draw",
    "weight_files": "checkpoints.files",
}
"""New names by old ones, both relative to the package."""


class MovedModule(ModuleType):
    """Module under an old name that forwards to the module it became.

    Args:
        name: Old name, absolute.
        moved_to: New name, absolute.
    """

    def __init__(self, name: str, moved_to: str) -> None:
        super().__init__(name, f"Moved to `{moved_to}`.")
        self._moved_to = moved_to

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # inspect and pickle look at every module
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        warnings.warn(
            f"{self.__name__} has moved to {self._moved_to}", DeprecationWarning, stacklevel=2
        )
        return getattr(importlib.import_module(self._moved_to), name)


def keep_old_names(package: str) -> None:
    """Make the modules of a package importable by their old names, without an import hook."""
    for old, new in MOVED.items():
        name = f"{package}.{old}"
        sys.modules[name] = MovedModule(name, f"{package}.{new}")
