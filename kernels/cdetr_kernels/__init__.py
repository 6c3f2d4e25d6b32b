"""Operators of Conditional DETR: attention, position codes, post-processing, matching and loss.

Every operator is a plain function of tensors and knows nothing of models. The definition of each
one is its PyTorch reference in `cdetr_kernels.reference`; `cdetr_kernels.dispatch` chooses the
path.
"""

from cdetr_kernels.attention_ops import (
    conditional_attention,
    conditional_attention_separable,
)
from cdetr_kernels.image_ops import detection_topk, normalize_and_pad
from cdetr_kernels.loss_ops import matching_cost, set_loss
from cdetr_kernels.ops import residual_layer_norm, sine_position_2d, sine_query

__all__ = [
    "conditional_attention",
    "conditional_attention_separable",
    "detection_topk",
    "matching_cost",
    "normalize_and_pad",
    "residual_layer_norm",
    "set_loss",
    "sine_position_2d",
    "sine_query",
]
