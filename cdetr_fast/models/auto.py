"""Which of the models a checkpoint is for."""

import os
from pathlib import Path
from typing import Any

from cdetr_fast.checkpoints.files import read_weights
from cdetr_fast.config.model import ConditionalDetrConfig
from cdetr_fast.models.modeling import (
    ConditionalDetrForObjectDetection,
    ConditionalDetrForSegmentation,
)


def class_of_checkpoint(
    name_or_path: str | os.PathLike[str], **download: Any
) -> type[ConditionalDetrForObjectDetection | ConditionalDetrForSegmentation]:
    """Return the class that a checkpoint is for: of segmentation, else of detection.

    Args:
        name_or_path: A folder or the id of a model on the hub, whose config.json says it; or one
            file of weights, whose names do.
        **download: As in `from_pretrained`.

    Raises:
        OSError: There is no such file, or it is broken.
    """
    if os.path.isfile(name_or_path):
        segments = any(key.startswith("mask_head.") for key in read_weights([Path(name_or_path)]))
    else:
        config = ConditionalDetrConfig.from_pretrained(name_or_path, **download)
        segments = ConditionalDetrForSegmentation.__name__ in (config.architectures or ())
    return ConditionalDetrForSegmentation if segments else ConditionalDetrForObjectDetection
