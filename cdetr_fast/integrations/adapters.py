"""What `patch_transformers()` puts in the place of transformers' functions.

Each adapter takes the original and returns its replacement, of the same signature. Replacements
call our operators where those compute the same, and the original everywhere else; any mix of
originals and replacements is right, as a model may run while another thread patches. None imports
transformers.
"""

import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdetr_fast.losses import detection_loss, segmentation_loss
from cdetr_fast.models.segmentation import mask_logits
from cdetr_kernels import conditional_attention, sine_position_2d, sine_query

# Implementations whose arithmetic is that of the operator.
_IMPLEMENTATIONS = ("eager", "sdpa", "cdetr_fast")
# What transformers' attention functions take and the operator does not compute.
_BEYOND_THE_OPERATOR = ("softcap", "position_bias", "cache", "s_aux")


def attention_forward(fallback: Callable, gives_map: bool) -> Callable:
    """Makes an attention function for transformers' `AttentionInterface`.

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
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
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
        result = conditional_attention(
            query.transpose(1, 2),
            None,
            key.transpose(1, 2),
            None,
            value.transpose(1, 2),
            key_mask,
            scale=scaling,
            dropout_p=dropout,
            return_attention=return_map,
        )
        output, attention_map = result if return_map else (result, None)
        return output.contiguous(), attention_map

    return forward


def attention_functions(original: Any, modeling: ModuleType) -> Any:
    """The interface that Conditional DETR reads, with "eager" and "sdpa" through the operator."""
    functions = type(original)()
    functions.update(original._local_mapping)
    functions["eager"] = attention_forward(modeling.eager_attention_forward, gives_map=True)
    functions["sdpa"] = attention_forward(original["sdpa"], gives_map=False)
    return functions


def registered_attention(original: Callable | None, modeling: ModuleType) -> Callable:
    """The attention function behind `attn_implementation="cdetr_fast"`."""
    return attention_forward(modeling.ALL_ATTENTION_FUNCTIONS["sdpa"], gives_map=True)


def registered_mask(original: Callable | None, modeling: ModuleType) -> Callable:
    """The mask for `attn_implementation="cdetr_fast"`: sdpa's, but without a host synchronisation.

    A padding mask is an expanded view, so that its strides tell that all queries share it.
    """
    from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

    def forward(
        batch_size: int,
        q_length: int,
        kv_length: int,
        kv_offset: int = 0,
        attention_mask: Tensor | None = None,
        allow_is_bidirectional_skip: bool = False,
        **kwargs,
    ) -> Tensor | None:
        if attention_mask is not None and allow_is_bidirectional_skip:
            if (
                kwargs.get("mask_function") is bidirectional_mask_function
                and not kwargs.get("use_vmap")
                and kv_offset == 0
                and attention_mask.shape == (batch_size, kv_length)
            ):
                return None if _is_trivial(attention_mask) else _expanded(attention_mask, q_length)
            allow_is_bidirectional_skip = attention_mask.device.type == "cpu"
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            kv_offset=kv_offset,
            attention_mask=attention_mask,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            **kwargs,
        )

    return forward


def cross_attention(original: Callable, modeling: ModuleType) -> Callable:
    """Conditional cross-attention without concatenation."""

    @functools.wraps(original)
    def forward(
        self,
        hidden_states,
        encoder_hidden_states,
        query_sine_embed,
        encoder_position_embeddings,
        query_position_embeddings=None,
        attention_mask=None,
        **kwargs,
    ):
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
        halves = (
            q_content,
            q_spatial,
            self.k_content_proj(encoder_hidden_states),
            self.k_pos_proj(encoder_position_embeddings),
            self.v_proj(encoder_hidden_states),
        )
        result = conditional_attention(
            *(half.unflatten(-1, (self.num_attention_heads, -1)) for half in halves),
            key_mask,
            scale=self.scaling,
            dropout_p=self.attention_dropout if self.training else 0.0,
            return_attention=return_map,
        )
        output, attention_map = result if return_map else (result, None)
        return self.o_proj(output.flatten(2)), attention_map

    return forward


def encoder(original: Callable, modeling: ModuleType) -> Callable:
    """The encoder, given a 4-D mask that was made without a look at the padding."""

    @functools.wraps(original)
    def forward(
        self, inputs_embeds=None, attention_mask=None, spatial_position_embeddings=None, **kwargs
    ):
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


def decoder(original: Callable, modeling: ModuleType) -> Callable:
    """The decoder, given a 4-D mask that was made without a look at the padding."""

    @functools.wraps(original)
    def forward(
        self,
        inputs_embeds=None,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        spatial_position_embeddings=None,
        object_queries_position_embeddings=None,
        **kwargs,
    ):
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


def encoder_layer(original: Callable, modeling: ModuleType) -> Callable:
    """The encoder layer, clamped in training without asking first whether something overflowed."""

    class EncoderLayer(modeling.ConditionalDetrEncoderLayer):
        # A subclass, for transformers wraps the `forward` of each in its gradient checkpointing.
        def forward(
            self, hidden_states, attention_mask, spatial_position_embeddings=None, **kwargs
        ):
            update, _ = self.self_attn(
                hidden_states=hidden_states,
                attention_mask=attention_mask,
                position_embeddings=spatial_position_embeddings,
                **kwargs,
            )
            update = F.dropout(update, p=self.dropout, training=self.training)
            hidden_states = self.self_attn_layer_norm(hidden_states + update)
            hidden_states = self.final_layer_norm(hidden_states + self.mlp(hidden_states))
            return _without_overflow(hidden_states) if self.training else hidden_states

    return EncoderLayer.forward


def position_embedding(original: Callable, modeling: ModuleType) -> Callable:
    """The sine code of the map; in half precision transformers' own, whose angles are rounded."""

    @functools.wraps(original)
    def forward(self, shape, device, dtype, mask=None):
        if mask is None or mask.dtype != torch.bool or dtype not in (torch.float32, torch.float64):
            return original(self, shape, device, dtype, mask)
        code = sine_position_2d(
            mask,
            2 * self.num_position_features,
            temperature=self.temperature,
            normalize=self.normalize,
            scale=self.scale,
            dtype=dtype,
        )
        return code.unflatten(1, mask.shape[1:]).permute(0, 3, 1, 2)

    return forward


