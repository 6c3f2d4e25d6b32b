"""A model prepared for inference: a copy that shares the weights, with parts replaced."""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cdetr_fast.inference.backbone import FusedBackbone
from cdetr_fast.inference.constants import (
    KeptPosition,
    ModelWithKeptPositions,
    keep_box_origins,
    keep_positions,
    keep_prefix,
)
from cdetr_fast.inference.convolution import FOLDABLE, FusedConv2d, can_fold
from cdetr_fast.inference.int8 import Int8Conv2d, quantize
from cdetr_fast.inference.int8_linear import quantize_feed_forward
from cdetr_fast.inference.joint import (
    join_decoder,
    join_decoder_self_attention,
    join_self_attention,
)
from cdetr_fast.inference.linear import FusedLinear, fuse_linears
from cdetr_fast.inference.plain import first_difference
from cdetr_fast.models.decoder import ConditionalDetrDecoder, ConditionalDetrDecoderLayer
from cdetr_fast.models.encoder import ConditionalDetrEncoder, ConditionalDetrEncoderLayer
from cdetr_fast.models.heads import ConditionalDetrMLPPredictionHead
from cdetr_fast.models.known import all_known, known
from cdetr_fast.models.modeling import (
    ConditionalDetrForObjectDetection,
    ConditionalDetrForSegmentation,
    ConditionalDetrModel,
)
from cdetr_fast.models.projections import is_plain, is_plain_linear
from cdetr_fast.models.residual import ResidualLayerNorm

_OPEN = torch.export.Dim.DYNAMIC
OPEN_SHAPES = ({0: _OPEN, 2: _OPEN, 3: _OPEN}, {0: _OPEN, 1: _OPEN, 2: _OPEN})
"""Dimensions of images, and of a mask, that exported graphs leave open."""


