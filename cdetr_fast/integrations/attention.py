"""Attention for `patch_transformers()`, without concatenation or looks at the padding mask.

transformers' attention functions take queries, keys and values `[B, N, length, D]` and a 4-D mask.
"""

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from cdetr_fast.common.masks import is_unpadded
from cdetr_kernels import conditional_attention

Function = Callable[..., Any]

# Implementations whose arithmetic is that of the operator.
_IMPLEMENTATIONS = ("eager", "sdpa", "cdetr_fast")
# Keywords that change the result in a way that the operator does not compute.
_BEYOND_THE_OPERATOR = ("softcap", "position_bias", "cache", "s_aux")
# Keywords that the operator computes, and sdpa's that it leaves to sdpa where sdpa has them.
_COMPUTED = {"is_causal", "output_attentions"}
_COMPUTED_BY_SDPA = {"position_bias", "cache"}
# Keywords that models hand to every attention function and that change no result.
_WITHOUT_EFFECT = {
    # in the mask already: packed sequences and windows
    *("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "max_length_q", "max_length_k", "max_seqlen"),
    *("position_ids", "seq_idx", "sliding_window"),
    # where a cache keeps keys and values
    *("cache_position", "use_cache", "block_table", "read_index", "write_index", "input_ids"),
    # other outputs and the loss
    *("output_hidden_states", "output_router_logits", "return_dict", "num_items_in_batch"),
    *("logits_indices", "logits_processor_args", "deterministic"),
}


def attention_forward(fallback: Function, gives_map: bool) -> Function:
    """Make an attention function for transformers' `AttentionInterface`.

    Args:
        fallback: Computes what the operator does not: causal attention, masks that are not the same
            for all queries, grouped heads, biases, and maps unless `gives_map`.
        gives_map: Return the attention map where `output_attentions` asks for it.
    """

    def forward(
        module: nn.Module,
        query: Tensor,  # [B, N, Q, D]
        key: Tensor,  # [B, N, S, D]
        value: Tensor,  # [B, N, S, Dv]
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        key_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if attention_mask is None:
            key_mask = None
        elif key_mask is None:
            key_mask = _key_mask(attention_mask, len(query))
        return_map = _wants_map(module, kwargs)
        if (
            (attention_mask is not None and key_mask is None)
            or (attention_mask is None and query.shape[2] > 1 and _is_causal(module, kwargs))
            or (return_map and not gives_map)
            or any(kwargs.get(name) is not None for name in _BEYOND_THE_OPERATOR)
            or not query.shape[:2] == key.shape[:2] == value.shape[:2]
        ):
            arguments = (module, query, key, value, attention_mask)
            return fallback(*arguments, scaling=scaling, dropout=dropout, **kwargs)
        output, attention_map = _attend(
            query.transpose(1, 2),
            None,
            key.transpose(1, 2),
            None,
            value.transpose(1, 2),
            key_mask,
            scaling,
            dropout,
            return_map,
        )
        return output.contiguous(), attention_map

    return forward


def attention_functions(original: Any, modeling: ModuleType) -> Any:
    """Return the interface that Conditional DETR reads, "eager" and "sdpa" through the operator."""
    functions = type(original)()
    functions.update(original._local_mapping)
    functions["eager"] = attention_forward(modeling.eager_attention_forward, gives_map=True)
    functions["sdpa"] = attention_forward(original["sdpa"], gives_map=False)
    return functions


def registered_attention(original: Function | None, modeling: ModuleType) -> Function:
    """Return the attention function behind `attn_implementation="cdetr_fast"`, for any model.

    It raises ValueError for keywords that neither the operator nor sdpa computes, as sdpa ignores
    what it does not know: a model with attention sinks would be wrong without a word, and so would
    one that puts selected keys into its mask for "eager" and "sdpa" alone.
    """
    sdpa = modeling.ALL_ATTENTION_FUNCTIONS["sdpa"]
    compute = attention_forward(sdpa, gives_map=True)
    # Releases of transformers differ in what their sdpa takes.
    computed = _COMPUTED | (_COMPUTED_BY_SDPA & inspect.signature(sdpa).parameters.keys())

    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        key_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        # Some eager functions read the sinks off the module.
        sinks = ("sinks", getattr(module, "sinks", None))
        for name, given in (sinks, *kwargs.items()):
            is_neutral = given is None or given is False or name in _WITHOUT_EFFECT
            if not is_neutral and name not in computed:
                raise ValueError(
                    f'attn_implementation="cdetr_fast" does not compute {name}, which '
                    f'{type(module).__name__} needs; set attn_implementation="eager"'
                )
        return compute(
            module, query, key, value, attention_mask, scaling, dropout, key_mask, **kwargs
        )

    return forward


def registered_mask(original: Function | None, modeling: ModuleType) -> Function:
    """Return the mask function for "cdetr_fast": sdpa's, but without a host synchronisation.

    A padding mask becomes an expanded view, whose strides tell that all queries share it.
    """
    from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

    def forward(
        batch_size: int,
        q_length: int,
        kv_length: int,
        kv_offset: int = 0,
        attention_mask: Tensor | None = None,
        allow_is_bidirectional_skip: bool = False,
        **kwargs: Any,
    ) -> Tensor | None:
        if attention_mask is not None and allow_is_bidirectional_skip:
            if (
                kwargs.get("mask_function") is bidirectional_mask_function
                and not kwargs.get("use_vmap")
                and kv_offset == 0
                and attention_mask.shape == (batch_size, kv_length)
            ):
                return None if is_unpadded(attention_mask) else _expanded(attention_mask, q_length)
            allow_is_bidirectional_skip = attention_mask.device.type == "cpu"
        mask: Tensor | None = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            kv_offset=kv_offset,
            attention_mask=attention_mask,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            **kwargs,
        )
        return mask

    return forward


def cross_attention(original: Function, modeling: ModuleType) -> Function:
    """Return the forward of conditional cross-attention, without concatenation."""

    @functools.wraps(original)
    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        query_sine_embed: Tensor,
        encoder_position_embeddings: Tensor,
        query_position_embeddings: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        implementation = self.config._attn_implementation
        return_map = _wants_map(self, kwargs)
        key_mask = None
        if attention_mask is not None:
            key_mask = kwargs.get("key_mask")
            if key_mask is None:
                key_mask = _key_mask(attention_mask, len(encoder_hidden_states))
        if (
            implementation not in _IMPLEMENTATIONS
            or (attention_mask is not None and key_mask is None)
            or (return_map and implementation == "sdpa")
        ):
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
        heads = (self.num_attention_heads, -1)
        output, attention_map = _attend(
            q_content.unflatten(-1, heads),
            q_spatial.unflatten(-1, heads),
            self.k_content_proj(encoder_hidden_states).unflatten(-1, heads),
            self.k_pos_proj(encoder_position_embeddings).unflatten(-1, heads),
            self.v_proj(encoder_hidden_states).unflatten(-1, heads),
            key_mask,
            self.scaling,
            self.attention_dropout if self.training else 0.0,
            return_map,
        )
        return self.o_proj(output.flatten(2)), attention_map

    return forward


def encoder(original: Function, modeling: ModuleType) -> Function:
    """Return the forward of the encoder with a 4-D mask made without looking at the padding."""

    @functools.wraps(original)
    def forward(
        self: Any,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        spatial_position_embeddings: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        mask, extra = _padding(self.config, attention_mask, inputs_embeds)
        return original(
            self,
            inputs_embeds=inputs_embeds,
            attention_mask=mask,
            spatial_position_embeddings=spatial_position_embeddings,
            **extra,
            **kwargs,
        )

    return forward


def decoder(original: Function, modeling: ModuleType) -> Function:
    """Return the forward of the decoder with a 4-D mask made without looking at the padding."""

    @functools.wraps(original)
    def forward(
        self: Any,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        spatial_position_embeddings: Tensor | None = None,
        object_queries_position_embeddings: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        mask, extra = _padding(self.config, encoder_attention_mask, inputs_embeds)
        return original(
            self,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=mask,
            spatial_position_embeddings=spatial_position_embeddings,
            object_queries_position_embeddings=object_queries_position_embeddings,
            **extra,
            **kwargs,
        )

    return forward


def _attend(
    q_content: Tensor,
    q_spatial: Tensor | None,
    k_content: Tensor,
    k_spatial: Tensor | None,
    value: Tensor,
    key_mask: Tensor | None,
    scale: float | None,
    dropout: float,
    return_map: bool,
) -> tuple[Tensor, Tensor | None]:
    """Run the operator; return its output and the attention map, if that is wanted."""
    result = conditional_attention(
        q_content,
        q_spatial,
        k_content,
        k_spatial,
        value,
        key_mask,
        scale=scale,
        dropout_p=dropout,
        return_attention=return_map,
    )
    return result if isinstance(result, tuple) else (result, None)


def _wants_map(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    wanted = kwargs.get("output_attentions")
    if wanted is None:
        wanted = getattr(getattr(module, "config", None), "output_attentions", False)
    return bool(wanted)


def _is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    causal = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if causal is None else causal)


def _key_mask(attention_mask: Tensor, batch: int) -> Tensor | None:
    """Return a 4-D mask as `[B, S]` if dtype and strides alone prove all queries to share it."""
    if attention_mask.dtype != torch.bool or attention_mask.ndim != 4:
        return None
    for dim in (1, 2):
        if attention_mask.shape[dim] != 1 and attention_mask.stride(dim) != 0:
            return None
    return attention_mask[:, 0, 0].expand(batch, -1)


def _padding(
    config: Any, mask: Tensor | None, states: Tensor | None
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Return the 4-D mask that transformers makes of a 2-D padding mask, and the mask of the keys.

    transformers takes a 4-D mask as it is. The mask of the keys goes down to the attention as a
    keyword, since a 4-D mask of floats does not show that it is one.
    """
    implementation = config._attn_implementation
    if mask is None or mask.ndim != 2 or states is None or implementation not in _IMPLEMENTATIONS:
        return mask, {}
    key_mask = mask.to(states.device, torch.bool)
    if is_unpadded(key_mask):
        return None, {}
    if implementation == "eager":
        zero = states.new_zeros(())
        mask = torch.where(key_mask, zero, torch.finfo(states.dtype).min)
    else:
        mask = key_mask
    return _expanded(mask, states.shape[1]), {"key_mask": key_mask}


def _expanded(mask: Tensor, queries: int) -> Tensor:
    return mask[:, None, None, :].expand(-1, 1, queries, -1)
