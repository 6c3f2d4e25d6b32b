"""A model's inference as one module of its own: weights prepared, constants kept by map size."""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdetr_fast.common import cuda_graphs
from cdetr_fast.inference.backbone import InferenceBackbone
from cdetr_fast.inference.convolution import FusedConv2d
from cdetr_fast.inference.int8 import Int8Conv2d, quantize
from cdetr_fast.inference.transformer import (
    HOLDERS,
    InferenceDecoder,
    InferenceEncoder,
    InferenceHeads,
    MapConstants,
)
from cdetr_fast.models.modeling import queries_above


class _Parts(NamedTuple):
    """What heads read: maps fine to coarse, the coarsest projected, its mask, and the states."""

    maps: list[Tensor]
    projected: Tensor
    key_mask: Tensor | None
    memory: Tensor
    last: Tensor
    intermediate: Tensor | None


PREPARED = (FusedConv2d, *HOLDERS)
MAPS_KEPT = 8
"""Map sizes whose constants are kept: 22 MiB each at 800x1066 in fp32."""


class Engine(nn.Module):
    """Computes what a model computes, from images to predictions.

    Args:
        model: One of this package's models, in eval mode. It is not changed; weights that are
            neither folded nor joined are shared with it.
        int8_calibration: Batches of images `[B, C, H, W]`; with them the backbone is put into int8.
    """

    def __init__(self, model: nn.Module, int8_calibration: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.int8: str | None = None
        with torch.inference_mode(False), torch.no_grad():
            self._prepare(model)
            if int8_calibration:
                self.int8 = quantize(self.backbone, int8_calibration)
        self.eval()
        self._lock = threading.Lock()
        self._constants: OrderedDict[tuple, MapConstants] = OrderedDict()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.input_projection.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.input_projection.weight.device

    @property
    def num_channels(self) -> int:
        """Channels of the images."""
        return self._base.backbone.num_channels

    def kept_constants(self) -> list[MapConstants]:
        """The constants of map sizes that are kept now."""
        with self._lock:
            return list(self._constants.values())

    def check(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> None:
        """Refuses images as the model's own forward does."""
        self._base._check_images(pixel_values, pixel_mask)
        if pixel_values.device != self.device:
            raise ValueError(
                f"pixel_values: expected {self.device} as the model, got {pixel_values.device}"
            )

    def describe(self) -> list[tuple[str, str]]:
        """What was done, and to what."""
        ways = [m.way for m in self.modules() if isinstance(m, (FusedConv2d, Int8Conv2d))]
        rows = [("int8", self.int8)] if self.int8 else []
        rows += [
            (
                "backbone",
                f"{self.backbone.fused} convolutions with norm and epilogue folded in, "
                f"channels-last; {', '.join(f'{ways.count(w)} {w}' for w in sorted(set(ways)))}",
            ),
            ("encoder", f"{len(self.encoder.layers)} layers, one product for q, k and v"),
            (
                "decoder",
                f"{len(self.decoder.after)} layers; the first up to its cross-attention is a "
                "constant; memory and positions projected for all layers at once",
            ),
            ("map sizes kept", ", ".join(f"{h}x{w}" for h, w in self._constants) or "none yet"),
        ]
        return rows + [("not done", note) for note in self.backbone.notes]

    @torch.no_grad()
    def take(self, other: "Engine") -> bool:
        """Takes over the values of another engine, if it has tensors of the same kinds.

        The tensors stay the same ones, so what was compiled with them stays right.
        """
        if (
            self.int8 or other.int8
        ):  # ranges and packed weights are no tensors that can be copied to
            return False
        settings = [(e.decoder.auxiliary, e.decoder.feeds_normed_state) for e in (self, other)]
        here, there = (dict(_tensors(engine)) for engine in (self, other))
        if settings[0] != settings[1] or here.keys() != there.keys():
            return False
        for name, (tensor, is_own) in here.items():
            new = there[name][0]
            if _kind(tensor) != _kind(new) or not (is_own or tensor.data_ptr() == new.data_ptr()):
                return False
        with self._lock:
            for name, (tensor, is_own) in here.items():
                if is_own:
                    tensor.copy_(there[name][0])
            self._constants.clear()
        return True

    def _prepare(self, model: nn.Module) -> None:
        name = type(model).__name__
        detector = model.conditional_detr if name == "ConditionalDetrForSegmentation" else model
        base = model if name == "ConditionalDetrModel" else detector.model
        config = model.config
        self.__dict__["_base"] = base  # for its checks; its weights are not the engine's
        has_masks = name == "ConditionalDetrForSegmentation"
        self.backbone = InferenceBackbone(base.backbone.model, all_maps=has_masks)
        self.input_projection = FusedConv2d(base.input_projection, None)
        self.input_projection.choose_way()
        self.position_embedding = base.position_embedding
        self.encoder = InferenceEncoder(base.encoder)
        self.decoder = InferenceDecoder(
            base.decoder,
            base.query_position_embeddings.weight[None],
            auxiliary=config.auxiliary_loss,
            feeds_normed_state=config.auxiliary_loss and config.compat == "transformers",
        )
        self._compat = config.compat
        self.heads = self.mask_attention = self.mask_head = None
        if name != "ConditionalDetrModel":
            is_offset = name == "ConditionalDetrForObjectDetection" or config.compat == "paper"
            points = self.decoder.reference_points if is_offset else None
            self.heads = InferenceHeads(detector, points)
        if has_masks:
            self.mask_attention, self.mask_head = model.bbox_attention, model.mask_head

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None,
        constants: MapConstants | None = None,
    ) -> dict[str, Tensor]:
        """Runs the model.

        Args:
            pixel_values: `[B, C, H, W]`.
            pixel_mask: `[B, H, W]`, nonzero = image; None if nothing is padded.
            constants: Those of the map's size, if they are not to be looked up.

        Returns:
            The output's fields by name, those that are not None.
        """
        parts = self._decode(pixel_values, pixel_mask, constants)
        output = {}
        if self.heads is not None:
            output["logits"], output["pred_boxes"] = self.heads(parts.last)
        if self.mask_head is not None:
            output["pred_masks"] = self._masks(parts.last, parts)
        output["last_hidden_state"] = parts.last
        output["encoder_last_hidden_state"] = parts.memory
        if self.heads is None:
            if parts.intermediate is not None:
                output["intermediate_hidden_states"] = parts.intermediate
            points = self.decoder.reference_points.transpose(0, 1)
            output["reference_points"] = points.expand(-1, len(pixel_values), -1)
        return output

    def forward_above(
        self, pixel_values: Tensor, pixel_mask: Tensor | None, threshold: float
    ) -> dict[str, Tensor]:
        """As `ConditionalDetrForSegmentation.forward_above`."""
        parts = self._decode(pixel_values, pixel_mask, None)
        logits, pred_boxes = self.heads(parts.last)
        queries = queries_above(logits, threshold, self._compat)
        logits, pred_boxes, states = (
            x.take_along_dim(queries, dim=1) for x in (logits, pred_boxes, parts.last)
        )
        if queries.shape[1]:
            pred_masks = self._masks(states, parts)
        else:
            pred_masks = logits.new_zeros(len(logits), 0, *parts.maps[0].shape[-2:])
        return {"logits": logits, "pred_boxes": pred_boxes, "pred_masks": pred_masks}

    def _decode(
        self, pixel_values: Tensor, pixel_mask: Tensor | None, constants: MapConstants | None
    ) -> "_Parts":
        """Everything up to the decoder's states."""
        maps = self.backbone(pixel_values)
        projected = self.input_projection(maps[-1])
        mask = key_mask = None
        if pixel_mask is not None:
            mask = F.interpolate(pixel_mask[:, None].float(), size=projected.shape[-2:])[:, 0] > 0
            key_mask = mask.flatten(1)
        if constants is None:
            constants = self.constants_of(maps[-1], mask, pixel_values.dtype)
        x = projected.permute(0, 2, 3, 1).flatten(1, 2)  # [B, S, C], a view: channels are last
        memory = self.encoder(x, constants, key_mask)
        return _Parts(maps, projected, key_mask, memory, *self.decoder(memory, constants, key_mask))

    def _masks(self, states: Tensor, parts: "_Parts") -> Tensor:
        """Mask logits `[B, q, H/4, W/4]` of decoder states `[B, q, C]`."""
        attention = self.mask_attention(states, parts.memory, parts.key_mask)
        size = parts.projected.shape[-2:]
        return self.mask_head(parts.projected, attention.unflatten(-1, size), parts.maps[2::-1])

    @torch.no_grad()
    def constants_for_images(self, size: tuple[int, int]) -> MapConstants:
        """The constants for unpadded images of a height and width."""
        image = torch.zeros(1, self.num_channels, *size, device=self.device, dtype=self.dtype)
        return self.constants_of(self.backbone(image)[-1], None, self.dtype)

    def constants_of(
        self, feature_map: Tensor, mask: Tensor | None, dtype: torch.dtype
    ) -> MapConstants:
        """What the position code gives, kept by map size where nothing is padded."""
        if mask is not None or torch.compiler.is_compiling() or cuda_graphs.is_capturing():
            return self._make_constants(feature_map, mask, dtype)
        size = tuple(feature_map.shape[-2:])
        with self._lock:
            found = self._constants.get(size)
            if found is None:
                with torch.inference_mode(False), torch.no_grad():
                    found = self._make_constants(feature_map, None, dtype)
                self._constants[size] = found
                if len(self._constants) > MAPS_KEPT:
                    self._constants.popitem(last=False)
            self._constants.move_to_end(size)
        return found

    def _make_constants(
        self, feature_map: Tensor, mask: Tensor | None, dtype: torch.dtype
    ) -> MapConstants:
        position = self.position_embedding(feature_map, mask, dtype)
        height, width = feature_map.shape[-2:]
        biases = rows = columns = keys = None
        if mask is None:
            biases = tuple(layer.position_bias(position) for layer in self.encoder.layers)
        if mask is None or _is_rectangular(mask):
            # Both codes, sine and learned, are a code of the row beside a code of the column.
            grid = position.unflatten(1, (height, width))
            rows = self.decoder.project_position(grid[:, :, 0])
            columns = self.decoder.project_position(grid[:, 0])
            columns = columns - rows[:, :1]
        else:
            keys = self.decoder.project_position(position)
        return MapConstants(position, biases, rows, columns, keys)


def _is_rectangular(mask: Tensor) -> bool:
    """Whether the unpadded part of each map is a rectangle at its top left, where that can be seen.

    Then the position code of an unpadded position is that of its row and that of its column. A GPU
    is not asked, as that would synchronise.
    """
    if mask.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    values = mask.numpy()
    return bool((values == (values[:, :, :1] & values[:, :1])).all())


def _tensors(engine: Engine) -> Iterator[tuple[str, tuple[Tensor, bool]]]:
    """Name, tensor, and whether the engine made the tensor; the others are the model's."""
    for prefix, module in engine.named_modules():
        for name, tensor in module.named_parameters(prefix, recurse=False):
            yield name, (tensor, False)
        for name, tensor in module.named_buffers(prefix, recurse=False):
            yield name, (tensor, isinstance(module, PREPARED))


def _kind(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.dtype, tensor.device
