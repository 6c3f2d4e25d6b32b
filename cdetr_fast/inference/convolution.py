"""A convolution with everything that follows it: frozen batch norm, bias, residual, activation.

Replaces: a plain convolution, and the frozen batch norm, addition and activation behind it.

Gains: the norm's arithmetic, and a pass over memory for each of the others where oneDNN or cuDNN
runs them; without them channels-last memory is what remains.
"""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

from cdetr_fast.common.errors import first_line
from cdetr_fast.inference.padding import pad_same
from cdetr_fast.inference.workspace import Workspace, worth_keeping
from cdetr_fast.models.backbone import FrozenBatchNorm2d

FOLDABLE = (nn.Conv2d, Conv2dSame)
"""Exact types whose forward is a convolution with their own weight; subclasses may do more."""


def can_fold(module: nn.Module) -> bool:
    """Return whether `FusedConv2d` computes what a module does: it pads both sides with zeros."""
    if type(module) not in FOLDABLE:
        return False
    assert isinstance(module, nn.Conv2d)
    if module.padding_mode != "zeros":
        return False
    spans = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    return module.padding != "same" or not any(span % 2 for span in spans)


class Activation(NamedTuple):
    """An activation by the name that oneDNN has for it.

    Attributes:
        name: oneDNN's name.
        scalars: Its parameters.
        algorithm: A variant.
    """

    name: str
    scalars: tuple[float, ...] = ()
    algorithm: str | None = None

    def apply_(self, x: Tensor) -> Tensor:
        """Compute it by torch, in place where torch can."""
        name, scalars, algorithm = self
        if name == "gelu":
            return F.gelu(x, approximate=algorithm or "none")
        functions = {
            "relu": F.relu_,
            "swish": lambda y: F.silu(y, inplace=True),
            "hardswish": lambda y: F.hardswish(y, inplace=True),
            "hardsigmoid": lambda y: F.hardsigmoid(y, inplace=True),
            "sigmoid": torch.sigmoid_,
            "tanh": torch.tanh_,
            "hardtanh": F.hardtanh_,
            "leaky_relu": F.leaky_relu_,
        }
        return functions[name](x, *scalars)


def activation_of(module: nn.Module) -> Activation | None:
    """Return the activation that a module is; None if oneDNN cannot fuse it."""
    simple = {
        nn.ReLU: "relu",
        nn.SiLU: "swish",
        nn.Hardswish: "hardswish",
        nn.Hardsigmoid: "hardsigmoid",
        nn.Sigmoid: "sigmoid",
        nn.Tanh: "tanh",
    }
    kind = type(module)
    if kind in simple:
        return Activation(simple[kind])
    if kind is nn.ReLU6:
        return Activation("hardtanh", (0.0, 6.0))
    if type(module) is nn.LeakyReLU:
        return Activation("leaky_relu", (module.negative_slope,))
    if type(module) is nn.GELU:
        return Activation("gelu", (), module.approximate)
    return None


RELU = Activation("relu")


