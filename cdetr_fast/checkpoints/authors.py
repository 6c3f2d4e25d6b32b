"""Configuration of the .pth files of the paper's authors, which have none."""

import warnings
from pathlib import Path
from typing import Any

from cdetr_fast.checkpoints.files import read_arguments
from cdetr_fast.config.model import ConditionalDetrConfig

# Fields that weights do not determine, and their names in the authors' command line.
_ARGUMENTS = {
    "dilation": "dilation",
    "encoder_attention_heads": "nheads",
    "decoder_attention_heads": "nheads",
    "dropout": "dropout",
}


def config_of_authors(
    file: Path,
    config_class: type[ConditionalDetrConfig],
    known: dict[str, Any],
    given: dict[str, Any],
) -> ConditionalDetrConfig:
    """Return the configuration of one of the authors' files.

    Args:
        file: The file; the command line of the training is used if it is inside.
        config_class: Class of the result.
        known: Fields that the weights determine; see `fields_of`.
        given: Fields that the caller gives; they take precedence.

    Raises:
        ValueError, TypeError: The fields do not make a configuration.
    """
    arguments = read_arguments(file)
    fields = {field: arguments[name] for field, name in _ARGUMENTS.items() if name in arguments}
    if "dilation" not in fields | given:
        warnings.warn(
            f"{file}: does not say whether the backbone is dilated; loaded as not dilated. For a "
            "DC5 checkpoint pass dilation=True; where only a folder or file can be given, make a "
            f"folder with from_pretrained({file.name!r}, dilation=True).save_pretrained(folder)",
            stacklevel=4,
        )
    fields |= known | given
    if "id2label" in given and "num_labels" not in given:
        fields.pop("num_labels", None)
    if {"backbone_config", "use_timm_backbone"} & given.keys() and "backbone" not in given:
        fields.pop("backbone", None)
    return config_class(**fields)
