"""Preparation of the commands that train or evaluate."""

import logging
import sys

from cdetr_fast.cli.errors import require_packages


def prepare_training() -> None:
    """Require the packages of the train extra, and print logs as plain lines."""
    require_packages("accelerate", "faster_coco_eval", "yaml", extra="train")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for chatty in ("accelerate", "faster_coco_eval", "timm"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
