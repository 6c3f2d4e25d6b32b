"""The conditional decoder."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cdetr_fast.config.model import ConditionalDetrConfig
from cdetr_fast.models.attention import (
    ConditionalDetrDecoderCrossAttention,
    ConditionalDetrDecoderSelfAttention,
    MemoryKeys,
    expand_batch,
    project_position,
)
from cdetr_fast.models.encoder import ConditionalDetrMLP, skip_layer
from cdetr_fast.models.heads import ConditionalDetrMLPPredictionHead
from cdetr_fast.models.outputs import DecoderOutput
from cdetr_fast.models.position import MapPosition
from cdetr_fast.models.projections import joint_linear, records_gradients
from cdetr_fast.models.recompute import DEFAULT_OPTIONS, recompute
from cdetr_fast.models.residual import add_and_norm, dropout
from cdetr_kernels import sine_query


class ConditionalDetrDecoderLayer(nn.Module):
    """Self-attention, conditional cross-attention and feed-forward, each with residual and norm."""

    def __init__(self, config: ConditionalDetrConfig, is_first: bool) -> None:
        super().__init__()
        heads = config.decoder_attention_heads
        self.self_attn = ConditionalDetrDecoderSelfAttention(
            config.d_model, heads, config.attention_dropout, config
        )
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.encoder_attn = ConditionalDetrDecoderCrossAttention(
            config.d_model, heads, config.attention_dropout, is_first, config
        )
        self.encoder_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.mlp = ConditionalDetrMLP(config, config.decoder_ffn_dim)
        self.final_layer_norm = nn.LayerNorm(config.d_model)
        self.dropout = config.dropout

    def attend_to_queries(
        self,
        hidden_states: Tensor,
        query_position: Tensor,
        query_mask: Tensor | None,
        return_attention: bool,
        starts_at_zero: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Apply self-attention, residual and norm; arguments as in `forward`."""
        update, attention = None, None
        if starts_at_zero and query_mask is None and not return_attention:
            update = self.self_attn.output_of_zeros()
        if update is not None:
            hidden_states = hidden_states[:, :1]  # all queries have the same state
        else:
            update, attention = self.self_attn(
                hidden_states, query_position, query_mask, return_attention
            )
        update = dropout(update, self.dropout, self.training)
        return (
            add_and_norm(self.self_attn_layer_norm, hidden_states, self.self_attn, update),
            attention,
        )

    def forward(
        self,
        hidden_states: Tensor,
        query_position: Tensor,
        query_sine: Tensor,
        memory: Tensor,
        memory_position: MapPosition,
        memory_mask: Tensor | None,
        keys: MemoryKeys | None = None,
        query_mask: Tensor | None = None,
        return_attention: bool = False,
        starts_at_zero: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Run the layer.

        Args:
            hidden_states: `[B|1, Q, C]`; a batch of 1 stands for equal states in all images.
            query_position: Object-query embedding `[1, Q, C]`.
            query_sine: Scaled sine code of the reference points `[B|1, Q, C]`.
            memory: `[B, S, C]`.
            memory_position: Position code of the map.
            memory_mask: bool `[B, S]`, True = unpadded, or None.
            keys: The memory as this layer projects it, if that has been done before.
            query_mask: bool `[B, Q]`, True = attend to this query, or None.
            return_attention: Also return both attention maps.
            starts_at_zero: `hidden_states` is zero; only of the first layer.

        Returns:
            The new state `[B, Q, C]`, the self- and the cross-attention map (or None).
        """
        hidden_states, self_attention = self.attend_to_queries(
            hidden_states, query_position, query_mask, return_attention, starts_at_zero
        )
        if keys is None:
            keys = self.encoder_attn.project_memory(memory, memory_position)
        update, cross_attention = self.encoder_attn(
            hidden_states, query_sine, query_position, keys, memory_mask, return_attention
        )
        update = dropout(update, self.dropout, self.training)
        hidden_states = add_and_norm(
            self.encoder_attn_layer_norm, hidden_states, self.encoder_attn, update
        )
        update = self.mlp(hidden_states)
        hidden_states = add_and_norm(self.final_layer_norm, hidden_states, self.mlp, update)
        return hidden_states, self_attention, cross_attention


class ConditionalDetrDecoder(nn.Module):
    """Stack of decoder layers with a shared layer norm on what is read out of them.

    With `config.auxiliary_loss` the layer-normed state of every layer is read out. Under
    `compat="transformers"` that normed state is also what the next layer receives, which is not the
    model of the paper.
    """

    def __init__(self, config: ConditionalDetrConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            ConditionalDetrDecoderLayer(config, is_first=index == 0)
            for index in range(config.decoder_layers)
        )
        self.layernorm = nn.LayerNorm(config.d_model)
        self.query_scale = ConditionalDetrMLPPredictionHead(
            config.d_model, config.d_model, config.d_model, 2
        )
        # The first layer does not read it, and DDP refuses parameters without a gradient.
        self.query_scale.requires_grad_(config.decoder_layers > 1)
        self.ref_point_head = ConditionalDetrMLPPredictionHead(
            config.d_model, config.d_model, 2, 2, fp32=True
        )
        self.config = config
        self.dropout = max(config.dropout, config.attention_dropout, config.activation_dropout)
        self.gradient_checkpointing = False
        self.checkpoint_options = DEFAULT_OPTIONS

    def forward(
        self,
        query_position: Tensor,
        memory: Tensor,
        memory_position: MapPosition,
        memory_mask: Tensor | None,
        queries: Tensor | None = None,
        query_mask: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> DecoderOutput:
        """Decode the object queries.

        Args:
            query_position: Object-query embedding `[1, Q, C]`.
            memory: `[B, S, C]`.
            memory_position: Position code of the map.
            memory_mask: bool `[B, S]`, True = unpadded, or None.
            queries: Initial state `[B, Q, C]`; zeros if None.
            query_mask: bool `[B, Q]`, True = attend to this query, or None.
            output_attentions: Return the attention maps.
            output_hidden_states: Return the initial state and the output of every layer.
        """
        # Read in each call, as transformers does: users switch it on a loaded model.
        auxiliary_loss = self.config.auxiliary_loss
        feeds_normed_state = auxiliary_loss and self.config.compat == "transformers"
        batch = memory.shape[0]
        starts_at_zero = queries is None
        if queries is None:
            # Only dropout and a mask tell the images apart, and whoever reads the gradients of
            # states and maps.
            per_image = (
                (self.training and self.dropout > 0.0)
                or query_mask is not None
                or ((output_attentions or output_hidden_states) and records_gradients())
            )
            queries = self.initial_state(query_position, batch if per_image else 1, memory.dtype)
        hidden_states = queries
        reference_points = self.reference_points(query_position)  # [1, Q, 2]

        all_states, normed_states = [queries], []
        self_attentions: list[Tensor] = []
        cross_attentions: list[Tensor] = []
        projected = self.project_memory(memory, memory_position)
        for index, (layer, keys) in enumerate(zip(self.layers, projected, strict=True)):
            if skip_layer(self.training, self.config.decoder_layerdrop):
                continue
            query_sine = self.query_sine(reference_points, hidden_states, index)
            arguments = (
                hidden_states,
                query_position,
                query_sine,
                memory,
                memory_position,
                memory_mask,
                keys,
                query_mask,
                output_attentions,
                starts_at_zero and index == 0,
            )
            if self.gradient_checkpointing and self.training:
                result = recompute(layer, arguments, self.checkpoint_options)
            else:
                result = layer(*arguments)
            hidden_states, self_attention, cross_attention = result
            all_states.append(hidden_states)
            self_attentions.append(self_attention)
            cross_attentions.append(cross_attention)
            if auxiliary_loss:
                normed_states.append(self.layernorm(hidden_states))
                if feeds_normed_state:
                    hidden_states = normed_states[-1]

        if normed_states and not feeds_normed_state:
            last_hidden_state = normed_states[-1]
        else:
            last_hidden_state = self.layernorm(hidden_states)
        last_hidden_state = expand_batch(last_hidden_state, batch)
        all_states[-1] = last_hidden_state
        return DecoderOutput(
            last_hidden_state=last_hidden_state,
            hidden_states=_expanded(all_states, batch) if output_hidden_states else None,
            attentions=_expanded(self_attentions, batch) if output_attentions else None,
            cross_attentions=tuple(cross_attentions) if output_attentions else None,
            intermediate_hidden_states=torch.stack(normed_states) if normed_states else None,
            reference_points=expand_batch(reference_points, batch).transpose(0, 1),
        )

    def initial_state(self, query_position: Tensor, batch: int, dtype: torch.dtype) -> Tensor:
        """Return zeros, `[batch, Q, C]`."""
        return expand_batch(torch.zeros_like(query_position, dtype=dtype), batch)

    def reference_points(self, query_position: Tensor) -> Tensor:
        """Return x and y of each query's reference point in [0, 1], `[1, Q, 2]`, in fp32."""
        return self.ref_point_head(query_position).sigmoid()

    def query_sine(self, reference_points: Tensor, hidden_states: Tensor, layer: int) -> Tensor:
        """Return the sine code of the reference points, which later layers scale, `[B|1, Q, C]`.

        Args:
            reference_points: `[1, Q, 2]`.
            hidden_states: `[B|1, Q, C]`.
            layer: Index of the layer that will read it.
        """
        return sine_query(
            reference_points,
            self.config.d_model,
            query_scale=self.query_scale(hidden_states) if layer > 0 else None,
            dtype=hidden_states.dtype,
        )

    def project_memory(self, memory: Tensor, position: MapPosition) -> Sequence[MemoryKeys | None]:
        """Project the memory for all layers at once: one matrix product, and one for its position.

        Layers that are wrapped (FSDP, an adapter) or recomputed (gradient checkpointing) project it
        on their own: None stands for that.
        """
        deferred = self.gradient_checkpointing and self.training
        own = [layer for layer in self.layers if type(layer) is ConditionalDetrDecoderLayer]
        if deferred or len(own) < len(self.layers):
            return [None] * len(self.layers)
        attentions = [layer.encoder_attn for layer in own]
        content_and_value = joint_linear(
            memory,
            *(attention.k_content_proj for attention in attentions),
            *(attention.v_proj for attention in attentions),
        )
        spatial = project_position(position, *(attention.k_pos_proj for attention in attentions))
        count = len(attentions)
        return [
            attention.keys(content, position_keys, value)
            for attention, content, position_keys, value in zip(
                attentions,
                content_and_value[:count],
                spatial,
                content_and_value[count:],
                strict=True,
            )
        ]


def _expanded(tensors: list[Tensor], batch: int) -> tuple[Tensor, ...]:
    return tuple(expand_batch(x, batch) for x in tensors)
