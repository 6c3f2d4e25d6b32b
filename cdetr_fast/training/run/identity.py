"""Identity of a run: what has to stay the same for a checkpoint to be resumed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from cdetr_fast.training.config import TrainingConfig, read_yaml
from cdetr_fast.training.data.index import CocoIndex
from cdetr_fast.training.data.sampling import TrainingSampler
from cdetr_fast.training.data.shard_stream import ShardStream
from cdetr_fast.training.data.shards import ShardSet
from cdetr_fast.training.errors import DataError

_REMEDIES = {
    "images per step": "keep the product of batch_size, accumulate and processes",
    "processes": "shards are dealt out to them: start as many as before",
    "loading workers": "shards are dealt out to them: keep num_workers",
    "seed": "keep it",
    "task": "keep it",
    "frozen backbone": "keep backbone_learning_rate at 0, or above it",
}
_SAME_DATA = "resume with the same training set, or choose another output"


def run_identity(
    config: TrainingConfig, index: CocoIndex | ShardSet, sampler: TrainingSampler | ShardStream
) -> dict[str, Any]:
    """Return what has to stay the same for a resumed run."""
    return {
        "images per step": sampler.images_per_step,
        **{name.replace("_", " "): value for name, value in sampler.fixed.items()},
        "seed": config.seed,
        "images": len(index),
        "classes": list(index.classes),
        "digest of the training set": _digest(index),
        "task": config.task,
        "frozen backbone": config.backbone_learning_rate == 0,
    }


def _digest(index: CocoIndex | ShardSet) -> str:
    if isinstance(index, ShardSet):
        parts = [repr(list(zip(index.names, index.images, strict=True)))]
    else:
        arrays = ("image_ids", "offsets", "boxes_xywh", "labels", "crowd")
        parts = [repr(index.file_names), *(getattr(index, name) for name in arrays)]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part.tobytes())
    return digest.hexdigest()[:16]


def require_same_run(path: Path, stored: dict[str, Any], own: dict[str, Any]) -> None:
    """Compare the identity in a checkpoint with that of this start.

    Raises:
        DataError: They differ; the message names the difference and what to do.
    """
    for name in stored | own:
        before, now = stored.get(name), own.get(name)
        if before != now:
            raise DataError(
                f"{path}: {name}: {before} before, {now} now; {_REMEDIES.get(name, _SAME_DATA)}"
            )


def changed_settings(path: Path, config: TrainingConfig) -> list[str]:
    """Return a line for each setting that differs from those of the last start.

    Args:
        path: config.yaml of the run; without the file there are no lines.
        config: Settings of this start.
    """
    if not path.is_file():
        return []
    before, now = read_yaml(path), config.to_dict()
    return [
        f"{name}: {now[name]} from now on, {before[name]} before"
        for name in now
        if name in before and name != "resume" and before[name] != now[name]
    ]


def require_one_folder(folder: Path, newest: list[list[str]]) -> None:
    """Compare the checkpoints that the processes see.

    Args:
        folder: Folder of the run.
        newest: For each process the name of its newest checkpoint, or an empty list.

    Raises:
        DataError: They see different ones, and would continue from different steps.
    """
    for rank, name in enumerate(newest):
        if name != newest[0]:
            first, other = (", ".join(n) or "none" for n in (newest[0], name))
            raise DataError(
                f"output: the newest checkpoint in {folder} is {first} for process 0 and {other} "
                f"for process {rank}; output has to be on a file system that all hosts share"
            )
