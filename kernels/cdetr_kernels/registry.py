"""Registry of the operators, one line each.

An operator is a folder of `cdetr_kernels.ops` of the same name: the package holds the public
function and `OPERATOR`, its table of implementations; its module `cases` holds the inputs that
tests, benchmarks and the audit run it on.
"""

import importlib
from types import ModuleType

import torch

from cdetr_kernels.dispatch import Choice, Operator

NAMES = (
    "conditional_attention",
    "conditional_attention_separable",
    "sine_position_2d",
    "sine_query",
    "residual_layer_norm",
    "detection_topk",
    "normalize_and_pad",
    "matching_cost",
    "set_loss",
)


def operator(name: str) -> Operator:
    """Return an operator by its name."""
    found: Operator = importlib.import_module(f"{__package__}.ops.{name}").OPERATOR
    return found


def cases(name: str) -> ModuleType:
    """Import the cases of an operator; they may need triton."""
    return importlib.import_module(f"{__package__}.ops.{name}.cases")


def report(device: torch.device | str = "cpu") -> list[Choice]:
    """Return the implementations that "auto" takes on a device, and why, for every operator."""
    return [choice for name in NAMES for choice in operator(name).choices(device)]
