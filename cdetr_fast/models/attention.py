"""The three attention modules: encoder self-, decoder self- and conditional cross-attention.

Their parameters have the names of transformers' modules; the arithmetic is in
`cdetr_kernels.conditional_attention`.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from cdetr_fast.models.position import MapPosition
from cdetr_fast.models.projections import (
    has_nothing_attached,
    is_plain_linear,
    joint_linear,
    joint_linear_of_sums,
)
from cdetr_kernels import conditional_attention, conditional_attention_separable


class SeparableKeys(NamedTuple):
    """Spatial keys that are a row's plus a column's: no tensor of the size of the map.

    Attributes:
        rows: `[B|1, h, C]`.
        columns: `[B|1, w, C]`.
    """

    rows: Tensor
    columns: Tensor


class _Attention(nn.Module):
    """What the three have in common: heads, dropout, and the call of the operator."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_dropout = dropout
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.o_proj = nn.Linear(hidden_size, hidden_size)

    def _attend(
        self,
        q_content: Tensor,
        q_spatial: Tensor | None,
        k_content: Tensor,
        k_spatial: Tensor | SeparableKeys | None,
        value: Tensor,
        key_mask: Tensor | None,
        return_attention: bool,
    ) -> tuple[Tensor, Tensor | None]:
        attend, spatial_keys = conditional_attention, (k_spatial,)
        if isinstance(k_spatial, SeparableKeys):
            attend, spatial_keys = conditional_attention_separable, k_spatial
        heads = [
            None if x is None else x.unflatten(-1, (self.num_heads, -1))
            for x in (q_content, q_spatial, k_content, *spatial_keys, value)
        ]
        dropout_p = self.attention_dropout if self.training else 0.0
        result = attend(*heads, key_mask, dropout_p=dropout_p, return_attention=return_attention)
        output, attention = result if return_attention else (result, None)
        return self.o_proj(output.flatten(2)), attention


class ConditionalDetrSelfAttention(_Attention):
    """Encoder self-attention; the position code is added to queries and keys, not to values."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__(hidden_size, num_heads, dropout)
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        position: Tensor,
        key_mask: Tensor | None,
        return_attention: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends from each map position to all unpadded ones.

        Args:
            hidden_states: `[B, S, C]`.
            position: Position code `[B|1, S, C]`.
            key_mask: bool `[B, S]`, True = attend, or None.
            return_attention: Also return the map `[B, N, S, S]`.
        """
        query, key = joint_linear(hidden_states + position, self.q_proj, self.k_proj)
        value = self.v_proj(hidden_states)
        return self._attend(query, None, key, None, value, key_mask, return_attention)


class ConditionalDetrDecoderSelfAttention(_Attention):
    """Decoder self-attention, with projections of its own for the object-query embedding."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__(hidden_size, num_heads, dropout)
        self.q_content_proj = nn.Linear(hidden_size, hidden_size)
        self.q_pos_proj = nn.Linear(hidden_size, hidden_size)
        self.k_content_proj = nn.Linear(hidden_size, hidden_size)
        self.k_pos_proj = nn.Linear(hidden_size, hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        query_position: Tensor,
        key_mask: Tensor | None,
        return_attention: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends from each object query to all others.

        Args:
            hidden_states: `[B, Q, C]`.
            query_position: Object-query embedding `[1, Q, C]`.
            key_mask: bool `[B, Q]`, True = attend, or None.
            return_attention: Also return the map `[B, N, Q, Q]`.
        """
        query, key, value = joint_linear(
            hidden_states, self.q_content_proj, self.k_content_proj, self.v_proj
        )
        query_shift, key_shift = joint_linear(query_position, self.q_pos_proj, self.k_pos_proj)
        return self._attend(
            query + query_shift, None, key + key_shift, None, value, key_mask, return_attention
        )

    def output_of_zeros(self) -> Tensor | None:
        """Returns what every query gets of a state of zeros, `[1, 1, C]`, if that is known.

        All values are the bias of their projection then, whatever is attended to. It is not known
        under dropout, or where something is attached that a call would run. With gradients it is
        not taken either: parameters that play no part need their zero gradients, for DDP.
        """
        if self.training or torch.is_grad_enabled():
            return None
        if not has_nothing_attached(self, ConditionalDetrDecoderSelfAttention):
            return None
        if not all(is_plain_linear(projection) for projection in self.children()):
            return None
        return self.o_proj(self.v_proj.bias[None, None])


