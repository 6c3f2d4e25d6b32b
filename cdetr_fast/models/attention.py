"""The three attention modules: encoder self-, decoder self- and conditional cross-attention.

Their parameters have the names of transformers' modules; the arithmetic is in
`cdetr_kernels.conditional_attention`.
"""

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.jit import is_tracing  # type: ignore[attr-defined]  # public, but not in its __all__

from cdetr_fast.config.model import ConditionalDetrConfig
from cdetr_fast.models.position import MapPosition
from cdetr_fast.models.projections import (
    is_plain,
    is_plain_linear,
    joint_linear,
    joint_linear_of_sums,
    records_gradients,
)
from cdetr_fast.models.residual import UpdateBlock
from cdetr_kernels import conditional_attention, conditional_attention_separable
from cdetr_kernels.ops.conditional_attention import concatenated


class SeparableKeys(NamedTuple):
    """Spatial keys that are a row's plus a column's: no tensor of the size of the map.

    Attributes:
        rows: `[B|1, h, N, D]`.
        columns: `[B|1, w, N, D]`.
    """

    rows: Tensor
    columns: Tensor


class MemoryKeys(NamedTuple):
    """The part of the encoder's memory that one decoder layer reads.

    Attributes:
        content: `[B, S, N, D]`.
        spatial: `[B|1, S, N, D]`, or those of rows and columns.
        value: `[B, S, N, D]`.
    """

    content: Tensor
    spatial: Tensor | SeparableKeys
    value: Tensor


