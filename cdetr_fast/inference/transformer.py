"""Encoder, decoder and heads with everything computed beforehand that no image changes.

The arithmetic is that of `cdetr_fast.models`, with these exact savings: queries, keys and values of
self-attention in one product, the position code as a cached bias, `(x + p) W = x W + p W`; the
memory projected for all decoder layers in one product; the decoder up to its first cross-attention,
the reference points and their sine code as constants of the parameters; position keys as constants
of the map's size.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdetr_fast.inference.linear import FusedLinear
from cdetr_fast.models.decoder import ConditionalDetrDecoder, ConditionalDetrDecoderLayer
from cdetr_fast.models.encoder import ConditionalDetrEncoderLayer
from cdetr_fast.models.heads import ConditionalDetrMLPPredictionHead, inverse_sigmoid
from cdetr_kernels import (
    conditional_attention,
    conditional_attention_separable,
    residual_layer_norm,
    sine_query,
)


class MapConstants(NamedTuple):
    """What depends on the position code of a map alone.

    Attributes:
        position: Position code `[B|1, S, C]`.
        encoder_biases: Bias of queries, keys and values `[S, 3C]` of each encoder layer; None where
            images are padded, each in its own way.
        rows: Each map row's part of the position keys of all decoder layers `[B|1, h, L, N, D]`;
            None where the code is not known to be the sum of one of rows and one of columns.
        columns: Each map column's part `[B|1, w, L, N, D]`.
        keys: Otherwise the position keys of all positions `[B|1, S, L, N, D]`.
    """

    position: Tensor
    encoder_biases: tuple[Tensor, ...] | None
    rows: Tensor | None
    columns: Tensor | None
    keys: Tensor | None


def _add_and_norm(linear: FusedLinear, norm: nn.LayerNorm, x: Tensor, residual: Tensor) -> Tensor:
    """Layer norm of a linear layer's result and the state it updates: one pass over memory."""
    if linear.adds_residual or torch.is_autocast_enabled(x.device.type):
        return norm(linear(x, residual))
    return residual_layer_norm(linear(x), residual, norm.weight, norm.bias, norm.eps)


