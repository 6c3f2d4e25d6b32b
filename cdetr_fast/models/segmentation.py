"""The mask head: attention maps of the queries and the backbone's maps -> one mask a query.

Much of what a query's mask is computed from is the same for all queries of an image. A convolution is
linear, so that part is computed once per image and added: the map's half of the first convolution, and
the adapters of the backbone's maps. transformers repeats both for every query, which at 800x1066 and
300 queries means tensors of many gigabytes.

Source: the authors' models/segmentation.py (MaskHeadSmallConv, MHAttentionMap).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdetr_fast.models.activations import ACTIVATIONS

# Without gradients the head works on so many queries of each image at a time, which bounds its memory.
_QUERIES_AT_A_TIME = 20


class ConditionalDetrMHAttentionMap(nn.Module):
    """Attention of the queries over the memory, the softmax over all heads and positions together."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, queries: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        """Returns attention maps.

        Args:
            queries: `[B, Q, C]`.
            memory: `[B, S, C]`.
            mask: bool `[B, S]`, True = unpadded, or None.

        Returns:
            `[B, Q, N, S]`; each query's weights add up to 1 over heads and positions.
        """
        query = self.q_proj(queries).unflatten(-1, (self.num_heads, -1))
        key = self.k_proj(memory).unflatten(-1, (self.num_heads, -1))
        query = query * query.shape[-1] ** -0.5
        scores = query.transpose(1, 2) @ key.permute(0, 2, 3, 1)  # [B, N, Q, S]
        scores = scores.transpose(1, 2)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :], torch.finfo(scores.dtype).min)
        return scores.flatten(2).softmax(-1).view(scores.shape)


class ConditionalDetrConvBlock(nn.Module):
    """3x3 convolution, group norm, activation."""

    def __init__(self, in_channels: int, out_channels: int, activation: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.norm = nn.GroupNorm(min(8, out_channels), out_channels)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.conv(x)))


class ConditionalDetrFPNFusionStage(nn.Module):
    """Upsamples the queries' maps to a finer map of the backbone, adds it and refines the sum."""

    def __init__(
        self, fpn_channels: int, in_channels: int, out_channels: int, activation: str
    ) -> None:
        super().__init__()
        self.fpn_adapter = nn.Conv2d(fpn_channels, in_channels, kernel_size=1)
        self.refine = ConditionalDetrConvBlock(in_channels, out_channels, activation)

    def forward(self, x: Tensor, adapted: Tensor) -> Tensor:
        """Fuses `x` `[B*q, C, h, w]` with the adapted map of each image `[B, C, H, W]`."""
        x = F.interpolate(x, size=adapted.shape[-2:], mode="nearest")
        x = x.unflatten(0, (adapted.shape[0], -1)) + adapted[:, None]
        return self.refine(x.flatten(0, 1))


class ConditionalDetrMaskHeadSmallConv(nn.Module):
    """Convolutional head that turns attention maps into mask logits at stride 4.

    Args:
        hidden_size: Channels C of the projected feature map.
        num_heads: Attention maps N of each query.
        fpn_channels: Channels of the three finer backbone maps, coarse to fine.
        activation: Name of the activation function.

    Raises:
        ValueError: C + N is not a multiple of 8 (the groups of the norm).
    """

    def __init__(
        self, hidden_size: int, num_heads: int, fpn_channels: list[int], activation: str
    ) -> None:
        super().__init__()
        if (hidden_size + num_heads) % 8:
            raise ValueError(
                "d_model: expected d_model + encoder_attention_heads to be a multiple of 8, "
                f"got {hidden_size} + {num_heads}"
            )
        width = [hidden_size // 2**i for i in range(1, 5)]
        inputs = hidden_size + num_heads
        self.hidden_size = hidden_size
        self.conv1 = ConditionalDetrConvBlock(inputs, inputs, activation)
        self.conv2 = ConditionalDetrConvBlock(inputs, width[0], activation)
        self.fpn_stages = nn.ModuleList(
            ConditionalDetrFPNFusionStage(channels, width[i], width[i + 1], activation)
            for i, channels in enumerate(fpn_channels)
        )
        self.output_conv = nn.Conv2d(width[3], 1, kernel_size=3, padding=1)

    def forward(
        self, feature_map: Tensor, attention_maps: Tensor, fpn_maps: list[Tensor]
    ) -> Tensor:
        """Predicts a mask for each query.

        Args:
            feature_map: Projected map `[B, C, h, w]`.
            attention_maps: `[B, Q, N, h, w]`.
            fpn_maps: Three finer maps of the backbone, coarse to fine, `[B, C_i, h_i, w_i]`.

        Returns:
            Mask logits `[B, Q, H, W]` at the size of the finest map.
        """
        conv1 = self.conv1.conv
        map_weight, attention_weight = conv1.weight.split(
            [self.hidden_size, conv1.in_channels - self.hidden_size], dim=1
        )
        from_map = F.conv2d(feature_map, map_weight, conv1.bias, padding=1)  # [B, C+N, h, w]
        adapted = [
            stage.fpn_adapter(fpn_map)
            for stage, fpn_map in zip(self.fpn_stages, fpn_maps, strict=True)
        ]
        step = attention_maps.shape[1] if torch.is_grad_enabled() else _QUERIES_AT_A_TIME
        masks = [
            self._masks_of(maps, attention_weight, from_map, adapted)
            for maps in attention_maps.split(step, dim=1)
        ]
        return torch.cat(masks, dim=1)

    def _masks_of(
        self, attention_maps: Tensor, weight: Tensor, from_map: Tensor, adapted: list[Tensor]
    ) -> Tensor:
        batch, queries = attention_maps.shape[:2]
        x = F.conv2d(attention_maps.flatten(0, 1), weight, padding=1)
        x = (x.unflatten(0, (batch, queries)) + from_map[:, None]).flatten(0, 1)
        x = self.conv2(self.conv1.activation(self.conv1.norm(x)))
        for stage, adapted_map in zip(self.fpn_stages, adapted, strict=True):
            x = stage(x, adapted_map)
        return self.output_conv(x).view(batch, queries, *x.shape[-2:])
