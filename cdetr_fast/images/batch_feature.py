"""`BatchFeature`: the container that the image processor returns."""

from collections import UserDict
from typing import Any

import torch
from torch import Tensor


class BatchFeature(UserDict[str, Any]):
    """A dictionary of tensors whose entries are attributes too, as in transformers.

    Args:
        data: Entries: tensors, numpy arrays, or lists of `BatchFeature` (the labels).
    """

    def __getattr__(self, name: str) -> Any:
        # "data" is absent while an instance is unpickled: looking it up would recurse forever.
        if name == "data" or name not in self.data:
            raise AttributeError(f"BatchFeature has no entry {name!r}")
        return self.data[name]

    def to(
        self,
        device: torch.device | str | int | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> "BatchFeature":
        """Move tensors to a device and cast floating point ones, in place, and return itself.

        Labels move with the batch and keep their dtype: the loss needs fp32 boxes. (transformers
        leaves labels where they are.)

        Args:
            device: Target device; a dtype given here is `dtype`.
            dtype: Floating point dtype of the entries.
            non_blocking: Copy asynchronously where possible.

        Raises:
            TypeError: `dtype` is not a floating point dtype.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype: expected a floating point dtype, got {dtype}")

        def moved(value: Any) -> Any:
            if isinstance(value, Tensor):
                cast = dtype if value.is_floating_point() else None
                return value.to(device=device, dtype=cast, non_blocking=non_blocking)
            if isinstance(value, BatchFeature):
                return value.to(device, non_blocking=non_blocking)
            if isinstance(value, list):
                return [moved(item) for item in value]
            return value

        self.data = {key: moved(value) for key, value in self.data.items()}
        return self

    def numpy(self) -> "BatchFeature":
        """Turn every tensor into a numpy array, in place, and return itself."""

        def converted(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.cpu().numpy()
            if isinstance(value, BatchFeature):
                return value.numpy()
            if isinstance(value, list):
                return [converted(item) for item in value]
            return value

        self.data = {key: converted(value) for key, value in self.data.items()}
        return self
