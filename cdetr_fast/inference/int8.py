"""The backbone's convolutions in 8 bits, for CPUs with VNNI.

Replaces: the fused convolutions of a backbone, on request.

Gains: 0.45 of the time of fp32 (ResNet-50, 800x1066).

Weights are signed, with a scale for each output channel; maps are unsigned, with one scale and zero
point each, found on calibration images. Products are summed in 32 bits by oneDNN's operators, those
that torch's x86 quantiser compiles to, which take any size here. Between two such convolutions a
map stays in 8 bits, the residual too; anything else gets fp32.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from cdetr_fast.inference.backbone import FusedBackbone
from cdetr_fast.inference.convolution import RELU, Activation, FusedConv2d, map_shape
from cdetr_fast.inference.padding import pad_same
from cdetr_fast.inference.pooling import KeptMaxPool2d
from cdetr_fast.inference.workspace import worth_keeping
from cdetr_kernels.pooling import codes_unsupported_reason

_CODES = 255
_FUSED = {None, RELU, Activation("hardtanh", (0.0, 6.0))}
"""Activations after which a convolution can leave 8 bits."""


class Codes(NamedTuple):
    """The code of a map's numbers in 8 bits: `scale * (code - zero)`.

    Attributes:
        scale: The step from one code to the next.
        zero: The code of 0.
        shape: Shape of the map in the last calibration batch.
    """

    scale: float
    zero: int
    shape: tuple[int, ...]

    @classmethod
    def covering(cls, extremes: Sequence[Tensor], shape: tuple[int, ...]) -> "Codes":
        """Return codes for the mean range of images.

        Args:
            extremes: Smallest and largest number of each image, `[B, 2]` for each batch.
            shape: See `Codes`.
        """
        low, high = torch.cat(list(extremes)).mean(0).tolist()
        low, high = min(low, 0.0), max(high, 0.0, low + 1e-6)
        scale = (high - low) / _CODES
        return cls(scale, round(-low / scale), shape)

    @property
    def line(self) -> tuple[float, int]:
        """Scale and zero."""
        return self.scale, self.zero

    def of(self, x: Tensor) -> Tensor:
        """Turn numbers into codes."""
        return (x * (1 / self.scale)).round_().add_(self.zero).clamp_(0, _CODES).to(torch.uint8)

    def numbers(self, codes: Tensor) -> Tensor:
        """Turn codes into fp32 numbers."""
        return codes.float().sub_(self.zero).mul_(self.scale)


def int8_unsupported_reason() -> str | None:
    """Return why int8 convolutions do not run on this CPU, or would be slow or wrong; or None."""
    names = ("qconv2d_pointwise", "qlinear_pointwise")
    if not all(hasattr(torch.ops.onednn, name) for name in names):
        return "this torch has no int8 operators of oneDNN"
    if not torch.cpu._is_vnni_supported():
        # without it pairs of products are summed in 16 bits, which overflow
        return "this CPU has no VNNI instructions"
    return None


def weight_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return signed codes of a weight `[N, ...]`, and the scale of each output channel `[N]`."""
    largest = weight.flatten(1).abs().amax(1)
    scale = largest.clamp_min(torch.finfo(torch.float32).tiny) / 127
    steps = scale.view(-1, *[1] * (weight.dim() - 1))
    return (weight / steps).round().to(torch.int8), scale