def point_embedding(original: Callable, modeling: ModuleType) -> Callable:
    """The sine code of reference points."""

    @functools.wraps(original)
    def forward(pos_tensor, num_pos_feats=128, temperature=10000):
        coordinates = pos_tensor.shape[-1]
        if coordinates not in (2, 4):
            return original(pos_tensor, num_pos_feats, temperature)
        # The product in the dtype of the points, as transformers rounds it.
        angles = pos_tensor * (2 * math.pi)
        channels = coordinates * num_pos_feats
        return sine_query(angles, channels, temperature=temperature, scale=1.0)

    return forward


def mask_head(original: Callable, modeling: ModuleType) -> Callable:
    """The mask head without copies of the maps; with anything attached to it, transformers' own."""

    @functools.wraps(original)
    def forward(self, features, attention_masks, fpn_features):
        if not all(_is_untouched(module) for module in self.modules()):
            return original(self, features, attention_masks, fpn_features)
        masks = mask_logits(self, features, attention_masks, fpn_features)
        return masks.flatten(0, 1)[:, None]

    return forward


def batch_norm(original: Callable, modeling: ModuleType) -> Callable:
    """Frozen batch norm in one pass; under autocast transformers' own, which promotes to fp32."""

    @functools.wraps(original)
    def forward(self, x):
        if x.dtype != self.weight.dtype:
            return original(self, x)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, 1e-5
        )

    return forward


