"""Checkpoints of this package, of transformers and of the paper's authors, loaded and saved.

`load` and `save` are the entries; `files` finds and reads weights, `key_maps` renames them, and
`authors` makes the configuration that the authors' files lack. Names load on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cdetr_fast.checkpoints.load import load_pretrained
    from cdetr_fast.checkpoints.save import push_to_hub, save_pretrained

__all__ = ["load_pretrained", "push_to_hub", "save_pretrained"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "load" if name == "load_pretrained" else "save"
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
