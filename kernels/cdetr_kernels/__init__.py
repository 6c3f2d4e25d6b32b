"""Operators of Conditional DETR: attention, position codes, post-processing, matching and loss.

Every operator is a plain function of tensors and knows nothing of models. Each is a folder of
`cdetr_kernels.ops`, with its definition in plain PyTorch and its kernels; `cdetr_kernels.dispatch`
chooses which of them runs, and `cdetr_kernels.registry` lists all operators. `qualify` finds out
which kernels are right and faster on this machine.
"""

from typing import TYPE_CHECKING, Any

from cdetr_kernels.ops.conditional_attention import conditional_attention
from cdetr_kernels.ops.conditional_attention_separable import conditional_attention_separable
from cdetr_kernels.ops.detection_topk import detection_topk
from cdetr_kernels.ops.matching_cost import matching_cost
from cdetr_kernels.ops.normalize_and_pad import normalize_and_pad
from cdetr_kernels.ops.residual_layer_norm import residual_layer_norm
from cdetr_kernels.ops.set_loss import set_loss
from cdetr_kernels.ops.sine_position_2d import sine_position_2d
from cdetr_kernels.ops.sine_query import sine_query

if TYPE_CHECKING:
    from cdetr_kernels.qualification import qualify

__all__ = [
    "conditional_attention",
    "conditional_attention_separable",
    "detection_topk",
    "matching_cost",
    "normalize_and_pad",
    "qualify",
    "residual_layer_norm",
    "set_loss",
    "sine_position_2d",
    "sine_query",
]


def __getattr__(name: str) -> Any:
    """Import `qualify` with its first use: it brings cases and timers, which models do not need."""
    if name != "qualify":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cdetr_kernels.qualification import qualify

    return qualify


def __dir__() -> list[str]:
    return __all__
