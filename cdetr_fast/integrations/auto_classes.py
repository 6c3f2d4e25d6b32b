"""`register_auto_classes()` and `unregister_auto_classes()`: our classes by way of `Auto*`."""

import copy
from typing import Any, NamedTuple

from cdetr_fast.config.model import ConditionalDetrConfig
from cdetr_fast.images.processor import ConditionalDetrImageProcessor
from cdetr_fast.integrations.inheritance import inherit_all
from cdetr_fast.models import modeling

_MODELS = {
    "AutoModel": modeling.ConditionalDetrModel,
    "AutoModelForImageSegmentation": modeling.ConditionalDetrForSegmentation,
    "AutoModelForObjectDetection": modeling.ConditionalDetrForObjectDetection,
}


class _Entry(NamedTuple):
    """An entry of a registry of transformers, and what was there before; None if nothing was."""

    entries: dict[Any, Any]
    key: Any
    before: Any


_changed: list[_Entry] = []


def register_auto_classes() -> None:
    """Make transformers' `Auto*` classes, and so its pipelines, load this package's classes.

    For checkpoints of model type "conditional_detr": `AutoConfig`, `AutoImageProcessor`,
    `AutoModel`, `AutoModelForObjectDetection`, and `AutoModelForImageSegmentation`, where
    transformers has no class for them. Models that exist are not touched, and a second call changes
    nothing.

    Raises:
        ImportError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "register_auto_classes: expected transformers to be installed, got none. "
            'Install it with pip install "cdetr-fast[transformers]"'
        ) from error
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

    if _changed:
        return
    inherit_all()
    mappings = {name: getattr(transformers, name)._model_mapping for name in _MODELS}
    keys = [
        (CONFIG_MAPPING, ConditionalDetrConfig.model_type),
        (IMAGE_PROCESSOR_MAPPING, ConditionalDetrConfig),
        *((mapping, ConditionalDetrConfig) for mapping in mappings.values()),
    ]
    for mapping, key in keys:
        entries = mapping._extra_content
        # A copy: transformers updates the entry of an image processor in place.
        _changed.append(_Entry(entries, key, copy.copy(entries.get(key))))
    model_type = ConditionalDetrConfig.model_type
    transformers.AutoConfig.register(model_type, ConditionalDetrConfig, exist_ok=True)
    transformers.AutoImageProcessor.register(
        ConditionalDetrConfig,
        slow_image_processor_class=ConditionalDetrImageProcessor,
        fast_image_processor_class=ConditionalDetrImageProcessor,
        exist_ok=True,
    )
    for name, model in _MODELS.items():
        mappings[name].register(ConditionalDetrConfig, model, exist_ok=True)


def unregister_auto_classes() -> None:
    """Undo `register_auto_classes`, if it was called: `Auto*` classes load what they did before."""
    while _changed:
        entries, key, before = _changed.pop()
        if before is None:
            entries.pop(key, None)
        else:
            entries[key] = before
