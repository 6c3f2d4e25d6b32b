"""The ResNet of transformers, of any width and depth, under transformers' names of weights."""

from collections.abc import Iterable

from torch import Tensor, nn

from cdetr_fast.checkpoints.key_maps import HF_RESNET_TABLE, StateDict, inverse, rename_keys
from cdetr_fast.common.validation import refuse
from cdetr_fast.config.backbone import BackboneConfig
from cdetr_fast.models.activations import ACTIVATIONS
from cdetr_fast.models.feature_maps import FeatureBackbone


class _ConvLayer(nn.Module):
    """Convolution, norm and activation."""

    def __init__(
        self, inputs: int, outputs: int, kernel_size: int, stride: int, activation: str
    ) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(
            inputs, outputs, kernel_size, stride, padding=kernel_size // 2, bias=False
        )
        self.normalization = nn.BatchNorm2d(outputs)
        self.activation = _activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.normalization(self.convolution(x)))


class _Shortcut(nn.Module):
    """Projection of a residual to other channels or half the size."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, kernel_size=1, stride=stride, bias=False)
        self.normalization = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.normalization(self.convolution(x))


class _Block(nn.Module):
    """Residual block of two (basic) or three (bottleneck) convolutions."""

    def __init__(self, config: BackboneConfig, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        plain = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if plain else _Shortcut(inputs, outputs, stride)
        act = "relu"  # transformers applies `hidden_act` to the stem and behind the sum alone
        if config.layer_type == "bottleneck":
            narrow = outputs // 4
            first, second = (stride, 1) if config.downsample_in_bottleneck else (1, stride)
            self.layer = nn.Sequential(
                _ConvLayer(inputs, narrow, 1, first, act),
                _ConvLayer(narrow, narrow, 3, second, act),
                _ConvLayer(narrow, outputs, 1, 1, "linear"),
            )
        else:
            self.layer = nn.Sequential(
                _ConvLayer(inputs, outputs, 3, stride, act),
                _ConvLayer(outputs, outputs, 3, 1, "linear"),
            )
        self.activation = _activation(config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        result = self.layer(x)
        result += self.shortcut(x)
        return self.activation(result)


class _Stage(nn.Module):
    def __init__(
        self, config: BackboneConfig, inputs: int, outputs: int, stride: int, depth: int
    ) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _Block(config, inputs, outputs, stride),
            *(_Block(config, outputs, outputs, 1) for _ in range(depth - 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class _Embeddings(nn.Module):
    """Stem: a convolution and a pooling, each of stride 2."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.embedder = _ConvLayer(
            config.num_channels, config.embedding_size, 7, 2, config.hidden_act
        )
        self.pooler = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.pooler(self.embedder(pixel_values))


class _Encoder(nn.Module):
    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        inputs = [config.embedding_size, *config.hidden_sizes]
        strides = [2 if config.downsample_in_first_stage else 1] + [2] * (len(config.depths) - 1)
        self.stages = nn.ModuleList(
            _Stage(config, *sizes)
            for sizes in zip(inputs, config.hidden_sizes, strides, config.depths, strict=False)
        )


class ResNetBackbone(nn.Module):
    """ResNet that returns feature maps.

    Args:
        config: Of `model_type="resnet"`.

    Source: transformers' models/resnet/modeling_resnet.py.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        stages = config.stage_names or []
        outputs = config.out_features or stages[-1:]
        self.outputs = [stages.index(name) for name in outputs]
        self.embedder = _Embeddings(config)
        self.encoder = _Encoder(config)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """Return feature maps of images `[B, num_channels, H, W]`, fine to coarse."""
        maps = [self.embedder(pixel_values)]
        for stage in list(self.encoder.stages)[: max(self.outputs)]:
            maps.append(stage(maps[-1]))
        return [maps[index] for index in self.outputs]


def _activation(name: str) -> nn.Module:
    # In place, training keeps no second copy of the largest maps.
    return nn.ReLU(inplace=True) if name == "relu" else ACTIVATIONS[name]()


def build_resnet(config: BackboneConfig) -> FeatureBackbone:
    """Return the ResNet of a configuration, with timm's ImageNet weights if it asks for some.

    Raises:
        ValueError: It asks for pretrained weights, and timm has no ResNet of these sizes.
    """
    module = ResNetBackbone(config)
    outputs = module.outputs
    if config.use_pretrained_backbone:
        module.load_state_dict(_weights_of_timm(config), strict=False)
    widths = [config.embedding_size, *config.hidden_sizes]
    parts = [module.embedder, *module.encoder.stages]
    early = parts[: 1 if config.downsample_in_first_stage else 2]
    names = {parameter: name for name, parameter in module.named_parameters()}

    def names_in(parts: Iterable[nn.Module]) -> frozenset[str]:
        return frozenset(names[p] for part in parts for p in part.parameters())

    unread = names_in(parts[max(outputs) + 1 :])
    return FeatureBackbone(
        module,
        channels=[widths[index] for index in outputs],
        early=names_in(early),
        unread_by_last=unread,
        unread=unread,
    )


# (layer_type, depths) -> the timm model with weights of the same sizes.
_TIMM_NAMES: dict[tuple[str, tuple[int, ...]], str] = {
    ("basic", (2, 2, 2, 2)): "resnet18",
    ("basic", (3, 4, 6, 3)): "resnet34",
    ("bottleneck", (2, 2, 2, 2)): "resnet26",
    ("bottleneck", (3, 4, 6, 3)): "resnet50",
    ("bottleneck", (3, 4, 23, 3)): "resnet101",
    ("bottleneck", (3, 8, 36, 3)): "resnet152",
}


def _weights_of_timm(config: BackboneConfig) -> StateDict:
    expansion = 4 if config.layer_type == "bottleneck" else 1
    widths = [width * expansion for width in (64, 128, 256, 512)]
    name = _TIMM_NAMES.get((config.layer_type, tuple(config.depths)))
    sizes = (config.embedding_size, config.hidden_sizes, config.hidden_act)
    strides = (config.downsample_in_first_stage, config.downsample_in_bottleneck)
    if name is None or sizes != (64, widths, "relu") or any(strides):
        refuse(
            "backbone_config.use_pretrained_backbone",
            f"False for a 'resnet' of other sizes than {sorted(_TIMM_NAMES.values())} of timm",
            True,
        )
    import timm

    source = timm.create_model(
        name, pretrained=True, features_only=True, in_chans=config.num_channels
    )
    prefix = "backbone.model."
    weights = {prefix + key: tensor for key, tensor in source.state_dict().items()}
    weights = rename_keys(weights, inverse(HF_RESNET_TABLE))
    return {key.removeprefix(prefix): tensor for key, tensor in weights.items()}
