"""The convolutional backbone: a timm model that returns feature maps, its batch norms frozen."""

from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from timm.models.efficientnet import EfficientNetFeatures
from timm.models.mobilenetv3 import MobileNetV3Features
from torch import Tensor, nn

from cdetr_fast.config.model import BackboneConfig, ConditionalDetrConfig

# (layer_type, depths) of transformers' ResNet -> the timm model with the same weights.
_RESNETS = {
    ("basic", (2, 2, 2, 2)): "resnet18",
    ("basic", (3, 4, 6, 3)): "resnet34",
    ("bottleneck", (2, 2, 2, 2)): "resnet26",
    ("bottleneck", (3, 4, 6, 3)): "resnet50",
    ("bottleneck", (3, 4, 23, 3)): "resnet101",
    ("bottleneck", (3, 8, 36, 3)): "resnet152",
}


class _FrozenNorm(torch.autograd.Function):
    """Batch norm by fixed numbers, whose gradient needs nothing of the input.

    torch's own keeps the input for the gradients of weight and bias, and computes them, although
    nobody asks for them.
    """

    @staticmethod
    def forward(x, mean, var, weight, bias, eps):
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, var, weight, _, ctx.eps = inputs
        ctx.save_for_backward(var, weight)

    @staticmethod
    def backward(ctx, gradient):
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
    """Normalises `[B, C, H, W]` by fixed numbers `[C]`; gradients go to `x` alone."""
    differentiates = x.requires_grad and torch.is_grad_enabled()
    # Neither a compiler nor `torch.jit.trace` looks into the function.
    if differentiates and not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
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

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
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
    """Replaces every `nn.BatchNorm2d` inside `module` by its frozen form, in place.

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
        if child.running_mean is not None and not child.running_mean.is_meta:
            frozen.running_mean.copy_(child.running_mean)
            frozen.running_var.copy_(child.running_var)
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
    """timm backbone with frozen batch norm.

    Under `compat="paper"` the stem and the stages up to stride 4 do not train, for every backbone,
    as the authors have it; `unfreeze_backbone()` of the model undoes that. transformers freezes
    nothing of a timm backbone, and everything of its own ResNet.

    Args:
        config: The model's configuration; `config.backbone_config` names the backbone.

    Raises:
        ValueError: timm does not know the backbone, or transformers' ResNet has no equal in timm.
    """

    def __init__(self, config: ConditionalDetrConfig) -> None:
        super().__init__()
        paper = config.compat == "paper"
        self.num_channels = config.backbone_config.num_channels
        self.model = _create_backbone(config.backbone_config, paper)
        self.intermediate_channel_sizes = self.model.feature_info.channels()
        # transformers too is faithful where it leaves the freezing to timm.
        timm_freezes = getattr(config.backbone_config, "freeze_batch_norm_2d", False)
        freeze_batch_norm(self.model, faithful=paper or timm_freezes)
        if paper:
            _drop_unread_blocks(self.model)
            self._freeze_early_stages()
        elif config.backbone_config.model_type == "resnet":
            self.model.requires_grad_(False)

    def _freeze_early_stages(self) -> None:
        """Freezes everything up to the end of the last stage at stride 4 or finer."""
        early = [
            stage["module"] for stage in self.model.feature_info.info if stage["reduction"] <= 4
        ]
        if not early:
            return
        # timm flattens some models, which turns the dots of a stage's name into underscores.
        last = {early[-1], early[-1].replace(".", "_")}
        modules = list(self.model.named_modules())
        ends = [i for i, (name, _) in enumerate(modules) if _is_within(name, last)]
        for _, module in modules[: max(ends, default=-1) + 1]:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> BackboneFeatures:
        """Computes the feature maps of padded images.

        Args:
            pixel_values: `[B, num_channels, H, W]`.
            pixel_mask: `[B, H, W]`, nonzero = unpadded; None if nothing is padded.
        """
        # Convolutions are faster on channels-last images. The weights stay contiguous, for
        # safetensors refuses to save others.
        maps = self.model(pixel_values.contiguous(memory_format=torch.channels_last))
        if getattr(self.model, "output_fmt", "NCHW") == "NHWC":
            maps = [feature.permute(0, 3, 1, 2) for feature in maps]
        mask = None
        if pixel_mask is not None:
            mask = F.interpolate(pixel_mask[:, None].float(), size=maps[-1].shape[-2:])[:, 0] > 0
        return BackboneFeatures(list(maps), mask)


def _is_within(name: str, modules: set[str]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def _drop_unread_blocks(model: nn.Module) -> None:
    """Drops the blocks behind the last feature map, which these classes of timm keep and compute.

    They cost time, and DDP takes parameters without a gradient for an error.
    """
    if isinstance(model, (EfficientNetFeatures, MobileNetV3Features)):
        last = max(info["stage"] for info in model.feature_info.get_dicts())
        model.blocks = model.blocks[:last]


def _create_backbone(backbone: BackboneConfig, paper: bool) -> nn.Module:
    name, out_indices = backbone.backbone, backbone.out_indices
    if backbone.model_type == "resnet":
        name, out_indices = _timm_resnet(backbone)
    elif not timm.is_model(name):
        raise ValueError(f"backbone: expected the name of a timm model, got {name!r}")
    if paper and backbone.model_type != "resnet":
        out_indices = _available_indices(name, out_indices)
    kwargs = {}
    if backbone.output_stride is not None:
        kwargs["output_stride"] = backbone.output_stride
    return timm.create_model(
        name,
        pretrained=bool(backbone.use_pretrained_backbone),
        features_only=True,
        in_chans=backbone.num_channels,
        out_indices=tuple(out_indices),
        **kwargs,
    )


def _available_indices(name: str, out_indices: list[int]) -> list[int]:
    """The default `[1, 2, 3, 4]` counts a stem that ConvNeXt-like backbones do not report."""
    if list(out_indices) != [1, 2, 3, 4]:
        return out_indices
    with torch.device("meta"):
        stages = len(timm.create_model(name, pretrained=False, features_only=True).feature_info)
    return [index + stages - 5 for index in out_indices] if stages == 4 else out_indices


def _timm_resnet(backbone: BackboneConfig) -> tuple[str, list[int]]:
    """Maps transformers' own ResNet onto the timm model that its weights fit."""
    expansion = 4 if backbone.layer_type == "bottleneck" else 1
    standard = {
        "embedding_size": 64,
        "hidden_sizes": [width * expansion for width in (64, 128, 256, 512)],
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
    }
    for field, expected in standard.items():
        if (got := getattr(backbone, field)) != expected:
            raise ValueError(
                f"backbone_config.{field}: expected {expected!r} (timm's ResNet), got {got!r}"
            )
    name = _RESNETS.get((backbone.layer_type, tuple(backbone.depths)))
    if name is None:
        raise ValueError(
            f"backbone_config.depths: expected one of {[list(k[1]) for k in _RESNETS]}, "
            f"of a layer type timm has, got {list(backbone.depths)} {backbone.layer_type!r}"
        )
    stages = ["stem", "stage1", "stage2", "stage3", "stage4"]
    names = backbone.out_features or ["stage4"]
    return name, [stages.index(stage) for stage in names]
