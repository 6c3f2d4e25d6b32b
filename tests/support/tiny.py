"""A small model that has all parts, for tests of the code around the model."""

from typing import Any, TypeVar

import torch
from torch import nn

from cdetr_fast import ConditionalDetrConfig

ModelT = TypeVar("ModelT", bound=nn.Module)

NAMES = {0: "cat", 1: "dog", 2: "remote"}


def tiny_config(**changes: Any) -> ConditionalDetrConfig:
    """Return a configuration, and seed the weights of the model that is built next."""
    torch.manual_seed(0)
    return ConditionalDetrConfig(
        backbone="resnet18",
        use_timm_backbone=True,
        use_pretrained_backbone=False,
        d_model=32,
        encoder_layers=1,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        id2label=NAMES,
        **({"num_queries": 7, "decoder_layers": 1} | changes),
    )


def randomized(model: ModelT) -> ModelT:
    """Set weights with which scores spread, classes differ between queries, masks have holes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and "backbone" not in name and parameter.dim() > 1:
                scale = (2.0 / parameter[0].numel()) ** 0.5
                scale = 1.0 if "query_position" in name or "classifier" in name else scale
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            if name.endswith("class_labels_classifier.bias"):
                parameter.zero_()
    return model.eval()
