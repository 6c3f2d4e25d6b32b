"""Inheritance from classes of other libraries, as soon as the process has imported them.

Clients of a library ask for its classes: transformers' Trainer and pipelines keep apart what is a
`PreTrainedModel` or a `ModelOutput` and what is not. The core imports no such library, so an
integration names the classes, and constructors, outputs and `state_dict` call `inherit_from_hosts`.
"""

import importlib
import sys

_MODULES: dict[str, str] = {}


def register_host(library: str, module: str) -> None:
    """Name the module that makes classes inherit from those of a library.

    Args:
        library: Top-level package.
        module: Module with a function `inherit()`, like `cdetr_fast.integrations.inheritance`,
            which returns whether all is done.
    """
    _MODULES[library] = module


def inherit_from_hosts() -> None:
    """Let this package's classes inherit from those of registered libraries that are imported."""
    # Written for speed, as it runs in every call of a model.
    for library, name in tuple(_MODULES.items()):
        if library in sys.modules:
            module = sys.modules.get(name) or importlib.import_module(name)
            if module.inherit():
                _MODULES.pop(library, None)


def add_base(cls: type, host: type) -> None:
    """Make a class a subclass of `host`, from which it takes only what it does not have itself.

    Objects that exist, and subclasses, follow at once.

    Args:
        cls: A class one of whose bases is written in Python.
        host: The new base, last in line but for bases that it has itself.
    """
    if not issubclass(cls, host):
        kept = (base for base in cls.__bases__ if not issubclass(host, base))
        cls.__bases__ = (*kept, host)
