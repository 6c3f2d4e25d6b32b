"""Initial weights: those of the paper, or transformers' under `compat="transformers"`.

Source: the authors' models/transformer.py (_reset_parameters), models/conditional_detr.py and
models/segmentation.py; transformers' `PreTrainedModel._init_weights`.
"""

import math

import torch
from torch import nn

from cdetr_fast.config.model import ConditionalDetrConfig
from cdetr_fast.models.attention import ConditionalDetrSelfAttention
from cdetr_fast.models.decoder import ConditionalDetrDecoder, ConditionalDetrDecoderLayer
from cdetr_fast.models.encoder import ConditionalDetrEncoder, ConditionalDetrEncoderLayer
from cdetr_fast.models.heads import ConditionalDetrMLPPredictionHead
from cdetr_fast.models.known import all_known, known
from cdetr_fast.models.mask_head import (
    ConditionalDetrMaskHeadSmallConv,
    ConditionalDetrMHAttentionMap,
)
from cdetr_fast.models.position import ConditionalDetrLearnedPositionEmbedding


@torch.no_grad()
def initialize_model(
    config: ConditionalDetrConfig,
    encoder: ConditionalDetrEncoder,
    decoder: ConditionalDetrDecoder,
    input_projection: nn.Conv2d,
    query_position_embeddings: nn.Embedding,
    position_embedding: nn.Module,
) -> None:
    """Initialise encoder, decoder, query embedding, input projection and position embedding.

    The paper draws matrices of the transformer from Xavier's uniform distribution and the query
    embedding from N(0, 1), which spreads the reference points over the image (standard deviation
    0.18); transformers draws all from N(0, 0.02), which gathers them in its centre (0.0003).
    """
    if config.compat == "paper":
        for part in (encoder, decoder):
            for parameter in part.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
        for layer in all_known(encoder.layers, ConditionalDetrEncoderLayer):
            _initialize_like_multihead_attention(layer.self_attn)
        for block in all_known(decoder.layers, ConditionalDetrDecoderLayer):
            nn.init.zeros_(block.self_attn.o_proj.bias)
            nn.init.zeros_(block.encoder_attn.o_proj.bias)
    else:
        for module in (encoder, decoder, input_projection):
            _initialize_normal(module, config.init_std)
        nn.init.normal_(query_position_embeddings.weight, std=config.init_std)
    if isinstance(position_embedding, ConditionalDetrLearnedPositionEmbedding):
        nn.init.uniform_(position_embedding.row_embeddings.weight)
        nn.init.uniform_(position_embedding.column_embeddings.weight)


@torch.no_grad()
def initialize_detection_heads(
    config: ConditionalDetrConfig,
    classifier: nn.Linear,
    box_head: ConditionalDetrMLPPredictionHead,
) -> None:
    """Initialise the class and box heads.

    The paper starts every class at probability 0.01 (focal prior), and every box at its reference
    point with half the image's size; with transformers' zero bias the first class loss at 91
    classes is about a thousand times larger.
    """
    if config.compat == "paper":
        prior = 0.01
        nn.init.constant_(classifier.bias, -math.log((1 - prior) / prior))
        last = known(box_head.layers[-1], nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    else:
        _initialize_normal(classifier, config.init_std)
        _initialize_normal(box_head, config.init_std)


@torch.no_grad()
def initialize_mask_head(
    config: ConditionalDetrConfig,
    mask_head: ConditionalDetrMaskHeadSmallConv,
    attention: ConditionalDetrMHAttentionMap,
) -> None:
    """Initialise the mask head and its attention; the same in both compat modes."""
    for module in mask_head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, a=1)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for projection in (attention.q_proj, attention.k_proj):
        nn.init.xavier_uniform_(projection.weight, gain=config.init_xavier_std)
        nn.init.zeros_(projection.bias)


def _initialize_like_multihead_attention(attention: ConditionalDetrSelfAttention) -> None:
    """Draw q, k and v like one `[3C, C]` matrix, which the authors have: its bound is smaller."""
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
            if part.bias is not None:
                nn.init.zeros_(part.bias)