class _AfterAttention(nn.Module):
    """Output projection, residual and norm."""

    def __init__(self, attention: nn.Module, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.output = FusedLinear(attention.o_proj)
        self.norm = norm

    def forward(self, attended: Tensor, residual: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            # Attention leaves its result in another order of memory once it is decomposed.
            attended = attended.clone(memory_format=torch.contiguous_format)
        return _add_and_norm(self.output, self.norm, attended.flatten(2), residual)


class _FeedForward(nn.Module):
    """Feed-forward block, residual and norm."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.fc1, self.fc2 = FusedLinear(layer.mlp.fc1), FusedLinear(layer.mlp.fc2)
        self.activation = None
        if not isinstance(layer.mlp.activation_fn, nn.ReLU):
            self.activation = layer.mlp.activation_fn
        self.norm = layer.final_layer_norm

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x, relu=self.activation is None)
        if self.activation is not None:
            hidden = self.activation(hidden)
        return _add_and_norm(self.fc2, self.norm, hidden, x)


class _EncoderLayer(nn.Module):
    def __init__(self, layer: ConditionalDetrEncoderLayer) -> None:
        super().__init__()
        attention = layer.self_attn
        self.heads = attention.num_heads
        self.qkv = FusedLinear(attention.q_proj, attention.k_proj, attention.v_proj)
        # where images are padded the position code is that of each, and is added to the state
        self.query_key = FusedLinear(attention.q_proj, attention.k_proj)
        self.value = FusedLinear(attention.v_proj)
        self.after = _AfterAttention(attention, layer.self_attn_layer_norm)
        self.feed_forward = _FeedForward(layer)

    def position_bias(self, position: Tensor) -> Tensor:
        """Bias of queries, keys and values at each map position, `[1, S, C] -> [S, 3C]`."""
        channels = position.shape[-1]
        bias = self.qkv.bias.expand(position.shape[1], -1).clone()
        bias[:, : 2 * channels] += F.linear(position[0], self.query_key.weight)
        return bias

    def forward(
        self, x: Tensor, position: Tensor, bias: Tensor | None, key_mask: Tensor | None
    ) -> Tensor:
        if bias is None:
            query, key = self.query_key(x + position).unflatten(-1, (2, self.heads, -1)).unbind(2)
            value = self.value(x).unflatten(-1, (self.heads, -1))
        else:
            joint = self.qkv(x, bias=bias)
            query, key, value = joint.unflatten(-1, (3, self.heads, -1)).unbind(2)
        attended = conditional_attention(query, None, key, None, value, key_mask)
        return self.feed_forward(self.after(attended, x))


class InferenceEncoder(nn.Module):
    """The encoder's layers, with cached position biases."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_EncoderLayer(layer) for layer in encoder.layers)

    def forward(self, x: Tensor, constants: MapConstants, key_mask: Tensor | None) -> Tensor:
        """Map `[B, S, C]` -> memory `[B, S, C]`."""
        biases = constants.encoder_biases or [None] * len(self.layers)
        for layer, bias in zip(self.layers, biases, strict=True):
            x = layer(x, constants.position, bias, key_mask)
        return x


class _DecoderLayer(nn.Module):
    """A decoder layer after the first one (whose self-attention is a constant).

    Its input is read by four linear layers: queries, keys and values of self-attention, and the
    first layer of the scale of the sine code. They are one product.
    """

    def __init__(
        self,
        layer: ConditionalDetrDecoderLayer,
        query_position: Tensor,
        query_scale: ConditionalDetrMLPPredictionHead,
    ) -> None:
        super().__init__()
        attention = layer.self_attn
        self.heads = attention.num_heads
        projections = (
            attention.q_content_proj,
            attention.k_content_proj,
            attention.v_proj,
            query_scale.layers[0],
        )
        channels = query_position.shape[-1]
        bias = torch.cat([projection.bias for projection in projections])
        bias = bias.expand(query_position.shape[1], -1).clone()  # [Q, 4C]
        bias[:, :channels] += attention.q_pos_proj(query_position)[0]
        bias[:, channels : 2 * channels] += attention.k_pos_proj(query_position)[0]
        self.joint = FusedLinear(*projections, bias=bias)
        self.scale = FusedLinear(query_scale.layers[1])
        self.after = _AfterAttention(attention, layer.self_attn_layer_norm)
        self.content = FusedLinear(layer.encoder_attn.q_content_proj)
        self.spatial = FusedLinear(layer.encoder_attn.q_pos_sine_proj)

    def forward(self, x: Tensor, sine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """State `[B, Q, C]` -> state, content and spatial queries of cross-attention."""
        query_key_value, hidden = self.joint(x).split([3 * x.shape[-1], x.shape[-1]], -1)
        query, key, value = query_key_value.unflatten(-1, (3, self.heads, -1)).unbind(2)
        scaled = (sine * self.scale(hidden.relu())).to(x.dtype)
        attended = conditional_attention(query, None, key, None, value)
        x = self.after(attended, x)
        return x, self.content(x), self.spatial(scaled)


class InferenceDecoder(nn.Module):
    """The decoder from its constants on.

    Args:
        decoder: The model's decoder.
        query_position: Object-query embedding `[1, Q, C]`.
        auxiliary: Also read out every layer.
        feeds_normed_state: The layer-normed state goes on to the next layer, as in transformers
            with the auxiliary loss.
    """

    def __init__(
        self,
        decoder: ConditionalDetrDecoder,
        query_position: Tensor,
        auxiliary: bool,
        feeds_normed_state: bool,
    ) -> None:
        super().__init__()
        self.auxiliary, self.feeds_normed_state = auxiliary, feeds_normed_state
        channels = query_position.shape[-1]
        reference_points = decoder.ref_point_head(query_position).sigmoid()
        code_dtype = torch.promote_types(query_position.dtype, torch.float32)
        sine = sine_query(reference_points, channels, dtype=code_dtype)
        first = decoder.layers[0]
        state = torch.zeros_like(query_position)
        update, _ = first.self_attn(state, query_position, None)
        state = first.self_attn_layer_norm(state + update)
        cross = first.encoder_attn
        content = cross.q_content_proj(state) + cross.q_pos_proj(query_position)
        # The first layer's content keys also hold the position keys; see the model's attention.
        spatial = content + cross.q_pos_sine_proj(sine.to(query_position.dtype))
        self.register_buffer("reference_points", reference_points)  # [1, Q, 2]
        self.register_buffer("sine", sine)  # [1, Q, C]
        self.register_buffer("first_state", state)  # [1, Q, C] each
        self.register_buffer("first_content", content)
        self.register_buffer("first_spatial", spatial)
        self.layers = nn.ModuleList(
            _DecoderLayer(layer, query_position, decoder.query_scale)
            for layer in list(decoder.layers)[1:]
        )
        attentions = [layer.encoder_attn for layer in decoder.layers]
        self.heads = cross.num_heads
        self.after = nn.ModuleList(
            _AfterAttention(layer.encoder_attn, layer.encoder_attn_layer_norm)
            for layer in decoder.layers
        )
        self.feed_forward = nn.ModuleList(_FeedForward(layer) for layer in decoder.layers)
        self.memory = FusedLinear(
            *(attention.k_content_proj for attention in attentions),
            *(attention.v_proj for attention in attentions),
        )
        self.position_keys = FusedLinear(*(attention.k_pos_proj for attention in attentions))
        self.norm = decoder.layernorm

    def project_position(self, position: Tensor) -> Tensor:
        """Position keys of all layers, `[B|1, S, C] -> [B|1, S, L, N, D]`."""
        keys = self.position_keys(position)
        return keys.unflatten(-1, (len(self.after), self.heads, -1))

    def _attend(
        self,
        index: int,
        content: Tensor,
        spatial: Tensor,
        memory: Tensor,
        constants: MapConstants,
        key_mask: Tensor | None,
    ) -> Tensor:
        """Cross-attention of one layer, memory `[B, S, 2, L, N, D]` -> `[B, Q, N, D]`."""
        queries = (x.unflatten(-1, (self.heads, -1)) for x in (content, spatial))
        content_keys, value = memory[:, :, :, index].unbind(2)
        if constants.keys is None:
            return conditional_attention_separable(
                *queries,
                content_keys,
                constants.rows[:, :, index],
                constants.columns[:, :, index],
                value,
                key_mask,
            )
        keys = constants.keys[:, :, index]
        return conditional_attention(*queries, content_keys, keys, value, key_mask)

    def forward(
        self, memory: Tensor, constants: MapConstants, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Memory `[B, S, C]` -> last state `[B, Q, C]`, states of all layers `[L, B, Q, C]`."""
        batch, layers = memory.shape[0], len(self.after)
        projected = self.memory(memory).unflatten(-1, (2, layers, self.heads, -1))
        x = self.first_state
        normed_states = []
        for index in range(layers):
            if index == 0:
                content = self.first_content.expand(batch, -1, -1)
                spatial = self.first_spatial.expand(batch, -1, -1)
            else:
                x, content, spatial = self.layers[index - 1](x, self.sine)
            attended = self._attend(index, content, spatial, projected, constants, key_mask)
            x = self.feed_forward[index](self.after[index](attended, x))
            if self.auxiliary:
                normed_states.append(self.norm(x))
                if self.feeds_normed_state:
                    x = normed_states[-1]
        if not normed_states:
            return self.norm(x), None
        last = self.norm(x) if self.feeds_normed_state else normed_states[-1]
        return last, torch.stack(normed_states)


class InferenceHeads(nn.Module):
    """Class and box heads; boxes in fp32.

    Args:
        detector: Model with `class_labels_classifier` and `bbox_predictor`.
        reference_points: `[1, Q, 2]`; None predicts boxes without them.
    """

    def __init__(self, detector: nn.Module, reference_points: Tensor | None) -> None:
        super().__init__()
        weight = detector.class_labels_classifier.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.classifier = FusedLinear(detector.class_labels_classifier)
        self.boxes = nn.ModuleList(
            FusedLinear(layer, dtype=dtype) for layer in detector.bbox_predictor.layers
        )
        start = torch.zeros(1, 1, 4, dtype=dtype, device=weight.device)
        if reference_points is not None:
            start = F.pad(inverse_sigmoid(reference_points), (0, 2))
        self.register_buffer("start", start)  # [1, Q, 4]

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """States `[B, Q, C]` -> logits `[B, Q, K]`, boxes_cxcywh `[B, Q, 4]` in fp32."""
        logits = self.classifier(states)
        x = states.to(self.start.dtype)
        for layer in self.boxes[:-1]:
            x = layer(x, relu=True)
        return logits, (self.boxes[-1](x) + self.start).sigmoid_()


HOLDERS = (FusedLinear, InferenceDecoder, InferenceHeads)
"""Modules whose buffers are computed from the model's weights, not shared with it."""