class FusedConv2d(nn.Module):
    """`act(conv(x) * scale + shift [+ residual])` with scale and shift folded into the weight.

    Args:
        conv: One that `can_fold` takes; its weight is read, not changed.
        norm: The frozen batch norm that follows it, or None.

    The weight is channels-last. oneDNN packs it in each call, which is a third of the time of a
    small image; it is packed beforehand when a size comes twice in a row, for that size alone, as
    the packed form of one makes others up to three times slower (ResNet-50, last stage).
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Conv2d, norm: FrozenBatchNorm2d | None) -> None:
        super().__init__()
        weight = conv.weight.detach().double()
        bias = weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.detach().double()
        if norm is not None:
            scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            weight = weight * scale[:, None, None, None]
            bias = (bias - norm.running_mean.double()) * scale + norm.bias.double()
        weight = weight.to(conv.weight.dtype, memory_format=torch.channels_last, copy=True)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias.to(conv.weight.dtype, copy=True))
        self.stride, self.dilation = list(conv.stride), list(conv.dilation)
        self.groups = conv.groups
        self.same = type(conv) is Conv2dSame
        self.padding = [0, 0] if self.same else _padding(conv)
        self.kernel_size = list(conv.kernel_size)
        self.windows = (self.kernel_size, self.stride, self.padding, self.dilation)
        self.activation: Activation | None = None
        self.in_place = False
        self.slot: int | None = None
        self.workspace: Workspace | None = None
        self.implementation = "torch"
        self._last_shape: torch.Size | None = None
        self._packed: tuple[torch.Size, int, Tensor] | None = None  # shape, version, weight

    def can_fuse(self, activation: Activation, residual: bool) -> bool:
        """Return whether an activation (after a residual, or alone) can be part of it."""
        return activation == RELU if residual else True

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Compute the block.

        Args:
            x: `[B, C, H, W]`.
            residual: Added before the activation, of the shape of the result. It is overwritten
                by the result where `in_place` says that nothing else reads it.
        """
        if self.same:
            x = pad_same(x, self.kernel_size, self.stride, self.dilation)
        # Compiled and exported graphs take the plain form: the fused operators have no fake
        # implementation, and Inductor fuses them by itself.
        if self.implementation != "torch" and not torch.compiler.is_compiling():
            return (self._onednn if self.implementation == "onednn" else self._cudnn)(x, residual)
        x = F.conv2d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )
        if residual is not None:
            x = x.add_(residual)
        return x if self.activation is None else self.activation.apply_(x)

    def _onednn(self, x: Tensor, residual: Tensor | None) -> Tensor:
        name, scalars, algorithm = self.activation or ("none", (), None)
        where = (self.padding, self.stride, self.dilation, self.groups)
        weight = self._weight_for(x.shape)
        in_place = self.in_place
        if residual is None and self.slot is not None and self.workspace is not None:
            shape = map_shape(x, len(self.weight), *self.windows)
            if worth_keeping(shape, x.dtype):  # the operator takes no `out`, but writes over a sum
                residual, in_place = self.workspace.zeros(self.slot, shape, x.dtype), True
        if residual is None:
            return torch.ops.mkldnn._convolution_pointwise(
                x, weight, self.bias, *where, name, list(scalars), algorithm
            )
        unary = None if self.activation is None else name
        if in_place:
            return torch.ops.mkldnn._convolution_pointwise_.binary(
                residual, x, weight, self.bias, *where, "add", 1.0, unary, [], None
            )
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x, residual, weight, self.bias, *where, "add", 1.0, unary, [], None
        )

    def _weight_for(self, shape: torch.Size) -> Tensor:
        """Return the weight, packed for a map's shape if the call before had it too."""
        packed, version = self._packed, self.weight._version
        if packed is not None and packed[:2] == (shape, version):
            return packed[2]
        if self._last_shape != shape:
            self._last_shape = shape
            return self.weight
        with torch.inference_mode(False), torch.no_grad():
            weight = torch.ops.mkldnn._reorder_convolution_weight(
                self.weight, self.padding, self.stride, self.dilation, self.groups, list(shape)
            )
        self._packed = (shape, version, weight)
        return weight

    def _cudnn(self, x: Tensor, residual: Tensor | None) -> Tensor:
        where = (self.stride, self.padding, self.dilation, self.groups)
        if residual is None:
            return torch.ops.aten.cudnn_convolution_relu(x, self.weight, self.bias, *where)
        return torch.ops.aten.cudnn_convolution_add_relu(
            x, self.weight, residual, 1.0, self.bias, *where
        )

    def choose_implementation(self) -> str | None:
        """Take the fused operator of the device if it works; return why not, or None."""
        self.implementation = "torch"
        if self.weight.device.type == "cpu":
            if not has_onednn(self.weight.dtype):
                return f"oneDNN does not run {self.weight.dtype} here"
            return _try(self, "onednn")
        if self.weight.device.type == "cuda" and torch.version.cuda:
            # cuDNN has an epilogue for ReLU alone
            return _try(self, "cudnn") if self.activation == RELU else None
        return f"no fused convolution on {self.weight.device.type}"


def map_shape(
    x: Tensor,
    channels: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int, int, int]:
    """Return the shape of what a convolution or pooling makes of `[B, C, H, W]`."""
    height, width = (
        (size + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i, size in enumerate(x.shape[2:])
    )
    return x.shape[0], channels, height, width


def _padding(conv: nn.Conv2d) -> list[int]:
    """Return how many rows and columns a convolution pads on either side."""
    if not isinstance(conv.padding, str):
        return list(conv.padding)
    if conv.padding == "valid":
        return [0, 0]
    # "same" of torch is symmetric where the stride is 1.
    return [d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]


def has_onednn(dtype: torch.dtype) -> bool:
    """Return whether torch has oneDNN's fused convolutions for a dtype on this CPU."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops, "mkldnn")):
        return False
    if not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return dtype == torch.float32


@torch.no_grad()
def _try(conv: FusedConv2d, implementation: str) -> str | None:
    """Take a fused operator if it is right on a small map; return why it is not, or None.

    cuDNN refuses some combinations of dtype, groups and layout only when it is called.
    """
    channels = conv.weight.shape[1] * conv.groups
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, channels, 9, 9, generator=generator, device="cpu")
    x = x.to(conv.weight.device, conv.weight.dtype, memory_format=torch.channels_last)
    in_place, conv.in_place = conv.in_place, False
    try:
        expected = conv(x)
        residuals = (
            (None, torch.ones_like(expected)) if conv.activation in (None, RELU) else (None,)
        )
        for residual in residuals:
            conv.implementation = "torch"
            expected = conv(x, residual)
            conv.implementation = implementation
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                got = conv(x, residual)
            error = (got.double() - expected.double()).abs().max()
            limit = 100 * _precision(x) * (1 + expected.double().abs().max())
            if not error <= limit:
                conv.implementation = "torch"
                return f"the {implementation} convolution is off by {error.item():.1e}"
    except RuntimeError as error:
        conv.implementation = "torch"
        return f"{implementation}: {first_line(error)}"
    finally:
        conv.in_place = in_place
        conv._last_shape = conv._packed = None
    return None


def _precision(x: Tensor) -> float:
    """Return the unit of rounding of a convolution of `x`, which on a GPU may be that of TF32."""
    # `torch.backends.cudnn.allow_tf32` raises once a precision has been set by the newer names.
    cudnn: Any = torch.backends.cudnn  # torch declares no type for `conv`
    if x.is_cuda and x.dtype == torch.float32 and cudnn.conv.fp32_precision == "tf32":
        return 2.0**-13
    return torch.finfo(x.dtype).eps
