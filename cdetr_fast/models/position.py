"""Position codes of the map: sine, or learned per row and column."""

import torch
from torch import Tensor, nn

from cdetr_kernels import sine_position_2d


class ConditionalDetrSinePositionEmbedding(nn.Module):
    """Sine code of the map positions; computed in fp32 whatever the model's dtype.

    Args:
        channels: Width of the code.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, feature_map: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Codes the positions of a map.

        Args:
            feature_map: `[B, C, h, w]`, for its size and device.
            mask: bool `[B, h, w]`, True = unpadded; None if nothing is padded.
            dtype: dtype of the code.

        Returns:
            `[B, h*w, channels]`; the batch size is 1 without a mask, as the code is the same for
            all.
        """
        if mask is None:
            height, width = feature_map.shape[-2:]
            mask = torch.ones(1, height, width, dtype=torch.bool, device=feature_map.device)
        return sine_position_2d(mask, self.channels, dtype=dtype)


class ConditionalDetrLearnedPositionEmbedding(nn.Module):
    """Learned code of the column, then of the row, of maps of up to 50 x 50.

    Args:
        channels: Width of the code, half for the column and half for the row.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.row_embeddings = nn.Embedding(50, channels // 2)
        self.column_embeddings = nn.Embedding(50, channels // 2)

    def forward(self, feature_map: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Codes the positions of a map; as for the sine code, but the mask plays no part.

        Raises:
            ValueError: The map is larger than 50 x 50.
        """
        height, width = feature_map.shape[-2:]
        limit = self.row_embeddings.num_embeddings
        if height > limit or width > limit:
            raise ValueError(
                f"pixel_values: expected a map of at most {limit} x {limit} (learned positions), "
                f"got {height} x {width}"
            )
        columns = self.column_embeddings.weight[:width]
        rows = self.row_embeddings.weight[:height]
        code = torch.cat(
            [
                columns[None, :, :].expand(height, -1, -1),
                rows[:, None, :].expand(-1, width, -1),
            ],
            dim=-1,
        )
        return code.flatten(0, 1)[None].to(dtype)
