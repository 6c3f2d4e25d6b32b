"""Position codes of the map: sine, or learned per row and column."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from cdetr_fast.common.masks import is_readable, values_of
from cdetr_kernels import sine_position_2d


@dataclass(frozen=True, eq=False)
class MapPosition:
    """Position code of a feature map.

    Attributes:
        code: `[B|1, h*w, C]`.
        rows: `[B|1, h, C]` where the code of every unpadded position is known to be a row's plus a
            column's; else None.
        columns: `[B|1, w, C]` likewise.
    """

    code: Tensor
    rows: Tensor | None = None
    columns: Tensor | None = None

    @classmethod
    def separated(cls, code: Tensor, height: int, width: int) -> Self:
        """Split a separable code: p(y, x) = p(y, 0) + (p(0, x) - p(0, 0))."""
        grid = code.unflatten(1, (height, width))
        first_row = grid[:, 0]
        return cls(code, grid[:, :, 0], first_row - first_row[:, :1])


class ConditionalDetrSinePositionEmbedding(nn.Module):
    """Sine code of the map positions; computed in fp32 whatever the model's dtype.

    Args:
        channels: Width of the code.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def is_separable(self, mask: Tensor | None) -> bool:
        """Return whether unpadded positions are known to be a row's code plus a column's.

        They are where the unpadded part of each image is a rectangle at its top left. A mask on a
        GPU is not read, which would wait for the device.

        Args:
            mask: bool `[B, h, w]`, True = unpadded; None if nothing is padded.
        """
        if mask is None:
            return True
        if not is_readable(mask):
            return False
        values = values_of(mask)
        return bool((values == (values[:, :, :1] & values[:, :1])).all())

    def forward(self, feature_map: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Code the positions of a map.

        Args:
            feature_map: `[B, C, h, w]`, for its size and device.
            mask: bool `[B, h, w]`, True = unpadded; None if nothing is padded.
            dtype: dtype of the code.

        Returns:
            `[B, h*w, channels]`; the batch size is 1 without a mask, as the code is the same for
            all images.
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

    def is_separable(self, mask: Tensor | None) -> bool:
        """Return True: a column's code is next to a row's, and the mask plays no part."""
        return True

    def forward(self, feature_map: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Code the positions of a map; as for the sine code, but the mask plays no part.

        Raises:
            ValueError: The map is larger than 50 x 50.
        """
        height, width = feature_map.shape[-2:]
        limit = self.row_embeddings.num_embeddings
        if height > limit or width > limit:
            raise ValueError(
                f"pixel_values: expected a map of at most {limit} x {limit} (learned positions), "
                f"got {height} x {width}; use smaller images"
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
