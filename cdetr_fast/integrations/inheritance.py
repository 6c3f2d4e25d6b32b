"""The classes that inherit from transformers' classes of the same role, where it is imported.

What a class has itself takes precedence; transformers' base adds only that `isinstance` and
`issubclass` say yes, and the methods that this package does not have. Constructors of transformers'
classes are never run.
"""

import importlib
import sys

from cdetr_fast.common.host_classes import add_base

# Module and class of transformers, module and class of this package.
_HEIRS = (
    ("transformers.utils.generic", "ModelOutput", "cdetr_fast.models.outputs", "ModelOutput"),
    (
        *("transformers.modeling_utils", "PreTrainedModel"),
        *("cdetr_fast.models.pretrained", "ConditionalDetrPreTrainedModel"),
    ),
    (
        *("transformers.configuration_utils", "PreTrainedConfig"),
        *("cdetr_fast.config.model", "ConditionalDetrConfig"),
    ),
    (
        *("transformers.image_processing_utils", "BaseImageProcessor"),
        *("cdetr_fast.images.processor", "ConditionalDetrImageProcessor"),
    ),
)
_pending = list(_HEIRS)


def inherit() -> bool:
    """Add transformers' bases to the classes of this package, as far as both are imported.

    Returns:
        Whether all of them have their bases.
    """
    for pair in tuple(_pending):
        host_module, host_name, heir_module, heir_name = pair
        # A module that is being imported may not have its class yet.
        host = getattr(sys.modules.get(host_module), host_name, None)
        heir = getattr(sys.modules.get(heir_module), heir_name, None)
        if host is not None and heir is not None:
            add_base(heir, host)
            if pair in _pending:  # unless another thread was first
                _pending.remove(pair)
    return not _pending


def inherit_all() -> None:
    """Import whatever is needed, and add all bases."""
    for host_module, _, heir_module, _ in _HEIRS:
        importlib.import_module(host_module)
        importlib.import_module(heir_module)
    inherit()
