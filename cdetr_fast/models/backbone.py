"""The backbone of a model: feature maps of images, with frozen batch norms."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from cdetr_fast.common.model_families import service
from cdetr_fast.config.model import BackboneConfig, ConditionalDetrConfig
from cdetr_fast.models.feature_maps import FeatureBackbone, maps_of
from cdetr_fast.models.resnet import build_resnet
from cdetr_fast.models.timm_backbone import build_timm


class _FrozenNorm(torch.autograd.Function):
    """Batch norm by fixed numbers, whose gradient needs nothing of the input.

    torch's own keeps the input for the gradients of weight and bias, and computes them, although
    nobody asks for them.
    """

    @staticmethod
    def forward(
        x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> Tensor:
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, var, weight, _, ctx.eps = inputs
        ctx.save_for_backward(var, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        var, weight = ctx.saved_tensors
        # With fixed statistics the gradient of the input does not depend on the input, whose place
        # any tensor of its form can take; nor on the mean.
        (scaled, _, _) = torch.ops.aten.native_batch_norm_backward(
            *(gradient, gradient.detach(), weight, var, var, None, None, False, ctx.eps),
            [True, False, False],
        )
        return scaled, None, None, None, None, None


def frozen_batch_norm(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """Normalise `[B, C, H, W]` by fixed numbers `[C]`; gradients go to `x` alone."""
    differentiates = x.requires_grad and torch.is_grad_enabled()
    # Neither a compiler nor `torch.jit.trace` looks into the function.
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]  # unlisted
    if differentiates and not (torch.compiler.is_compiling() or tracing):
        return _FrozenNorm.apply(x, mean, var, weight, bias, eps)
    return F.batch_norm(x, mean, var, weight, bias, eps=eps)


class FrozenBatchNorm2d(nn.Module):
    """Batch norm with fixed statistics and affine parameters, all of them buffers.

    Args:
        num_features: Number of channels.
        eps: Added to the variance.

    Source: the authors' models/backbone.py.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        return frozen_batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.eps
        )


class FrozenBatchNormAct2d(FrozenBatchNorm2d):
    """Frozen form of timm's `BatchNormAct2d`: its dropout and activation stay."""

    def __init__(self, num_features: int, eps: float, drop: nn.Module, act: nn.Module) -> None:
        super().__init__(num_features, eps)
        self.drop = drop
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def freeze_batch_norm(module: nn.Module, faithful: bool = True) -> None:
    """Replace every `nn.BatchNorm2d` inside `module` by its frozen form, in place.

    Args:
        module: Any module; its own class is left as it is.
        faithful: Keep the norm's epsilon, and the activation of timm's `BatchNormAct2d`.
            transformers keeps neither, which leaves MobileNet and EfficientNet backbones (nearly)
            linear, and those with an epsilon of 1e-3 (`tf_*`) with another scale.
    """
    for name, child in module.named_children():
        if not isinstance(child, nn.BatchNorm2d):
            freeze_batch_norm(child, faithful)
            continue
        if not faithful:
            frozen = FrozenBatchNorm2d(child.num_features)
        elif isinstance(child, BatchNormAct2d):
            frozen = FrozenBatchNormAct2d(child.num_features, child.eps, child.drop, child.act)
        else:
            frozen = FrozenBatchNorm2d(child.num_features, child.eps)
        if child.weight is not None and not child.weight.is_meta:
            frozen.weight.copy_(child.weight.detach())
            frozen.bias.copy_(child.bias.detach())
        mean, var = child.running_mean, child.running_var
        if mean is not None and var is not None and not mean.is_meta:
            frozen.running_mean.copy_(mean)
            frozen.running_var.copy_(var)
        setattr(module, name, frozen)


class BackboneFeatures(NamedTuple):
    """Feature maps from fine to coarse, `[B, C_i, h_i, w_i]`, and the coarsest one's mask.

    Attributes:
        maps: The feature maps.
        mask: bool `[B, h, w]`, True = unpadded; None if nothing is padded.
    """

    maps: list[Tensor]
    mask: Tensor | None


