"""Preparation of the commands that train or evaluate."""

from cdetr_fast.cli.errors import require_packages


def prepare_training() -> None:
    """Require the packages of the train extra."""
    require_packages("accelerate", "faster_coco_eval", "yaml", extra="train")
