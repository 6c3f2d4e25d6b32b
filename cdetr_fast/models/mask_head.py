"""The mask head: attention maps of the queries and the backbone's maps -> one mask per query.

Much of what a query's mask is computed from is the same for all queries of an image. A convolution
is linear, so that part is computed once per image and added: the map's half of the first
convolution, and all that is computed from the backbone's finer maps. transformers repeats both for
every query, which at 800x1066 and 300 queries means tensors of many gigabytes. The queries' part is
convolved before it is upsampled, not after.

Source: the authors' models/segmentation.py (MaskHeadSmallConv, MHAttentionMap).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdetr_fast.models.activations import ACTIVATIONS
from cdetr_fast.models.projections import records_gradients

# Without gradients the head works on so many queries of each image at a time, which bounds its
# memory. On a CPU five stay in the caches: 100 queries at 800x1066 take 0.8 s, with twenty 2.0 s.
_QUERIES_AT_A_TIME = {"cpu": 5}
_QUERIES_AT_A_TIME_ELSEWHERE = 50


class ConditionalDetrMHAttentionMap(nn.Module):
    """Attention over the memory, the softmax over all heads and positions together."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, queries: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        """Compute attention maps.

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
        return _finish(self, self.conv(x))


class ConditionalDetrFPNFusionStage(nn.Module):
    """Weights of one stage, which `mask_logits` computes.

    It upsamples the queries' maps to a finer map of the backbone, adds it and refines the sum.
    """

    def __init__(
        self, fpn_channels: int, in_channels: int, out_channels: int, activation: str
    ) -> None:
        super().__init__()
        self.fpn_adapter = nn.Conv2d(fpn_channels, in_channels, kernel_size=1)
        self.refine = ConditionalDetrConvBlock(in_channels, out_channels, activation)


def conv3x3_of_upsampled(x: Tensor, weight: Tensor, size: tuple[int, int]) -> Tensor:
    """Equals `F.conv2d(F.interpolate(x, size, mode="nearest"), weight, padding=1)`.

    Where each pixel is doubled, three taps of the kernel fall on two pixels. So each of the four
    phases of the output is a 2x2 convolution of the small map: 4 products an output pixel in place
    of 9, and the large map is written once. A map of size 2n - 1 is that of size 2n without its
    last row or column, whose share in its neighbour is taken off again.

    Args:
        x: `[M, C, h, w]`.
        weight: `[C', C, 3, 3]`.
        size: H and W. Other ratios than 2, and compiled graphs (where H and W may be symbols), take
            the two steps one by one.

    Returns:
        `[M, C', H, W]`.
    """
    (height, width), (small_height, small_width) = size, x.shape[-2:]
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]  # unlisted
        or 2 * small_height - height not in (0, 1)
        or 2 * small_width - width not in (0, 1)
    ):
        return F.conv2d(F.interpolate(x, size=size, mode="nearest"), weight, padding=1)
    channels = weight.shape[0]
    kernels = [k for rows in _fold_taps(weight, dim=2) for k in _fold_taps(rows, dim=3)]
    phases = F.conv2d(x, torch.cat(kernels), padding=1)  # [M, 4 C', h + 1, w + 1]
    output = x.new_empty(len(x), channels, small_height, 2, small_width, 2)
    for phase, part in enumerate(phases.split(channels, dim=1)):
        row, column = divmod(phase, 2)
        output[:, :, :, row, :, column] = part[
            :, :, row : row + small_height, column : column + small_width
        ]
    output = output.view(len(x), channels, 2 * small_height, 2 * small_width)
    if width < 2 * small_width:
        last = x[..., -1:].repeat_interleave(2, dim=2)
        output[..., width - 1 : width] -= F.conv2d(last, weight[..., 2:], padding=(1, 0))
    if height < 2 * small_height:
        last = x[..., -1:, :].repeat_interleave(2, dim=3)[..., :width]
        update = F.conv2d(last, weight[..., 2:, :], padding=(0, 1))
        output[..., height - 1 : height, :width] -= update
    return output[..., :height, :width]


def _fold_taps(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Three taps over doubled pixels -> two taps, for even and for odd output pixels."""
    before, centre, after = weight.split(1, dim)
    return torch.cat([before, centre + after], dim), torch.cat([before + centre, after], dim)


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
        return mask_logits(self, feature_map, attention_maps, fpn_maps)


def mask_logits(
    head: Any, feature_map: Tensor, attention_maps: Tensor, fpn_maps: list[Tensor]
) -> Tensor:
    """Predicts masks with the weights of `head`, ours or that of transformers.

    Args:
        head: Has the submodules of `ConditionalDetrMaskHeadSmallConv`; the weights of its
            convolutions are read past them.
        feature_map: As in `ConditionalDetrMaskHeadSmallConv.forward`; so are the others.
        attention_maps: `[B, Q, N, h, w]`.
        fpn_maps: `[B, C_i, h_i, w_i]`.

    Returns:
        `[B, Q, H, W]`.
    """
    conv1 = head.conv1.conv
    hidden_size = feature_map.shape[1]
    map_weight, attention_weight = conv1.weight.split(
        [hidden_size, conv1.in_channels - hidden_size], dim=1
    )
    from_map = F.conv2d(feature_map, map_weight, conv1.bias, padding=1)  # [B, C+N, h, w]
    # The backbone maps' part of the refining convolutions, once per image.
    projected = [
        stage.refine.conv(stage.fpn_adapter(fpn_map))
        for stage, fpn_map in zip(head.fpn_stages, fpn_maps, strict=True)
    ]
    step = attention_maps.shape[1]
    if not records_gradients():
        step = _QUERIES_AT_A_TIME.get(attention_maps.device.type, _QUERIES_AT_A_TIME_ELSEWHERE)
    masks = [
        _masks_of(head, maps, attention_weight, from_map, projected)
        for maps in attention_maps.split(step, dim=1)
    ]
    return torch.cat(masks, dim=1)


def _masks_of(
    head: Any,
    attention_maps: Tensor,
    weight: Tensor,
    from_map: Tensor,
    projected: list[Tensor],
) -> Tensor:
    batch, queries = attention_maps.shape[:2]
    x = F.conv2d(attention_maps.flatten(0, 1), weight, padding=1)
    x = (x.unflatten(0, (batch, queries)) + from_map[:, None]).flatten(0, 1)
    x = head.conv2(_finish(head.conv1, x))
    for stage, map_part in zip(head.fpn_stages, projected, strict=True):
        x = conv3x3_of_upsampled(
            x, stage.refine.conv.weight, (map_part.shape[-2], map_part.shape[-1])
        )
        x = x.unflatten(0, (batch, queries)) + map_part[:, None]  # [B, q, C', H, W]
        x = _finish(stage.refine, x.flatten(0, 1))
    return head.output_conv(x).view(batch, queries, *x.shape[-2:])


def _finish(block: Any, x: Tensor) -> Tensor:
    """Apply the part of a block that follows its convolution."""
    return block.activation(block.norm(x))