class MemoryKeys(NamedTuple):
    """What one decoder layer reads of the encoder's memory.

    Attributes:
        content: `[B, S, C]`.
        spatial: `[B|1, S, C]`, or those of rows and columns.
        value: `[B, S, C]`.
    """

    content: Tensor
    spatial: Tensor | SeparableKeys
    value: Tensor


def project_position(
    position: Tensor | MapPosition, *projections: nn.Module
) -> tuple[Tensor | SeparableKeys, ...]:
    """Projects the position code with several layers, rows and columns apart where it can be."""
    if isinstance(position, Tensor):
        return joint_linear(position, *projections)
    parts = joint_linear_of_sums(position.rows, position.columns, *projections)
    if parts is None:
        return joint_linear(position.code, *projections)
    return tuple(SeparableKeys(*part) for part in parts)


class ConditionalDetrDecoderCrossAttention(_Attention):
    """Conditional cross-attention: content and spatial scores add up, no concatenation.

    Args:
        hidden_size: C.
        num_heads: N.
        dropout: Probability of dropping an attention weight in training.
        is_first: The first layer also adds the object-query embedding to the content queries, and
            the position keys to the content keys.
    """

    def __init__(self, hidden_size: int, num_heads: int, dropout: float, is_first: bool) -> None:
        super().__init__(hidden_size, num_heads, dropout)
        self.q_content_proj = nn.Linear(hidden_size, hidden_size)
        self.q_pos_proj = nn.Linear(hidden_size, hidden_size) if is_first else None
        self.k_content_proj = nn.Linear(hidden_size, hidden_size)
        self.k_pos_proj = nn.Linear(hidden_size, hidden_size)
        self.q_pos_sine_proj = nn.Linear(hidden_size, hidden_size)

    def project_memory(self, memory: Tensor, position: Tensor | MapPosition) -> MemoryKeys:
        """Projects the memory `[B, S, C]` and its position code `[B|1, S, C]` for this layer."""
        content, value = joint_linear(memory, self.k_content_proj, self.v_proj)
        return MemoryKeys(content, *project_position(position, self.k_pos_proj), value)

    def forward(
        self,
        hidden_states: Tensor,
        query_sine: Tensor,
        query_position: Tensor,
        keys: MemoryKeys,
        key_mask: Tensor | None,
        return_attention: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends from each object query to the unpadded map positions.

        Args:
            hidden_states: `[B|1, Q, C]`.
            query_sine: Scaled sine code of the reference points `[B|1, Q, C]`.
            query_position: Object-query embedding `[1, Q, C]`; only the first layer reads it.
            keys: The projected memory.
            key_mask: bool `[B, S]`, True = attend, or None.
            return_attention: Also return the map `[B, N, Q, S]`.
        """
        batch = keys.content.shape[0]
        q_content = self.q_content_proj(hidden_states)
        q_spatial = self.q_pos_sine_proj(query_sine)
        if self.q_pos_proj is not None:
            q_content = q_content + self.q_pos_proj(query_position)
            # q_c . (k_c + k_s) + q_s . k_s = q_c . k_c + (q_c + q_s) . k_s: the position keys are
            # added on the side of the queries, of which there are fewer.
            q_spatial = q_content + q_spatial
        return self._attend(
            q_content.expand(batch, -1, -1),
            q_spatial.expand(batch, -1, -1),
            keys.content,
            keys.spatial,
            keys.value,
            key_mask,
            return_attention,
        )