class ConditionalDetrConvEncoder(nn.Module):
    """Backbone of timm, of transformers, or the ResNet that both have, with frozen batch norm.

    Under `compat="paper"` the stem and the stages up to stride 4 do not train, for every backbone
    of timm that has such stages (a plain ViT has not) and for "resnet", as the authors have it;
    `unfreeze_backbone()` of the model undoes that. transformers freezes nothing, except everything
    of its own ResNets. Parameters that no gradient reaches do not train in any case.

    Args:
        config: The model's configuration; `config.backbone_config` names the backbone.

    Raises:
        ValueError: The backbone is not one of timm's or transformers', does not take the arguments,
            or does not run at any image size.
        ImportError: It is one of transformers', which is not installed.
    """

    def __init__(self, config: ConditionalDetrConfig) -> None:
        super().__init__()
        paper = config.compat == "paper"
        settings = config.backbone_config
        built = _build(settings, paper)
        self.num_channels = settings.num_channels
        self.model = built.module
        self.intermediate_channel_sizes = built.channels
        self._multiple = built.multiple
        self._image_size = built.image_size
        self._unread, self._read_besides = built.unread_by_last, built.unread_by_last - built.unread
        # transformers too is faithful where it leaves the freezing to timm.
        is_timm = settings.model_type == "timm_backbone"
        timm_freezes = is_timm and settings.freeze_batch_norm_2d
        freeze_batch_norm(self.model, faithful=timm_freezes or (paper and is_timm))
        if paper:
            self._set_trainable(built.early, False)
        elif "resnet" in settings.model_type:
            self.model.requires_grad_(False)
        self._set_trainable(self._unread, False)

    def read_all_maps(self) -> None:
        """Train what only the finer maps depend on too, for a model that reads them."""
        trains = {name for name, p in self.model.named_parameters() if p.requires_grad}
        self._unread -= self._read_besides
        if trains:  # not where everything is frozen
            self._set_trainable(self._read_besides, True)

    def unfreeze(self) -> None:
        """Train everything that a gradient reaches."""
        self.model.requires_grad_(True)
        self._set_trainable(self._unread, False)

    def _set_trainable(self, names: frozenset[str], value: bool) -> None:
        for name, parameter in self.model.named_parameters():
            if name in names:
                parameter.requires_grad_(value)

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> BackboneFeatures:
        """Compute the feature maps of padded images.

        Args:
            pixel_values: `[B, num_channels, H, W]`.
            pixel_mask: `[B, H, W]`, nonzero = unpadded; None if nothing is padded.

        Raises:
            ValueError: The backbone runs at one image size, and this is another.
        """
        height, width = pixel_values.shape[-2:]
        if self._image_size not in (None, (height, width)):
            expected = "x".join(map(str, self._image_size))
            raise ValueError(
                f"pixel_values: expected images of {expected} pixels, for which the backbone was "
                f"built, got {height}x{width}"
            )
        if self._multiple > 1:
            bottom, right = -height % self._multiple, -width % self._multiple
            pixel_values = F.pad(pixel_values, (0, right, 0, bottom))
        # Convolutions are faster on channels-last images. The weights stay contiguous, for
        # safetensors refuses to save others.
        maps = maps_of(self.model(pixel_values.contiguous(memory_format=torch.channels_last)))
        if getattr(self.model, "output_fmt", "NCHW") == "NHWC":
            maps = [feature.permute(0, 3, 1, 2) for feature in maps]
        if self._multiple > 1:
            maps = [_without_padding(x, height, width, *pixel_values.shape[-2:]) for x in maps]
        mask = None
        if pixel_mask is not None:
            mask = F.interpolate(pixel_mask[:, None].float(), size=maps[-1].shape[-2:])[:, 0] > 0
        return BackboneFeatures(maps, mask)


def _build(config: BackboneConfig, paper: bool) -> FeatureBackbone:
    if config.model_type == "timm_backbone":
        return build_timm(config, paper)
    if config.model_type == "resnet":
        return build_resnet(config)
    built: FeatureBackbone = service("backbones").build_backbone(config.to_dict())
    return built


def _without_padding(
    feature: Tensor, height: int, width: int, padded_height: int, padded_width: int
) -> Tensor:
    """Cut off the part of a map `[B, C, h, w]` that only padding is behind."""
    rows, columns = feature.shape[-2:]
    return feature[..., : -(-height * rows // padded_height), : -(-width * columns // padded_width)]
