"""Registry of the libraries besides this package whose models `optimize()` and `export()` take.

It is where an integration plugs in: inference looks up the library of a model it was given, and the
package registers its integrations by name, so that neither imports a library nobody uses.
"""

import importlib
from types import ModuleType

_MODULES: dict[str, str] = {}


def register_family(library: str, module: str) -> None:
    """Name the module that recognises models of a library.

    Args:
        library: Top-level package of the models' classes.
        module: Module with a function `recognise(model)`, like `cdetr_fast.inference.optimized`.
    """
    _MODULES[library] = module


def family_of(model: object) -> ModuleType | None:
    """Import and return the module registered for a model's library, None if there is none."""
    module = _MODULES.get(type(model).__module__.partition(".")[0])
    return None if module is None else importlib.import_module(module)
