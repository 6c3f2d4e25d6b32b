"""Layers that `kernels.kernelize` puts into transformers' Conditional DETR.

Each replaces the `forward` of the class of its name and has no state of its own: `self` is
transformers' module. What the operators do not compute (attention maps, masks that are not the same
for all queries) is left to the class's own forward.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from cdetr_kernels import conditional_attention, sine_position_2d

__all__ = [
    "ConditionalDetrDecoderCrossAttention",
    "ConditionalDetrDecoderSelfAttention",
    "ConditionalDetrSelfAttention",
    "ConditionalDetrSinePositionEmbedding",
]

# Version of a mask, and whether all queries share it: one look at a mask for all layers.
_SHARED: Any = WeakTensorKeyDictionary()


class _Layer(nn.Module):
    """A layer with the members that `kernelize` reads; it refuses any other."""

    can_torch_compile = True
    has_backward = True


class _Attention(_Layer):
    config: Any
    head_dim: int
    num_attention_heads: int
    scaling: float
    attention_dropout: float
    q_proj: nn.Linear
    k_proj: nn.Linear
    q_content_proj: nn.Linear
    q_pos_proj: nn.Linear
    q_pos_sine_proj: nn.Linear
    k_content_proj: nn.Linear
    k_pos_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear


class ConditionalDetrSelfAttention(_Attention):
    """Self-attention of the encoder."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output `[B, S, C]` of states `[B, S, C]`, and no attention map."""
        if not _is_computed(self.config, attention_mask, kwargs):
            original: Any = type(self).forward
            return original(self, hidden_states, attention_mask, position_embeddings, **kwargs)
        states = hidden_states
        if position_embeddings is not None:
            states = states + position_embeddings
        query, key, value = self.q_proj(states), self.k_proj(states), self.v_proj(hidden_states)
        heads = (-1, self.head_dim)
        return _attend(self, heads, query, None, key, None, value, attention_mask)


class ConditionalDetrDecoderSelfAttention(_Attention):
    """Self-attention of the decoder."""

    def forward(
        self,
        hidden_states: Tensor,
        query_position_embeddings: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output `[B, Q, C]` of states `[B, Q, C]`, and no attention map."""
        positions = query_position_embeddings
        if not _is_computed(self.config, attention_mask, kwargs):
            original: Any = type(self).forward
            return original(self, hidden_states, positions, attention_mask, **kwargs)
        query = self.q_content_proj(hidden_states) + self.q_pos_proj(positions)
        key = self.k_content_proj(hidden_states) + self.k_pos_proj(positions)
        value, heads = self.v_proj(hidden_states), (-1, self.head_dim)
        return _attend(self, heads, query, None, key, None, value, attention_mask)


class ConditionalDetrDecoderCrossAttention(_Attention):
    """Conditional cross-attention: two dot products, nothing of twice the width."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        query_sine_embed: Tensor,
        encoder_position_embeddings: Tensor,
        query_position_embeddings: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output `[B, Q, C]` of states `[B, Q, C]`, and no attention map."""
        if not _is_computed(self.config, attention_mask, kwargs):
            original: Any = type(self).forward
            return original(
                self,
                hidden_states,
                encoder_hidden_states,
                query_sine_embed,
                encoder_position_embeddings,
                query_position_embeddings,
                attention_mask,
                **kwargs,
            )
        q_content = self.q_content_proj(hidden_states)
        q_spatial = self.q_pos_sine_proj(query_sine_embed)
        if query_position_embeddings is not None:
            q_content = q_content + self.q_pos_proj(query_position_embeddings)
            # q_c . (k_c + k_s) + q_s . k_s = q_c . k_c + (q_c + q_s) . k_s: fewer queries than keys
            q_spatial = q_content + q_spatial
        k_content = self.k_content_proj(encoder_hidden_states)
        k_spatial = self.k_pos_proj(encoder_position_embeddings)
        value, heads = self.v_proj(encoder_hidden_states), (self.num_attention_heads, -1)
        return _attend(
            self, heads, q_content, q_spatial, k_content, k_spatial, value, attention_mask
        )


class ConditionalDetrSinePositionEmbedding(_Layer):
    """Sine code of the map positions; angles are in fp32 whatever the dtype of the code is."""

    num_position_features: int
    temperature: float
    normalize: bool
    scale: float

    def forward(
        self,
        shape: torch.Size,
        device: torch.device | str,
        dtype: torch.dtype,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the code `[B, C, h, w]` of a map of `shape` `[B, _, h, w]`."""
        channels = 2 * self.num_position_features
        if channels % 4:
            original: Any = type(self).forward
            return original(self, shape, device, dtype, mask)
        batch, _, height, width = shape
        if mask is None:
            mask = torch.ones(batch, height, width, dtype=torch.bool, device=device)
        code = sine_position_2d(
            mask.bool(), channels, self.temperature, self.normalize, self.scale, dtype
        )
        return code.transpose(1, 2).unflatten(-1, (height, width))


def _attend(
    layer: _Attention,
    heads: tuple[int, int],
    q_content: Tensor,
    q_spatial: Tensor | None,
    k_content: Tensor,
    k_spatial: Tensor | None,
    value: Tensor,
    mask: Tensor | None,
) -> tuple[Tensor, None]:
    """Return the layer's output, of channels that are split into heads, and no attention map."""
    output = conditional_attention(
        q_content.unflatten(-1, heads),
        None if q_spatial is None else q_spatial.unflatten(-1, heads),
        k_content.unflatten(-1, heads),
        None if k_spatial is None else k_spatial.unflatten(-1, heads),
        value.unflatten(-1, heads),
        None if mask is None else mask[:, 0, 0].expand(len(value), -1),
        scale=layer.scaling,
        dropout_p=layer.attention_dropout if layer.training else 0.0,
    )
    assert isinstance(output, Tensor)
    return layer.o_proj(output.flatten(2)), None


def _is_computed(config: Any, mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
    """Return whether the operator computes a call: no map is wanted, all queries share the mask."""
    wants_map = kwargs.get("output_attentions")
    if wants_map is None:
        wants_map = config.output_attentions
    return not wants_map and (mask is None or _is_shared(mask))


def _is_shared(mask: Any) -> bool:
    """Return whether a mask is bool `[B, 1, Q, S]`, and the same for all queries.

    transformers makes it of the padding, so it is; but its strides do not show it, and a caller may
    hand over another one. Looking waits for the device, once for each mask.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim != 4:
        return False
    if all(mask.shape[dim] == 1 or mask.stride(dim) == 0 for dim in (1, 2)):
        return True
    if torch.compiler.is_compiling():
        return False
    version = -1 if mask.is_inference() else mask._version
    known = _SHARED.get(mask)
    if known is None or known[0] != version:
        if mask.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        known = _SHARED[mask] = version, bool((mask == mask[:, :1, :1]).all())
    return bool(known[1])