def conv_encoder(original: Callable, modeling: ModuleType) -> Callable:
    """The backbone on channels-last images."""

    @functools.wraps(original)
    def forward(self, pixel_values, pixel_mask):
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        return original(self, pixel_values, pixel_mask)

    return forward


class _Config:
    """A configuration of transformers with the field that our losses read in addition."""

    compat = "transformers"

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def detection(original: Callable, modeling: ModuleType) -> Callable:
    """The loss of a detection model."""

    @functools.wraps(original)
    def loss(
        logits,
        labels,
        device,
        pred_boxes,
        config,
        outputs_class=None,
        outputs_coord=None,
        **kwargs,
    ):
        outputs = (outputs_class, outputs_coord)
        return detection_loss(logits, labels, device, pred_boxes, _Config(config), *outputs)

    return loss


def segmentation(original: Callable, modeling: ModuleType) -> Callable:
    """The loss of a segmentation model."""

    @functools.wraps(original)
    def loss(
        logits,
        labels,
        device,
        pred_boxes,
        pred_masks,
        config,
        outputs_class=None,
        outputs_coord=None,
        **kwargs,
    ):
        outputs = (outputs_class, outputs_coord)
        return segmentation_loss(
            logits, labels, device, pred_boxes, pred_masks, _Config(config), *outputs
        )

    return loss


def _wants_map(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    wanted = kwargs.get("output_attentions")
    if wanted is None:
        wanted = getattr(getattr(module, "config", None), "output_attentions", False)
    return bool(wanted)


def _is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    causal = kwargs.get("is_causal")
    return getattr(module, "is_causal", True) if causal is None else causal


def _key_mask(attention_mask: Tensor, batch: int) -> Tensor | None:
    """4-D mask -> `[B, S]`, if dtype and strides alone prove it to be the same for all queries."""
    if attention_mask.dtype != torch.bool or attention_mask.ndim != 4:
        return None
    for dim in (1, 2):
        if attention_mask.shape[dim] != 1 and attention_mask.stride(dim) != 0:
            return None
    return attention_mask[:, 0, 0].expand(batch, -1)


def _padding(
    config: Any, mask: Tensor | None, states: Tensor | None
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """2-D padding mask -> the 4-D mask that transformers makes of it, and the mask of the keys.

    transformers takes a 4-D mask as it is. The mask of the keys goes down to the attention as a
    keyword, since a 4-D mask of floats does not show that it is one.
    """
    implementation = config._attn_implementation
    if mask is None or mask.ndim != 2 or states is None or implementation not in _IMPLEMENTATIONS:
        return mask, {}
    key_mask = mask.to(states.device, torch.bool)
    if _is_trivial(key_mask):
        return None, {}
    if implementation == "eager":
        zero = states.new_zeros(())
        mask = torch.where(key_mask, zero, torch.finfo(states.dtype).min)
    else:
        mask = key_mask
    return _expanded(mask, states.shape[1]), {"key_mask": key_mask}


def _expanded(mask: Tensor, queries: int) -> Tensor:
    return mask[:, None, None, :].expand(-1, 1, queries, -1)


def _is_trivial(mask: Tensor) -> bool:
    """Whether nothing is masked; asked only where the answer costs no synchronisation."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or mask.device.type != "cpu":
        return False
    return bool(mask.all())


def _without_overflow(x: Tensor) -> Tensor:
    """What transformers does after asking the device whether all values are finite."""
    limit = torch.finfo(x.dtype).max - 1000
    clamped = x.clamp(-limit, limit)
    # But for fp16 the limit rounds to the largest finite number, so no finite value changes.
    return torch.where(x.isfinite().all(), x, clamped) if x.dtype == torch.float16 else clamped


def _is_untouched(module: nn.Module) -> bool:
    """Whether the module is torch's or transformers', and nothing hooks into it."""
    return (
        type(module).__module__.startswith(("torch.nn.", "transformers."))
        and "forward" not in vars(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
    )
