"""Initial weights: those of the paper, or transformers' under `compat="transformers"`.

Source: the authors' models/transformer.py (_reset_parameters), models/conditional_detr.py and
models/segmentation.py; transformers' `PreTrainedModel._init_weights`.
"""

import math

import torch
from torch import nn

from cdetr_fast.config.model import ConditionalDetrConfig
from cdetr_fast.models.attention import ConditionalDetrSelfAttention
from cdetr_fast.models.position import ConditionalDetrLearnedPositionEmbedding


@torch.no_grad()
def initialize_model(model: nn.Module, config: ConditionalDetrConfig) -> None:
    """Initialises encoder, decoder, query embedding, input projection and position embedding.

    The paper draws matrices of the transformer from Xavier's uniform distribution and the query
    embedding from N(0, 1), which spreads the reference points over the image (standard deviation
    0.18); transformers draws all from N(0, 0.02), which gathers them in its centre (0.0003).
    """
    if config.compat == "paper":
        for part in (model.encoder, model.decoder):
            for parameter in part.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
        for layer in model.encoder.layers:
            _initialize_like_multihead_attention(layer.self_attn)
        for layer in model.decoder.layers:
            nn.init.zeros_(layer.self_attn.o_proj.bias)
            nn.init.zeros_(layer.encoder_attn.o_proj.bias)
    else:
        for part in (model.encoder, model.decoder, model.input_projection):
            _initialize_normal(part, config.init_std)
        nn.init.normal_(model.query_position_embeddings.weight, std=config.init_std)
    if isinstance(model.position_embedding, ConditionalDetrLearnedPositionEmbedding):
        nn.init.uniform_(model.position_embedding.row_embeddings.weight)
        nn.init.uniform_(model.position_embedding.column_embeddings.weight)


@torch.no_grad()
def initialize_detection_heads(heads: nn.Module, config: ConditionalDetrConfig) -> None:
    """Initialises the class and box heads.

    The paper starts every class at probability 0.01 (focal prior), and every box at its reference
    point with half the image's size; with transformers' zero bias the first class loss at 91
    classes is about a thousand times larger.
    """
    if config.compat == "paper":
        prior = 0.01
        nn.init.constant_(heads.class_labels_classifier.bias, -math.log((1 - prior) / prior))
        nn.init.zeros_(heads.bbox_predictor.layers[-1].weight)
        nn.init.zeros_(heads.bbox_predictor.layers[-1].bias)
    else:
        _initialize_normal(heads.class_labels_classifier, config.init_std)
        _initialize_normal(heads.bbox_predictor, config.init_std)


@torch.no_grad()
def initialize_mask_head(heads: nn.Module, config: ConditionalDetrConfig) -> None:
    """Initialises the mask head and its attention; the same in both compat modes."""
    for module in heads.mask_head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, a=1)
            nn.init.zeros_(module.bias)
    for projection in (heads.bbox_attention.q_proj, heads.bbox_attention.k_proj):
        nn.init.xavier_uniform_(projection.weight, gain=config.init_xavier_std)
        nn.init.zeros_(projection.bias)


def _initialize_like_multihead_attention(attention: ConditionalDetrSelfAttention) -> None:
    """The authors' encoder has q, k, v in one [3C, C] matrix, whose Xavier bound is smaller."""
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        channels = projection.in_features
        bound = math.sqrt(6.0 / (channels + 3 * channels))
        nn.init.uniform_(projection.weight, -bound, bound)
        nn.init.zeros_(projection.bias)
    nn.init.zeros_(attention.o_proj.bias)


def _initialize_normal(module: nn.Module, std: float) -> None:
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(part.weight, std=std)
            nn.init.zeros_(part.bias)