class PreparedModel(nn.Module):
    """Computes what a model computes, from images to tensors by name.

    Args:
        model: One of this package's models, in eval mode. It is not changed; weights that are
            neither folded nor joined are shared with it.
        int8_calibration: Batches of images `[B, C, H, W]`; with them the backbone and the
            feed-forward blocks are put into int8.

    Attributes:
        model: A copy of the same class, or of a class derived from it, with parts replaced.
    """

    def __init__(self, model: nn.Module, int8_calibration: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.int8: str | None = None
        self._left: list[str] = []
        # Constants are computed and operators tried here, in the weights' dtype.
        with torch.inference_mode(False), torch.no_grad(), without_autocast(model):
            self.model = shallow_copy(model)
            self._replace_parts(int8_calibration)
            self.model.eval()
            if int8_calibration:
                self._quantize_feed_forward(int8_calibration)
        shared = {tensor.data_ptr() for _, tensor in named_tensors(model)}
        self._own = {name for name, x in named_tensors(self.model) if x.data_ptr() not in shared}

    @property
    def detector(self) -> ConditionalDetrForObjectDetection | None:
        """The part with class and box heads; None if the model has none."""
        if isinstance(self.model, ConditionalDetrForSegmentation):
            return self.model.conditional_detr
        return self.model if isinstance(self.model, ConditionalDetrForObjectDetection) else None

    @property
    def base(self) -> ModelWithKeptPositions:
        """The part below the heads."""
        return known(self._unprepared_base, ModelWithKeptPositions)

    @property
    def _unprepared_base(self) -> ConditionalDetrModel:
        return known(
            self.model if self.detector is None else self.detector.model, ConditionalDetrModel
        )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.base.input_projection.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.base.input_projection.weight.device

    @property
    def num_channels(self) -> int:
        """Channels of the images."""
        return self.base.backbone.num_channels

    def _replace_parts(self, int8_calibration: Sequence[Tensor]) -> None:
        base = keep_positions(self._unprepared_base)
        has_masks = isinstance(self.model, ConditionalDetrForSegmentation)
        source = base.backbone.model
        if int8_calibration and self.dtype != torch.float32:
            source = copy.deepcopy(source).float()  # norms are folded, and scales found, in fp32
        backbone = FusedBackbone(source, all_maps=has_masks)
        self._left += backbone.notes
        if int8_calibration:
            self.int8 = quantize(backbone, int8_calibration, self.dtype)
        base.backbone.model = backbone
        if is_plain(base.input_projection, *FOLDABLE) and can_fold(base.input_projection):
            projection = FusedConv2d(base.input_projection, None)
            projection.choose_implementation()
            base.register_module("input_projection", projection)
        else:
            self._leave("input_projection", base.input_projection)
        self._prepare_encoder(base.encoder)
        has_prefix = self._prepare_decoder(base)
        if self.detector is not None:
            self._prepare_heads(self.detector, has_prefix)

    def _quantize_feed_forward(self, images: Sequence[Tensor]) -> None:
        def run(batch: Tensor) -> None:
            self(batch.to(self.dtype), None)

        count = quantize_feed_forward(self.model, run, images)
        self.base.positions.clear()  # those of the images
        self.int8 = f"{self.int8}; {count} feed-forward blocks"

    def _prepare_encoder(self, encoder: ConditionalDetrEncoder) -> None:
        difference = first_difference(encoder, ConditionalDetrEncoder, self.model.config)
        if difference is None:
            for layer in all_known(encoder.layers, ConditionalDetrEncoderLayer):
                join_self_attention(layer.self_attn)
            fuse_norms(encoder)
        else:
            self._left.append(f"encoder: {difference}")
        fuse_linears(encoder)

    def _prepare_decoder(self, base: ModelWithKeptPositions) -> bool:
        decoder = base.decoder
        difference = first_difference(decoder, ConditionalDetrDecoder, self.model.config)
        if difference is None and not is_plain(base.query_position_embeddings, nn.Embedding):
            kind = type(base.query_position_embeddings).__name__
            difference = f"query_position_embeddings is a {kind}"
        if difference is not None:
            self._left.append(f"decoder: {difference}")
            _compute_in_fp32(decoder.ref_point_head)
            fuse_linears(decoder)
            return False
        query_position = base.query_position_embeddings.weight[None]
        join_decoder(keep_prefix(decoder, query_position))
        first, *others = all_known(decoder.layers, ConditionalDetrDecoderLayer)
        for layer in others:
            join_decoder_self_attention(layer.self_attn, query_position)
        # What only the constants needed.
        del first.self_attn, first.self_attn_layer_norm, decoder.ref_point_head
        fuse_norms(decoder)
        fuse_linears(decoder)
        return True

    def _prepare_heads(self, detector: ConditionalDetrForObjectDetection, has_prefix: bool) -> None:
        kinds = (nn.Linear, nn.ReLU, nn.ModuleList, ConditionalDetrMLPPredictionHead)
        for name in ("class_labels_classifier", "bbox_predictor"):
            for path, module in getattr(detector, name).named_modules(prefix=name):
                if not is_plain(module, *kinds):
                    self._leave(path, module)
                    break
        if has_prefix:
            keep_box_origins(detector)
        _compute_in_fp32(detector.bbox_predictor)
        fuse_linears(detector.bbox_predictor)
        parent = nn.ModuleList([detector.class_labels_classifier])  # the detector is no part of it
        fuse_linears(parent)
        detector.register_module("class_labels_classifier", parent[0])

    def _leave(self, name: str, module: nn.Module) -> None:
        self._left.append(f"{name} is a {type(module).__name__}, which runs as it is")

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> dict[str, Tensor]:
        """Run the model.

        Args:
            pixel_values: `[B, C, H, W]`.
            pixel_mask: `[B, H, W]`, nonzero = image; None if nothing is padded.

        Returns:
            The fields of the output that are not None, by name.
        """
        return outputs_of(self.model, pixel_values, pixel_mask)

    def check_images(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> None:
        """Refuse images as the model's own forward does."""
        self.base.check_images(pixel_values, pixel_mask)
        if pixel_values.device != self.device:
            raise ValueError(
                f"pixel_values: expected {self.device} as the model, got {pixel_values.device}; "
                "move the images"
            )

    def constants(self) -> list[KeptPosition]:
        """Return the constants of the map sizes that are kept now."""
        return self.base.positions.values()

    @torch.no_grad()
    def fix_image_size(self, height: int, width: int) -> None:
        """Take unpadded images of one size only from now on, whose constants graphs may hold."""
        images = torch.zeros(
            1, self.num_channels, height, width, device=self.device, dtype=self.dtype
        )
        self.base.positions.clear()
        self(images, None)
        (self.base.fixed_position,) = self.constants()

    def join_attention(self) -> None:
        """Concatenate the halves of attention from now on: a product that OpenVINO fuses."""
        self.model.config._attn_implementation = "sdpa"  # of the copy alone

    def describe(self) -> list[tuple[str, str]]:
        """Return rows of what was done, and what was left with the reason."""
        convolutions = [m for m in self.modules() if isinstance(m, (FusedConv2d, Int8Conv2d))]
        kinds = [conv.implementation for conv in convolutions]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
        base, left = self.base, {note.partition(":")[0] for note in self._left}
        rows = [("int8", self.int8)] if self.int8 else []
        rows.append(
            (
                "backbone",
                f"{base.backbone.model.fused} convolutions with norm and epilogue folded in, "
                f"channels-last; {counts}",
            )
        )
        if "encoder" not in left:
            layers = len(base.encoder.layers)
            rows.append(("encoder", f"{layers} layers, one product for q, k and v"))
        if "decoder" not in left:
            rows.append(
                (
                    "decoder",
                    f"{len(base.decoder.layers)} layers; the first up to its cross-attention is a "
                    "constant; memory and positions projected for all layers at once",
                )
            )
        sizes = base.positions.sizes()
        rows.append(("map sizes kept", ", ".join(f"{h}x{w}" for h, w in sizes) or "none yet"))
        return rows + [("not done", note) for note in self._left]

    @torch.no_grad()
    def take_values(self, other: "PreparedModel") -> bool:
        """Take over the values of another prepared model, if it has tensors of the same kinds.

        The tensors stay the same ones, so graphs compiled with them stay right.
        """
        if self.int8 or other.int8:  # ranges and packed weights are not tensors to copy into
            return False
        configs = [self.model.config, other.model.config]
        settings = [(config.auxiliary_loss, config.compat) for config in configs]
        ours, theirs = dict(named_tensors(self.model)), dict(named_tensors(other.model))
        if settings[0] != settings[1] or ours.keys() != theirs.keys():
            return False
        for name, tensor in ours.items():
            new = theirs[name]
            alike = (tensor.shape, tensor.dtype, tensor.device) == (
                new.shape, new.dtype, new.device
            )  # fmt: skip
            if not alike or (name not in self._own and tensor.data_ptr() != new.data_ptr()):
                return False
        for name in self._own:
            ours[name].copy_(theirs[name])
        for module in self.modules():
            if isinstance(module, FusedLinear):
                module.unpack()  # writes through `.data` count no version
        self.base.positions.clear()
        return True


def outputs_of(
    model: nn.Module, pixel_values: Tensor, pixel_mask: Tensor | None
) -> dict[str, Tensor]:
    """Return what a model predicts, by name, whatever else its configuration asks for."""
    left_out = {"output_attentions": False, "output_hidden_states": False}
    return dict(model(pixel_values, pixel_mask, return_dict=True, **left_out))


def without_autocast(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Return a context without the autocast of a model's device."""
    device = next(model.parameters()).device.type
    if not torch.amp.is_autocast_available(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


def shallow_copy(model: nn.Module, alias: bool = False, without: Sequence[str] = ()) -> Any:
    """Copy the modules of a model, but not the memory of its tensors.

    Args:
        model: The model.
        alias: Make other tensors of the same memory, instead of using the same ones.
        without: Attributes of the model that the copy does not have.
    """
    memo: dict[int, Any] = {id(getattr(model, name)): None for name in without}
    for _, tensor in named_tensors(model):
        copied = tensor
        if alias:
            copied = tensor.detach()  # counts the same writes
            if isinstance(tensor, nn.Parameter):
                # Those made in inference mode cannot ask for gradients outside of it.
                requires_grad = tensor.requires_grad and not tensor.is_inference()
                copied = nn.Parameter(copied, requires_grad=requires_grad)
        memo[id(tensor)] = copied
    result = copy.deepcopy(model, memo)
    for name in without:
        delattr(result, name)
    return result


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield all parameters and buffers by name; shared ones by each of their names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def fuse_norms(part: nn.Module) -> None:
    """Make the layer norms inside a plain part add the residual, where the layer before does not.

    Gains: 29 launches and passes over memory less on GPUs (6 + 6 layers).
    """
    for module in part.modules():
        if isinstance(module, nn.LayerNorm) and type(module) is nn.LayerNorm:
            module.__class__ = ResidualLayerNorm


def _compute_in_fp32(head: nn.Module) -> None:
    """Convert the weights of a plain head that computes in fp32 once, not in each call."""
    if not (is_plain(head, ConditionalDetrMLPPredictionHead) and head.fp32):
        return
    for index, layer in enumerate(head.layers):
        if is_plain_linear(layer) and layer.weight.dtype in (torch.bfloat16, torch.float16):
            head.layers[index] = copy.deepcopy(layer).float()