class Int8Conv2d(nn.Module):
    """A `FusedConv2d` in 8 bits.

    Args:
        conv: The convolution.
        source: Codes of its input.
        residual: Codes of its residual where that comes as codes.
        result: Codes that it leaves; None leaves fp32.

    Weights are packed for the calibration's shape. oneDNN has two packed forms, and turning one
    into the other in a call costs ten times the product itself (ResNet-50, 1x1, last stage); what
    suits one map at 13x17 to 50x67 suits all, what suits a batch may not suit a single image.
    """

    implementation = "int8"
    scale: Tensor
    zero: Tensor
    bias: Tensor

    def __init__(
        self, conv: FusedConv2d, source: Codes, residual: Codes | None, result: Codes | None
    ) -> None:
        super().__init__()
        weight = conv.weight
        codes, scale = weight_codes(weight)
        self.where = (conv.stride, conv.padding, conv.dilation, conv.groups)
        shape = None if conv.same else list(source.shape)  # None: padded beforehand
        self.packed = torch.ops.onednn.qconv_prepack(codes, scale, *source.line, *self.where, shape)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", torch.zeros(len(scale), dtype=torch.int32, device="cpu"))
        self.register_buffer("bias", conv.bias)
        self.same = (conv.kernel_size, conv.stride, conv.dilation) if conv.same else None
        self.activation, self.in_place = conv.activation, conv.in_place
        self.source, self.residual, self.result = source, residual, result
        self.slot, self.workspace, self.windows = conv.slot, conv.workspace, conv.windows

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Compute the block as `FusedConv2d` does; maps are uint8 codes or fp32."""
        if x.dtype != torch.uint8:
            x = self.source.of(x)
        if self.same is not None:
            x = pad_same(x, *self.same, self.source.zero)
        images = (x, *self.source.line, self.packed, self.scale, self.zero)
        result = (
            (1.0, 0, torch.float32) if self.result is None else (*self.result.line, torch.uint8)
        )
        name, scalars, _ = self.activation or Activation("none")
        if residual is None and (zeros := self._kept_zeros(x)) is not None:
            nothing: tuple[Any, ...] = (1.0, 0, "sum", 1.0, name, [], "")
            return torch.ops.onednn.qconv2d_pointwise.binary(
                *images, zeros, self.bias, *self.where, *result, *nothing
            )
        if residual is None and self.activation in _FUSED:
            return torch.ops.onednn.qconv_pointwise(
                *images, self.bias, *self.where, *result, name, list(scalars), ""
            )
        if residual is not None and self.residual is not None and self.result is not None:
            if not self.in_place:
                residual = residual.clone()
            addition: tuple[Any, ...] = (*self.residual.line, "sum", 1.0, name, [], "")
            return torch.ops.onednn.qconv2d_pointwise.binary(
                *images, residual, self.bias, *self.where, *result, *addition
            )
        y = torch.ops.onednn.qconv_pointwise(
            *images, self.bias, *self.where, *result, "none", [], ""
        )
        if residual is not None:
            y = y.add_(residual if self.residual is None else self.residual.numbers(residual))
        return y if self.activation is None else self.activation.apply_(y)

    def _kept_zeros(self, x: Tensor) -> Tensor | None:
        """Return zeros in kept memory, which a large result of codes is added to; or None."""
        if self.slot is None or self.workspace is None or self.result is None:
            return None
        shape = map_shape(x, len(self.scale), *self.windows)
        if not worth_keeping(shape, torch.uint8):
            return None
        return self.workspace.zeros(self.slot, shape, torch.uint8)


class _Numbers(nn.Module):
    """Conversion of codes to numbers, where a map is returned."""

    def __init__(self, codes: Codes) -> None:
        super().__init__()
        self.codes = codes

    def forward(self, x: Tensor) -> Tensor:
        return self.codes.numbers(x)


@torch.no_grad()
def quantize(
    backbone: FusedBackbone, images: Sequence[Tensor], dtype: torch.dtype = torch.float32
) -> str:
    """Put a backbone's convolutions into 8 bits, in place.

    Args:
        backbone: On a CPU in fp32.
        images: Batches `[B, 3, H, W]` on which the ranges of maps are found.
        dtype: What the maps are returned in.

    Returns:
        A description of the result, with the distance from fp32 on the last calibration batch.

    Raises:
        RuntimeError: The backbone could not be traced, or has no convolution to put into 8 bits.
    """
    body = backbone.body
    if not isinstance(body, fx.GraphModule):
        raise RuntimeError(f"int8_calibration: {'; '.join(backbone.notes)}")
    expected = backbone(images[-1])[-1]
    codes = _calibrate(body, images)
    count = _rewrite(body, codes)
    got = backbone(images[-1])[-1]
    error = ((got - expected).norm() / expected.norm()).item()
    backbone.dtype = dtype
    return f"{count} convolutions of the backbone; its last map is off by {100 * error:.1f} %"


def _calibrate(body: fx.GraphModule, images: Sequence[Tensor]) -> dict[str, Codes]:
    """Return codes for each map, from the mean of its smallest and of its largest values."""
    ranges: dict[str, list[Tensor]] = {}
    shapes: dict[str, tuple[int, ...]] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            result = super().run_node(node)
            if isinstance(result, Tensor) and result.dtype == torch.float32 and result.dim() == 4:
                # of each image, so that it does not matter how they are batched
                values = result.permute(0, 2, 3, 1).flatten(1)  # a view, as channels are last
                extremes = torch.stack(values.aminmax(dim=1), dim=1)
                ranges.setdefault(node.name, []).append(extremes)
                shapes[node.name] = tuple(result.shape)
            return result

    for batch in images:
        Recorder(body).run(batch.contiguous(memory_format=torch.channels_last))
    return {name: Codes.covering(found, shapes[name]) for name, found in ranges.items()}


def _rewrite(body: fx.GraphModule, codes: dict[str, Codes]) -> int:
    graph, modules = body.graph, dict(body.named_modules())

    def conv_of(node: fx.Node) -> FusedConv2d | None:
        module = modules.get(node.target) if node.op == "call_module" else None
        return module if isinstance(module, FusedConv2d) else None

    def pool_of(node: fx.Node) -> KeptMaxPool2d | None:
        module = modules.get(node.target) if node.op == "call_module" else None
        can_pool = codes_unsupported_reason() is None
        return module if can_pool and isinstance(module, KeptMaxPool2d) else None

    def takes_codes(node: fx.Node) -> bool:
        if pool_of(node) is not None:  # whose result is codes of the same line
            return all(conv_of(user) is not None for user in node.users)
        return conv_of(node) is not None or node.op == "output"

    leaves: dict[str, Codes] = {}  # the convolutions whose maps stay codes, and what pools these
    convs = {node: conv for node in graph.nodes if (conv := conv_of(node)) is not None}
    if not convs:
        raise RuntimeError("int8_calibration: this backbone has no convolution that runs in int8")
    for node in graph.nodes:
        if pool_of(node) is not None and node.args[0].name in leaves:
            codes[node.name] = leaves[node.args[0].name]._replace(shape=codes[node.name].shape)
            leaves[node.name] = codes[node.name]
        if (conv := convs.get(node)) is None:
            continue
        own = codes[node.name]
        residual = node.args[1].name if len(node.args) > 1 else None
        takes = all(takes_codes(user) for user in node.users)
        returned_alone = all(user.op == "output" for user in node.users)
        if conv.activation not in _FUSED or not takes or returned_alone:
            continue
        # A sum starts from the residual's codes, and leaves codes that count from 0.
        if residual is None or (residual in leaves and conv.activation == RELU and own.zero == 0):
            leaves[node.name] = own
    for node, conv in convs.items():
        residual = leaves.get(node.args[1].name) if len(node.args) > 1 else None
        source = codes[node.args[0].name]
        name = f"int8_{node.name}"
        body.add_submodule(name, Int8Conv2d(conv, source, residual, leaves.get(node.name)))
        node.target = name
        if node.name in leaves:
            _return_numbers(body, node, leaves[node.name])
    graph.lint()
    body.delete_all_unused_submodules()
    body.recompile()
    return len(convs)


def _return_numbers(body: fx.GraphModule, node: fx.Node, codes: Codes) -> None:
    """Turn codes into numbers where they are returned."""
    for user in [user for user in node.users if user.op == "output"]:
        name = f"numbers_{node.name}"
        body.add_submodule(name, _Numbers(codes))
        with body.graph.inserting_after(node):
            numbers = body.graph.call_module(name, (node,))
        user.replace_input_with(node, numbers)
