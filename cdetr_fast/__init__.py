"""Fast Conditional DETR behind the API of transformers' `ConditionalDetr*` classes.

Public names load on first use, so that importing the package is cheap and touches no device.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from cdetr_fast._moved import keep_old_names
from cdetr_fast.common.host_classes import inherit_from_hosts, register_host
from cdetr_fast.common.model_families import register_family, register_service

__version__ = "0.1.0"

_MODULES = {
    "ConditionalDetrConfig": "config.model",
    "ConditionalDetrFeatureExtractor": "images",
    "ConditionalDetrForObjectDetection": "models.modeling",
    "ConditionalDetrForSegmentation": "models.modeling",
    "ConditionalDetrImageProcessor": "images",
    "ConditionalDetrImageProcessorFast": "images",
    "ConditionalDetrImageProcessorPil": "images",
    "ConditionalDetrModel": "models.modeling",
    "ConditionalDetrPreTrainedModel": "models.pretrained",
    "draw_attention": "models.attention_maps",
    "optimize": "inference",
    "patch_transformers": "integrations.patching",
    "register_auto_classes": "integrations.auto_classes",
    "unpatch_transformers": "integrations.patching",
    "unregister_auto_classes": "integrations.auto_classes",
}

__all__ = [
    "ConditionalDetrConfig",
    "ConditionalDetrFeatureExtractor",
    "ConditionalDetrForObjectDetection",
    "ConditionalDetrForSegmentation",
    "ConditionalDetrImageProcessor",
    "ConditionalDetrImageProcessorFast",
    "ConditionalDetrImageProcessorPil",
    "ConditionalDetrModel",
    "ConditionalDetrPreTrainedModel",
    "__version__",
    "draw_attention",
    "optimize",
    "patch_transformers",
    "register_auto_classes",
    "unpatch_transformers",
    "unregister_auto_classes",
]

if TYPE_CHECKING:
    from cdetr_fast.config.model import ConditionalDetrConfig
    from cdetr_fast.images import (
        ConditionalDetrFeatureExtractor,
        ConditionalDetrImageProcessor,
        ConditionalDetrImageProcessorFast,
        ConditionalDetrImageProcessorPil,
    )
    from cdetr_fast.inference import optimize
    from cdetr_fast.integrations.auto_classes import (
        register_auto_classes,
        unregister_auto_classes,
    )
    from cdetr_fast.integrations.patching import patch_transformers, unpatch_transformers
    from cdetr_fast.models.attention_maps import draw_attention
    from cdetr_fast.models.modeling import (
        ConditionalDetrForObjectDetection,
        ConditionalDetrForSegmentation,
        ConditionalDetrModel,
    )
    from cdetr_fast.models.pretrained import ConditionalDetrPreTrainedModel


class _LoadedOnUse(ModuleType):
    """A module that runs its code with the first use of a name that it does not have yet.

    Unlike importlib's LazyLoader it does not run when its `__file__` is read: torch reads that of
    every module while it is being imported itself.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        # While it runs, its own imports find what is there by then.
        object.__setattr__(self, "__class__", ModuleType)
        try:
            assert self.__spec__ is not None
            assert self.__spec__.loader is not None
            self.__spec__.loader.exec_module(self)
        except BaseException:
            object.__setattr__(
                self, "__class__", _LoadedOnUse
            )  # the next use shows the error again
            raise
        return getattr(self, name)

    def __dir__(self) -> list[str]:
        return dir(self) if hasattr(self, "__all__") else []


def _find_kernels_in_checkout() -> None:
    """Make `cdetr_kernels` importable from a bare checkout without changing sys.path."""
    source = Path(__file__).parent.parent / "kernels" / "cdetr_kernels" / "__init__.py"
    if importlib.util.find_spec("cdetr_kernels") is not None or not source.exists():
        return
    spec = importlib.util.spec_from_file_location(
        "cdetr_kernels", source, submodule_search_locations=[str(source.parent)]
    )
    if spec is None:
        return
    module = importlib.util.module_from_spec(spec)
    module.__class__ = _LoadedOnUse
    sys.modules["cdetr_kernels"] = module


_find_kernels_in_checkout()
keep_old_names(__name__)
register_family("transformers", "cdetr_fast.integrations.transformers")
register_host("transformers", "cdetr_fast.integrations.inheritance")
register_service("adapters", "cdetr_fast.integrations.peft")
register_service("backbones", "cdetr_fast.integrations.backbones")


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    inherit_from_hosts()
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