class Attention(UpdateBlock):
    """Base of the three: heads, dropout, and the call of the operator.

    Args:
        hidden_size: C.
        num_heads: N.
        dropout: Probability of dropping an attention weight in training.
        config: Names the implementation; it is read in each call, as users change it. None leaves
            the choice to the operator.
    """

    output_layer = "o_proj"

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        dropout: float,
        config: ConditionalDetrConfig | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.attention_dropout = dropout
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.o_proj = nn.Linear(hidden_size, hidden_size)

    def heads(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Split the channels of tensors into heads, `[..., C] -> [..., N, D]`."""
        return tuple(x.unflatten(-1, (self.num_heads, -1)) for x in tensors)

    def attend(
        self,
        hidden_states: Tensor,
        q_content: Tensor,
        q_spatial: Tensor | None,
        keys: MemoryKeys | tuple[Tensor, None, Tensor],
        key_mask: Tensor | None,
        return_attention: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from queries `[B, Q, N, D]` of the state to keys, and project the result."""
        k_content, k_spatial, value = keys
        dropout_p = self.attention_dropout if self.training else 0.0
        implementation = None if self.config is None else self.config._attn_implementation
        if implementation == "sdpa" and not return_attention:
            output = _fused_attention(q_content, q_spatial, keys, key_mask, dropout_p)
            return self.project_output(output.flatten(2), hidden_states), None
        # To compute the map is what the operators' PyTorch path does in matrix products alone.
        eager = implementation == "eager"
        options: dict[str, Any] = {
            "dropout_p": dropout_p,
            "backend": "torch" if eager else "auto",
            "return_attention": return_attention or eager,
        }
        if isinstance(k_spatial, SeparableKeys):
            assert q_spatial is not None
            result = conditional_attention_separable(
                q_content, q_spatial, k_content, *k_spatial, value, key_mask, **options
            )
        else:
            result = conditional_attention(
                q_content, q_spatial, k_content, k_spatial, value, key_mask, **options
            )
        output, attention = result if isinstance(result, tuple) else (result, None)
        attention = attention if return_attention else None
        return self.project_output(output.flatten(2), hidden_states), attention


def _fused_attention(
    q_content: Tensor,
    q_spatial: Tensor | None,
    keys: MemoryKeys | tuple[Tensor, None, Tensor],
    key_mask: Tensor | None,
    dropout_p: float,
) -> Tensor:
    """Attend by torch's `scaled_dot_product_attention`, the two halves of a head concatenated."""
    k_content, k_spatial, value = keys
    if isinstance(k_spatial, SeparableKeys):
        k_spatial = concatenated.spatial_keys(*k_spatial)
    width = q_content.shape[-1] * (1 if q_spatial is None else 2)
    halves = (q_content, q_spatial, k_content, k_spatial)
    return concatenated.conditional_attention(*halves, value, key_mask, width**-0.5, dropout_p)


class ConditionalDetrSelfAttention(Attention):
    """Encoder self-attention; the position code is added to queries and keys, not to values."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        dropout: float,
        config: ConditionalDetrConfig | None = None,
    ) -> None:
        super().__init__(hidden_size, num_heads, dropout, config)
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)

    def project(self, hidden_states: Tensor, position: MapPosition) -> tuple[Tensor, ...]:
        """Return queries, keys and values, `[B, S, N, D]` each."""
        query, key = joint_linear(hidden_states + position.code, self.q_proj, self.k_proj)
        return self.heads(query, key, self.v_proj(hidden_states))

    def forward(
        self,
        hidden_states: Tensor,
        position: MapPosition,
        key_mask: Tensor | None,
        return_attention: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from each map position to all unpadded ones.

        Args:
            hidden_states: `[B, S, C]`.
            position: Position code of the map.
            key_mask: bool `[B, S]`, True = attend, or None.
            return_attention: Also return the map `[B, N, S, S]`.
        """
        query, key, value = self.project(hidden_states, position)
        keys = (key, None, value)
        return self.attend(hidden_states, query, None, keys, key_mask, return_attention)


class ConditionalDetrDecoderSelfAttention(Attention):
    """Decoder self-attention, with projections of its own for the object-query embedding."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        dropout: float,
        config: ConditionalDetrConfig | None = None,
    ) -> None:
        super().__init__(hidden_size, num_heads, dropout, config)
        self.q_content_proj = nn.Linear(hidden_size, hidden_size)
        self.q_pos_proj = nn.Linear(hidden_size, hidden_size)
        self.k_content_proj = nn.Linear(hidden_size, hidden_size)
        self.k_pos_proj = nn.Linear(hidden_size, hidden_size)

    def project(self, hidden_states: Tensor, query_position: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values, `[B, Q, N, D]` each."""
        query, key, value = joint_linear(
            hidden_states, self.q_content_proj, self.k_content_proj, self.v_proj
        )
        query_shift, key_shift = joint_linear(query_position, self.q_pos_proj, self.k_pos_proj)
        return self.heads(query + query_shift, key + key_shift, value)

    def forward(
        self,
        hidden_states: Tensor,
        query_position: Tensor,
        key_mask: Tensor | None,
        return_attention: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from each object query to all others.

        Args:
            hidden_states: `[B, Q, C]`.
            query_position: Object-query embedding `[1, Q, C]`.
            key_mask: bool `[B, Q]`, True = attend, or None.
            return_attention: Also return the map `[B, N, Q, Q]`.
        """
        query, key, value = self.project(hidden_states, query_position)
        keys = (key, None, value)
        return self.attend(hidden_states, query, None, keys, key_mask, return_attention)

    def output_of_zeros(self) -> Tensor | None:
        """Return what every query gets of a state of zeros, `[1, 1, C]`, if that is known.

        All values are the bias of their projection then, whatever is attended to. It is not known
        under dropout, or where something is attached that a call would run. With gradients it is
        not used either: parameters that play no part need their zero gradients, for DDP.
        """
        if self.training or records_gradients():
            return None
        if not is_plain(self, ConditionalDetrDecoderSelfAttention):
            return None
        if not all(is_plain_linear(projection) for projection in self.children()):
            return None
        return self.o_proj(self.v_proj.bias[None, None])


def project_position(
    position: MapPosition, *projections: nn.Module
) -> tuple[Tensor | SeparableKeys, ...]:
    """Project the position code by several layers, rows and columns apart where possible.

    Returns:
        For each layer keys with channels `[..., C]` that are not split into heads yet.
    """
    if position.rows is None or position.columns is None:
        return joint_linear(position.code, *projections)
    parts = joint_linear_of_sums(position.rows, position.columns, *projections)
    if parts is None:
        return joint_linear(position.code, *projections)
    return tuple(SeparableKeys(*part) for part in parts)


class ConditionalDetrDecoderCrossAttention(Attention):
    """Conditional cross-attention: content and spatial scores add up, no concatenation.

    Args:
        hidden_size: C.
        num_heads: N.
        dropout: Probability of dropping an attention weight in training.
        is_first: The first layer also adds the object-query embedding to the content queries, and
            the position keys to the content keys.
        config: As in `Attention`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        dropout: float,
        is_first: bool,
        config: ConditionalDetrConfig | None = None,
    ) -> None:
        super().__init__(hidden_size, num_heads, dropout, config)
        self.q_content_proj = nn.Linear(hidden_size, hidden_size)
        self.q_pos_proj = nn.Linear(hidden_size, hidden_size) if is_first else None
        self.k_content_proj = nn.Linear(hidden_size, hidden_size)
        self.k_pos_proj = nn.Linear(hidden_size, hidden_size)
        self.q_pos_sine_proj = nn.Linear(hidden_size, hidden_size)

    def project_memory(self, memory: Tensor, position: MapPosition) -> MemoryKeys:
        """Project the memory `[B, S, C]` and its position code for this layer."""
        content, value = joint_linear(memory, self.k_content_proj, self.v_proj)
        (spatial,) = project_position(position, self.k_pos_proj)
        return self.keys(content, spatial, value)

    def keys(self, content: Tensor, spatial: Tensor | SeparableKeys, value: Tensor) -> MemoryKeys:
        """Split projections of the memory and its position code into heads."""
        if isinstance(spatial, SeparableKeys):
            split: Tensor | SeparableKeys = SeparableKeys(*self.heads(*spatial))
        else:
            (split,) = self.heads(spatial)
        content, value = self.heads(content, value)
        return MemoryKeys(content, split, value)

    def project_queries(
        self, hidden_states: Tensor, query_sine: Tensor, query_position: Tensor
    ) -> tuple[Tensor, ...]:
        """Return content and spatial queries, `[B|1, Q, N, D]` each; arguments as in `forward`."""
        content = self.q_content_proj(hidden_states)
        spatial = self.q_pos_sine_proj(query_sine)
        if self.q_pos_proj is not None:
            content = content + self.q_pos_proj(query_position)
            # q_c . (k_c + k_s) + q_s . k_s = q_c . k_c + (q_c + q_s) . k_s: the position keys are
            # added on the side of the queries, of which there are fewer.
            spatial = content + spatial
        return self.heads(content, spatial)

    def forward(
        self,
        hidden_states: Tensor,
        query_sine: Tensor,
        query_position: Tensor,
        keys: MemoryKeys,
        key_mask: Tensor | None,
        return_attention: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from each object query to the unpadded map positions.

        Args:
            hidden_states: `[B|1, Q, C]`.
            query_sine: Scaled sine code of the reference points `[B|1, Q, C]`.
            query_position: Object-query embedding `[1, Q, C]`; only the first layer reads it.
            keys: The projected memory.
            key_mask: bool `[B, S]`, True = attend, or None.
            return_attention: Also return the map `[B, N, Q, S]`.
        """
        content, spatial = (
            expand_batch(x, keys.content.shape[0])
            for x in self.project_queries(hidden_states, query_sine, query_position)
        )
        return self.attend(hidden_states, content, spatial, keys, key_mask, return_attention)


def expand_batch(x: Tensor, batch: int) -> Tensor:
    """Repeat a tensor `[1, ...]` for each image, without a copy; others are left as they are."""
    if x.shape[0] == batch and not is_tracing():  # a traced graph serves other batches too
        return x
    return x.expand(batch, *x.shape[1:])
