"""Replacements for functions of transformers other than attention.

Each adapter, here and in `attention`, takes the original and transformers' module of the model, and
returns a replacement with the same signature. It calls our operators where those compute the same
and the original elsewhere. Any mix of originals and replacements is right, as a model may run while
another thread patches.
"""

import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdetr_fast.config.model import ConditionalDetrConfig
from cdetr_fast.loss.criterion import detection_loss, segmentation_loss
from cdetr_fast.loss.targets import Labels
from cdetr_fast.models.backbone import frozen_batch_norm
from cdetr_fast.models.mask_head import mask_logits
from cdetr_fast.models.projections import has_attachments
from cdetr_kernels import sine_position_2d, sine_query

Function = Callable[..., Any]


def encoder_layer(original: Function, modeling: ModuleType) -> Function:
    """Return the forward of the encoder layer; its clamp in training asks the device nothing."""
    base: Any = modeling.ConditionalDetrEncoderLayer

    class EncoderLayer(base):
        # A subclass, as transformers wraps the `forward` of each in its gradient checkpointing.
        def forward(
            self,
            hidden_states: Tensor,
            attention_mask: Tensor | None,
            spatial_position_embeddings: Tensor | None = None,
            **kwargs: Any,
        ) -> Tensor:
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


def map_code(original: Function, modeling: ModuleType) -> Function:
    """Return the sine code of the map; in half precision transformers' own, with rounded angles."""

    @functools.wraps(original)
    def forward(
        self: Any,
        shape: torch.Size,
        device: torch.device | str,
        dtype: torch.dtype,
        mask: Tensor | None = None,
    ) -> Any:
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


def point_code(original: Function, modeling: ModuleType) -> Function:
    """Return the sine code of reference points."""

    @functools.wraps(original)
    def forward(pos_tensor: Tensor, num_pos_feats: int = 128, temperature: int = 10000) -> Any:
        coordinates = pos_tensor.shape[-1]
        if coordinates not in (2, 4):
            return original(pos_tensor, num_pos_feats, temperature)
        # The product in the dtype of the points, as transformers rounds it.
        angles = pos_tensor * (2 * math.pi)
        channels = coordinates * num_pos_feats
        return sine_query(angles, channels, temperature=temperature, scale=1.0)

    return forward


def mask_head(original: Function, modeling: ModuleType) -> Function:
    """Return the forward of the mask head, without copies of the maps unless something hooks in."""

    @functools.wraps(original)
    def forward(
        self: Any, features: Tensor, attention_masks: Tensor, fpn_features: list[Tensor]
    ) -> Any:
        if not all(_is_untouched(module) for module in self.modules()):
            return original(self, features, attention_masks, fpn_features)
        masks = mask_logits(self, features, attention_masks, fpn_features)
        return masks.flatten(0, 1)[:, None]

    return forward


def batch_norm(original: Function, modeling: ModuleType) -> Function:
    """Return frozen batch norm in one pass; under autocast transformers' own, which gives fp32."""

    @functools.wraps(original)
    def forward(self: Any, x: Tensor) -> Any:
        if x.dtype != self.weight.dtype:
            return original(self, x)
        return frozen_batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, 1e-5
        )

    return forward


def conv_encoder(original: Function, modeling: ModuleType) -> Function:
    """Return the forward of the backbone, on channels-last images."""

    @functools.wraps(original)
    def forward(self: Any, pixel_values: Tensor, pixel_mask: Tensor) -> Any:
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        return original(self, pixel_values, pixel_mask)

    return forward


class _LossConfig:
    """A configuration of transformers with the field that our losses read besides."""

    compat = "transformers"

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def _loss_config(config: Any) -> ConditionalDetrConfig:
    return cast(ConditionalDetrConfig, _LossConfig(config))


def detection(original: Function, modeling: ModuleType) -> Function:
    """Return the loss of a detection model."""

    @functools.wraps(original)
    def loss(
        logits: Tensor,
        labels: Labels,
        device: torch.device,
        pred_boxes: Tensor,
        config: Any,
        outputs_class: Tensor | None = None,
        outputs_coord: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        outputs = (outputs_class, outputs_coord)
        return detection_loss(logits, labels, device, pred_boxes, _loss_config(config), *outputs)

    return loss


def segmentation(original: Function, modeling: ModuleType) -> Function:
    """Return the loss of a segmentation model."""

    @functools.wraps(original)
    def loss(
        logits: Tensor,
        labels: Labels,
        device: torch.device,
        pred_boxes: Tensor,
        pred_masks: Tensor,
        config: Any,
        outputs_class: Tensor | None = None,
        outputs_coord: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        outputs = (outputs_class, outputs_coord)
        return segmentation_loss(
            logits, labels, device, pred_boxes, pred_masks, _loss_config(config), *outputs
        )

    return loss


def _without_overflow(x: Tensor) -> Tensor:
    """Clamp as transformers does after asking the device whether all values are finite."""
    limit = torch.finfo(x.dtype).max - 1000
    clamped = x.clamp(-limit, limit)
    # Except in fp16 the limit rounds to the largest finite number, so no finite value changes.
    return torch.where(x.isfinite().all(), x, clamped) if x.dtype == torch.float16 else clamped


def _is_untouched(module: nn.Module) -> bool:
    """Return whether a module is torch's or transformers' own and nothing hooks into it."""
    return type(module).__module__.startswith(
        ("torch.nn.", "transformers.")
    ) and not has_attachments(module)
