"""Feed-forward blocks in 8 bits, for CPUs with VNNI, beside an int8 backbone.

Replaces: both linear layers of the feed-forward blocks that have a ReLU between them.

Gains: 1.7 times as fast as in bf16, 3.3 times as fast as in fp32 (1064 rows, 256 to 2048 channels
and back, one thread).

Weights and states are coded as weights and maps are in `int8.py`. The state that a block reads is
turned into codes; between the layers it stays in 8 bits; the second layer leaves numbers, to which
it adds the state.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from cdetr_fast.inference.int8 import Codes, weight_codes
from cdetr_fast.inference.linear import FusedLinear
from cdetr_fast.models.encoder import ConditionalDetrMLP
from cdetr_fast.models.known import known
from cdetr_fast.models.projections import is_plain
from cdetr_fast.models.residual import ResidualLinear


class Int8Linear(ResidualLinear):
    """A `FusedLinear` in 8 bits.

    Args:
        linear: The layer.
        source: Codes of its input.
        result: Codes that it leaves; None leaves the dtype of the layer's weight.
    """

    scale: Tensor
    zero: Tensor

    def __init__(self, linear: FusedLinear, source: Codes, result: Codes | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = linear.weight.shape
        codes, scale = weight_codes(linear.weight.detach().float())
        # Of any size: packed for 64 to 4000 rows it takes as long (unlike a convolution).
        self.packed = torch.ops.onednn.qlinear_prepack(codes, None)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", torch.zeros(len(scale), dtype=torch.int32, device="cpu"))
        bias = None if linear.bias is None else linear.bias.detach().float()
        self.register_buffer("bias", bias)
        self.relu = linear.relu
        self.source, self.result, self.dtype = source, result, linear.weight.dtype

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        """Compute the layer as `FusedLinear` does; `x` is uint8 codes or numbers."""
        if x.dtype != torch.uint8:
            x = self.source.of(x.float()).contiguous()
        weight = (self.packed, self.scale, self.zero)
        result = (1.0, 0, self.dtype) if self.result is None else (*self.result.line, torch.uint8)
        if state is None:
            return torch.ops.onednn.qlinear_pointwise(
                *(x, *self.source.line, *weight, self.bias, *result),
                *("relu" if self.relu else "none", [], ""),
            )
        # The operator does not look at the strides of what it adds.
        state = state.expand(x.shape[0], -1, -1).contiguous()
        return torch.ops.onednn.qlinear_pointwise.binary(
            *(x, *self.source.line, *weight, state, self.bias, *result),
            *(1.0, 0, "add", 1.0, "none", [], ""),
        )


@torch.no_grad()
def quantize_feed_forward(
    model: nn.Module, run: Callable[[Tensor], Any], images: Sequence[Tensor]
) -> int:
    """Put the feed-forward blocks of a prepared model into 8 bits, in place.

    Args:
        model: On a CPU, its linear layers fused.
        run: Runs it on a batch of images.
        images: Batches `[B, 3, H, W]` on which the ranges of states are found.

    Returns:
        The number of blocks.
    """
    blocks = [block for block in model.modules() if _is_fused(block)]
    first_layers = [known(block.fc1, FusedLinear) for block in blocks]
    ranges: dict[tuple[nn.Module, str], list[Tensor]] = {}
    shapes: dict[tuple[nn.Module, str], torch.Size] = {}

    def record(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        for name, x in (("source", inputs[0]), ("result", output)):
            extremes = torch.stack(x.float().flatten(1).aminmax(dim=1), dim=1)
            ranges.setdefault((layer, name), []).append(extremes)
            shapes[layer, name] = x.shape

    hooks = [layer.register_forward_hook(record) for layer in first_layers]
    try:
        for batch in images:
            run(batch)
    finally:
        for hook in hooks:
            hook.remove()
    for block, first in zip(blocks, first_layers, strict=True):
        source, hidden = (
            Codes.covering(ranges[first, name], shapes[first, name])
            for name in ("source", "result")
        )
        block.fc1 = Int8Linear(first, source, hidden)
        block.fc2 = Int8Linear(known(block.fc2, FusedLinear), hidden, None)
    return len(blocks)


def _is_fused(block: nn.Module) -> TypeGuard[ConditionalDetrMLP]:
    return (
        is_plain(block, ConditionalDetrMLP)
        and type(block.fc1) is type(block.fc2) is FusedLinear
        and block.fc1.relu
        and is_plain(block.activation_fn, nn.Identity)
    )
