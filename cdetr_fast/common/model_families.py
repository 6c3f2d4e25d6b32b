"""Registry of the libraries besides this package whose models and backbones it takes.

It is where an integration plugs in: `optimize()` and `export()` look up the library of a model they
were given, models look up what builds backbones that are neither timm's nor their own, and the
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


def register_service(name: str, module: str) -> None:
    """Name the module that does what needs another library.

    Args:
        name: "backbones" (those that are neither timm's nor this package's own) or "adapters".
        module: Module with the functions of `cdetr_fast.integrations`' module for it.
    """
    _MODULES[f"service {name}"] = module


def service(name: str) -> ModuleType:
    """Import and return the module registered under a name."""
    return importlib.import_module(_MODULES[f"service {name}"])
