"""Optimized classes of transformers' models: their interface and outputs, run by this package.

The weights go into this package's model by name (both use the names of transformers 5) with
`compat="transformers"`, so the numbers are those of transformers, defects included.
"""

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from transformers.models.conditional_detr import modeling_conditional_detr as modeling

from cdetr_fast.config.model import ConditionalDetrConfig
from cdetr_fast.inference.optimized import OptimizedModel, forward_of, recogniser
from cdetr_fast.inference.plain import first_difference
from cdetr_fast.models import modeling as ours


class ConditionalDetrModel(OptimizedModel, modeling.ConditionalDetrModel):
    """transformers' `ConditionalDetrModel` for inference."""

    _output_class = modeling.ConditionalDetrModelOutput
    forward = forward_of(modeling.ConditionalDetrModel)


class ConditionalDetrForObjectDetection(OptimizedModel, modeling.ConditionalDetrForObjectDetection):
    """transformers' `ConditionalDetrForObjectDetection` for inference."""

    _output_class = modeling.ConditionalDetrObjectDetectionOutput
    forward = forward_of(modeling.ConditionalDetrForObjectDetection)


class ConditionalDetrForSegmentation(OptimizedModel, modeling.ConditionalDetrForSegmentation):
    """transformers' `ConditionalDetrForSegmentation` for inference."""

    _output_class = modeling.ConditionalDetrSegmentationOutput
    forward = forward_of(modeling.ConditionalDetrForSegmentation)


def convert(model: nn.Module) -> nn.Module:
    """Return this package's model with the weights of a model of transformers, shared with it.

    Raises:
        ValueError: This package does not have the model's backbone, or a module of the model is not
            what its configuration builds; the message is the reason.
    """
    theirs = copy.deepcopy(cast(Any, model).config)
    if (difference := first_difference(model, type(model), theirs, settings=True)) is not None:
        raise ValueError(
            f"{difference}; make it what the configuration says, or use the model as it is"
        )
    settings = cast(Any, model).config.to_dict()
    config: Any = ConditionalDetrConfig.from_dict(settings | {"compat": "transformers"})
    config.backbone_config.use_pretrained_backbone = False
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn and not used
        converted: nn.Module = getattr(ours, type(model).__name__)(config)
    weights = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if not name.endswith(".num_batches_tracked")
    }
    try:
        converted.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(f"not all weights are those of its configuration, {error}") from error
    return converted.eval()


def is_recorder(hook: Callable[..., Any]) -> bool:
    """Return whether transformers records states and attentions by a forward hook."""
    return str(getattr(hook, "__module__", "")).startswith("transformers.utils.output_capturing")


recognise = recogniser(
    (ConditionalDetrModel, ConditionalDetrForObjectDetection, ConditionalDetrForSegmentation),
    convert,
    is_recorder,
)
