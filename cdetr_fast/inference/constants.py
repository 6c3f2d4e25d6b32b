"""Constants: everything that no image changes, computed once.

Replaces: the position code of unpadded maps, and what modules project it to, by values kept for
each map size; the decoder up to its first cross-attention, the reference points and their sine code
by constants of the parameters.

Gains: about 40 operators per call, and the products of the position code with the projections of
all encoder and decoder layers.
"""

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cdetr_fast.common.cuda_graphs import current_stream, is_capturing
from cdetr_fast.models.attention import ConditionalDetrDecoderCrossAttention
from cdetr_fast.models.decoder import ConditionalDetrDecoder, ConditionalDetrDecoderLayer
from cdetr_fast.models.heads import box_origins
from cdetr_fast.models.known import become, known
from cdetr_fast.models.modeling import ConditionalDetrForObjectDetection, ConditionalDetrModel
from cdetr_fast.models.position import MapPosition
from cdetr_kernels import sine_query

MAP_SIZES_KEPT = 8
"""Map sizes whose constants are kept: 22 MiB each at 800x1066 in fp32."""

Constant = TypeVar("Constant")


@dataclass(frozen=True, eq=False)
class KeptPosition(MapPosition):
    """Position code of a map size, with what modules have computed from it alone."""

    _constants: dict[nn.Module, Any] = field(default_factory=dict)

    def constant(self, module: nn.Module, compute: Callable[[MapPosition], Constant]) -> Constant:
        """Return what `compute` gives for this position, computed in the module's first call."""
        if module in self._constants:
            return self._constants[module]
        if is_capturing():
            return compute(self)
        with torch.inference_mode(False), torch.no_grad():
            return self._constants.setdefault(module, compute(self))


class PositionCache:
    """Positions of the map sizes that were used last.

    Each stream of a GPU has its own, as another one may read them before they are computed, or when
    their memory is in use again.
    """

    def __init__(self) -> None:
        self._positions: OrderedDict[tuple[tuple[int, int], object], KeptPosition] = OrderedDict()
        self._lock = threading.Lock()

    def get(
        self, size: tuple[int, int], device: torch.device, make: Callable[[], MapPosition]
    ) -> KeptPosition:
        """Return the position of a map of a height and width, made in its first call."""
        key = size, current_stream(device)
        with self._lock:
            found = self._positions.get(key)
            if found is None:
                with torch.inference_mode(False), torch.no_grad():
                    made = make()
                found = KeptPosition(made.code, made.rows, made.columns)
                if is_capturing():  # its values would be those of the graph's replays
                    return found
                self._positions[key] = found
                if len(self._positions) > MAP_SIZES_KEPT:
                    self._positions.popitem(last=False)
            self._positions.move_to_end(key)
        return found

    def clear(self) -> None:
        with self._lock:
            self._positions.clear()

    def values(self) -> list[KeptPosition]:
        with self._lock:
            return list(self._positions.values())

    def sizes(self) -> list[tuple[int, int]]:
        with self._lock:
            return list(dict.fromkeys(size for size, _ in self._positions))


class ModelWithKeptPositions(ConditionalDetrModel):
    """Keeps the position codes of unpadded maps.

    Attributes:
        positions: The kept ones.
        fixed_position: The only position that will be needed, if the size of images is fixed; then
            exported graphs hold it as a constant.
    """

    positions: PositionCache
    fixed_position: KeptPosition | None

    def map_position(
        self, feature_map: Tensor, mask: Tensor | None, dtype: torch.dtype
    ) -> MapPosition:
        if mask is None and self.fixed_position is not None:
            return self.fixed_position
        if mask is not None or torch.compiler.is_compiling():
            return super().map_position(feature_map, mask, dtype)
        height, width = feature_map.shape[-2:]
        make = functools.partial(super().map_position, feature_map, None, dtype)
        return self.positions.get((height, width), feature_map.device, make)


def keep_positions(model: ConditionalDetrModel) -> ModelWithKeptPositions:
    """Make a model keep the position codes of unpadded maps, in place; return it."""
    result = become(model, ModelWithKeptPositions)
    result.positions, result.fixed_position = PositionCache(), None
    return result


class FirstCrossAttention(ConditionalDetrDecoderCrossAttention):
    """Cross-attention of the first layer with constant queries `[1, Q, N, D]`."""

    content: Tensor
    spatial: Tensor

    def project_queries(
        self, hidden_states: Tensor, query_sine: Tensor, query_position: Tensor
    ) -> tuple[Tensor, ...]:
        return self.content, self.spatial


class FirstDecoderLayer(ConditionalDetrDecoderLayer):
    """First decoder layer with a constant state `[1, Q, C]` after self-attention."""

    state: Tensor

    def attend_to_queries(self, *_: Any) -> tuple[Tensor, None]:
        return self.state, None


class DecoderWithKeptPrefix(ConditionalDetrDecoder):
    """Decoder whose first steps are constants.

    Attributes:
        points: Reference points `[1, Q, 2]`.
        sine: Their sine code `[1, Q, C]`, in fp32 at least.
    """

    points: Tensor
    sine: Tensor

    def initial_state(self, query_position: Tensor, batch: int, dtype: torch.dtype) -> Tensor:
        # This is all that the first layer makes of any initial state.
        return known(self.layers[0], FirstDecoderLayer).state

    def reference_points(self, query_position: Tensor) -> Tensor:
        return self.points

    def query_sine(self, reference_points: Tensor, hidden_states: Tensor, layer: int) -> Tensor:
        if layer == 0:
            return self.sine
        return (self.sine * self.query_scale(hidden_states)).to(hidden_states.dtype)


def keep_prefix(decoder: ConditionalDetrDecoder, query_position: Tensor) -> DecoderWithKeptPrefix:
    """Replace the image-independent beginning of a plain decoder, in place; return it.

    Args:
        decoder: The decoder.
        query_position: Object-query embedding `[1, Q, C]`.
    """
    first = known(decoder.layers[0], ConditionalDetrDecoderLayer)
    cross = first.encoder_attn
    points = decoder.reference_points(query_position)
    channels = query_position.shape[-1]
    zeros = torch.zeros_like(query_position)
    state, _ = first.attend_to_queries(zeros, query_position, None, False, True)
    sine = sine_query(points, channels, dtype=query_position.dtype)
    content, spatial = cross.project_queries(state, sine, query_position)
    result = become(decoder, DecoderWithKeptPrefix)
    result.register_buffer("points", points)
    code_dtype = torch.promote_types(query_position.dtype, torch.float32)
    result.register_buffer("sine", sine_query(points, channels, dtype=code_dtype))
    first.__class__ = FirstDecoderLayer
    first.register_buffer("state", state.expand_as(query_position).contiguous())
    cross.__class__ = FirstCrossAttention
    cross.register_buffer("content", content.contiguous())
    cross.register_buffer("spatial", spatial.contiguous())
    return result


class DetectorWithKeptOrigins(ConditionalDetrForObjectDetection):
    """Detector whose boxes start from constant reference points, `origins` `[1, Q, 4]`."""

    origins: Tensor

    def box_origins(self, reference_points: Tensor) -> Tensor:
        return self.origins


def keep_box_origins(detector: ConditionalDetrForObjectDetection) -> None:
    """Make a detector whose decoder has a kept prefix keep the origins of its boxes, in place."""
    origins = box_origins(known(detector.model.decoder, DecoderWithKeptPrefix).points)
    detector.__class__ = DetectorWithKeptOrigins
    detector.register_buffer("origins", origins)
