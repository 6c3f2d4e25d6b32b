"""The classes that inherit from transformers' classes of the same role, where it is imported.

What a class has itself takes precedence; transformers' base adds only that `isinstance` and
`issubclass` say yes, and the methods that this package does not have. Constructors of transformers'
classes are never run.
"""

import importlib
import sys

from cdetr_fast.common.host_classes import add_base

# Module and class of transformers, module and class of this package.
_HEIRS = [
    ("transformers.utils.generic:ModelOutput", "cdetr_fast.models.outputs:ModelOutput"),
    (
        "transformers.modeling_utils:PreTrainedModel",
        "cdetr_fast.models.pretrained:ConditionalDetrPreTrainedModel",
    ),
    (
        "transformers.configuration_utils:PreTrainedConfig",
        "cdetr_fast.config.model:ConditionalDetrConfig",
    ),
    (
        "transformers.image_processing_utils:BaseImageProcessor",
        "cdetr_fast.images.processor:ConditionalDetrImageProcessor",
    ),
]
_pending = list(_HEIRS)


def inherit() -> None:
    """Add transformers' bases to the classes of this package, as far as both are imported."""
    for pair in list(_pending):
        host, heir = (_imported(path) for path in pair)
        if host is not None and heir is not None:
            add_base(heir, host)
            _pending.remove(pair)


def inherit_all() -> None:
    """Import whatever is needed, and add all bases."""
    for pair in _HEIRS:
        for path in pair:
            importlib.import_module(path.partition(":")[0])
    inherit()


def _imported(path: str) -> type | None:
    """Return a class if its module is imported, and at least as far as the class, else None."""
    module, _, name = path.partition(":")
    return getattr(sys.modules.get(module), name, None)
