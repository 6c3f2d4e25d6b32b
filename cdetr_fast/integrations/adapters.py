"""What `patch_transformers()` puts in the place of transformers' functions.

Each adapter takes the original and returns its replacement, of the same signature. Replacements
call our operators where those compute the same, and the original everywhere else; any mix of
originals and replacements is right, as a model may run while another thread patches. None imports
transformers but for what it replaces.
"""

import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdetr_fast.integrations.attention import (
    attention_functions,
    cross_attention,
    decoder,
    encoder,
    registered_attention,
    registered_mask,
)
from cdetr_fast.loss.criterion import detection_loss, segmentation_loss
from cdetr_fast.models.backbone import frozen_batch_norm
from cdetr_fast.models.mask_head import mask_logits
from cdetr_kernels import sine_position_2d, sine_query

__all__ = [
    "attention_functions",
    "batch_norm",
    "conv_encoder",
    "cross_attention",
    "decoder",
    "detection",
    "encoder",
    "encoder_layer",
    "mask_head",
    "point_embedding",
    "position_embedding",
    "registered_attention",
    "registered_mask",
    "segmentation",
]


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
        return frozen_batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, 1e-5
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
