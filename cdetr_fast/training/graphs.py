"""Training by CUDA graphs: forward and backward of the model, one pair per shape of batches.

A pair of graphs holds what the model and its heads compute from images and mask, and the way back
to the parameters; matching and loss stay outside, between the two, as they may need the host.

- The capture differentiates by aliases of the parameters. The parameters' own nodes of autograd may
  belong to another stream (DDP makes and keeps them), which a capture must not touch.
- Gradients are copied out. A graph leaves them at the same addresses in each replay, and autograd
  would take those for `.grad`: the next batch of an accumulated step would overwrite the sum.
- All graphs share a pool of memory, so each backward pass has to come before the next forward pass,
  and comes once; anything else raises.
- Warm-up leaves the random numbers as they were, so that with dropout a replay draws what the model
  would have drawn without a graph.
- Autocast keeps no casts of weights, which a replay would find outdated, and ends before backward.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from cdetr_fast.common.cuda_graphs import GraphKey, GraphMemory, GraphTable, channels_last_copy
from cdetr_fast.models.modeling import ConditionalDetrForObjectDetection
from cdetr_fast.models.outputs import ConditionalDetrObjectDetectionOutput
from cdetr_fast.training.errors import DataError

logger = logging.getLogger(__name__)

EAGER_FIRST = 2
"""Batches of a shape that run without a graph before it gets one."""

LIMIT = 16
"""Graphs at most; each keeps gradients of all parameters, 170 MB for a ResNet-50 in fp32."""

_MAX_FAILURES = 3  # shapes that could not be captured, after which no other is tried
_WARM_UP = 3  # as torch.cuda.make_graphed_callables


def unmet_requirement(model: nn.Module) -> str | None:
    """Return what a model lacks to be trained by graphs, None if nothing."""
    if not isinstance(model, ConditionalDetrForObjectDetection):
        return f"a ConditionalDetrForObjectDetection, got {type(model).__name__}"
    if model.is_gradient_checkpointing:
        return "a model without gradient checkpointing"
    for name in ("encoder_layerdrop", "decoder_layerdrop"):
        if getattr(model.config, name) > 0:  # each step would need another graph
            return f"{name} 0, got {getattr(model.config, name)}"
    return None


def use_graphs(
    model: ConditionalDetrForObjectDetection, limit: int = LIMIT, eager_first: int = EAGER_FIRST
) -> TrainingGraphs:
    """Let a model's forward pass with labels run by graphs in training mode, in place.

    Before the first batch the model has to be on the current CUDA device, and train what it will
    train; its parameters and buffers keep their addresses from then on. Wrap it in DDP or autocast
    after this call. Outputs are the graphs' own memory, which the next batch overwrites, and have
    no hidden states. Calls with other arguments than images, mask, labels and `num_boxes` run
    without graphs, as do evaluation mode and `torch.no_grad`. Hooks of modules inside the model run
    at capture only.

    Args:
        model: The model; its `forward` is replaced.
        limit: Number of graphs to keep.
        eager_first: Batches of a shape that run without a graph before it gets one.

    Raises:
        DataError: The model cannot be trained by graphs.
    """
    reason = unmet_requirement(model)
    if reason is not None:
        raise DataError(f"cuda_graphs: expected {reason}")
    graphs = TrainingGraphs(model, limit, eager_first)
    plain = model.forward

    @functools.wraps(plain)
    def forward(
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: Any = None,
        num_boxes: Tensor | None = None,
        **others: Any,
    ) -> Any:
        predictions = None
        if labels is not None and not others and model.training and torch.is_grad_enabled():
            predictions = graphs(pixel_values, pixel_mask)
        if predictions is None:
            return plain(pixel_values, pixel_mask, labels=labels, num_boxes=num_boxes, **others)
        return ConditionalDetrObjectDetectionOutput(**model.score(predictions, labels, num_boxes))

    setattr(model, "forward", forward)  # noqa: B010 - a method is not to be assigned, says mypy
    return graphs


class TrainingGraphs:
    """The graphs of one model, captured as shapes come up.

    A shape that was seen more than `eager_first` times gets a graph. Once there are `limit` of
    them, it replaces the graph of the shape that was seen least, if it was seen twice as often: so
    rare shapes cannot push each other out for ever.

    Args:
        model: The model.
        limit: Number of graphs to keep.
        eager_first: Batches of a shape that run without a graph before it gets one.
    """

    def __init__(
        self, model: ConditionalDetrForObjectDetection, limit: int, eager_first: int
    ) -> None:
        self.eager_first = eager_first
        self.seen: Counter[GraphKey] = Counter()
        self.replays = 0
        self.table: GraphTable[_TrainingGraph] = GraphTable(limit)
        self._predictor = _Predictor(model)
        self._awaited: object | None = None  # the replay whose backward pass is to come

    def __call__(
        self, pixel_values: Tensor, pixel_mask: Tensor | None
    ) -> tuple[Tensor, ...] | None:
        """Return what `predict_layers` does, or None if this batch is to run without a graph."""
        device_type, dtype = pixel_values.device.type, pixel_values.dtype
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
        key = GraphKey(tuple(pixel_values.shape), dtype, pixel_mask is not None)
        self.seen[key] += 1
        images = (pixel_values,) if pixel_mask is None else (pixel_values, pixel_mask)
        graph = self.table.graphs.get(key) or self._capture(key, images)
        if graph is None:
            return None
        self._awaited, self.replays = object(), self.replays + 1
        parameters = self._predictor.trained.values()
        return _Replay.apply(self, self._awaited, graph, images, *parameters)

    def describe(self) -> list[tuple[str, str]]:
        """Return which shapes have graphs, and which do not, with the reason."""
        return self.table.describe()

    def finish(self, replay: object) -> None:
        """End a replay at its backward pass; RuntimeError if it was not the last one."""
        if replay is not self._awaited:
            raise RuntimeError(
                "cuda_graphs: the backward pass of a batch has to come once, and before the "
                "forward pass of the next one: graphs share memory, these gradients are wrong"
            )
        self._awaited = None

    def _capture(self, key: GraphKey, images: tuple[Tensor, ...]) -> _TrainingGraph | None:
        """Return a new graph; None if there is to be none, with a warning where it failed."""
        table, seen = self.table, self.seen
        if seen[key] <= self.eager_first or key in table.failures:
            return None
        if len(table.failures) >= _MAX_FAILURES:
            return None
        if table.is_full:
            rarest = min(table.graphs, key=seen.__getitem__, default=None)
            if rarest is None or seen[key] < 2 * seen[rarest]:
                return None
            table.drop(rarest)
        graph = table.capture(
            key, images[0].device, lambda memory: _TrainingGraph(memory, self._predictor, images)
        )
        if graph is None:
            logger.warning(
                "cuda_graphs: batches of %s run without a graph: %s%s",
                key,
                table.failures[key],
                "; no other shape is tried" if len(table.failures) == _MAX_FAILURES else "",
            )
            table.drop(*table.graphs)  # they draw random numbers from the generator's old state
        return graph


class _Predictor(nn.Module):
    """The model from images to logits and boxes, as a function of its trained parameters too."""

    def __init__(self, model: ConditionalDetrForObjectDetection) -> None:
        super().__init__()
        self.model = model

    @functools.cached_property
    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name, as they were when first asked for."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        outputs = self.model.model(pixel_values, pixel_mask, return_dict=True)
        return self.model.predict_layers(outputs)


class _TrainingGraph:
    """The two graphs of one shape of batches, and the tensors that they read and write.

    Args:
        memory: Where to capture.
        predictor: What to capture.
        images: Images, and a mask or nothing, of that shape.
    """

    def __init__(
        self, memory: GraphMemory, predictor: _Predictor, images: tuple[Tensor, ...]
    ) -> None:
        self._memory = memory
        self._images = [channels_last_copy(images[0]), *(mask.clone() for mask in images[1:])]
        # Parameters too, not tensors: layers with others are taken for more than plain ones.
        aliases: dict[str, Tensor] = {
            name: nn.Parameter(p.detach()) for name, p in predictor.trained.items()
        }
        device_type = images[0].device.type
        enabled = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type)

        def predict() -> tuple[Tensor, ...]:
            with torch.autocast(device_type, dtype, enabled, cache_enabled=False):
                return functional_call(predictor, aliases, tuple(self._images))

        def differentiate(
            outputs: Sequence[Tensor], gradients: Sequence[Tensor]
        ) -> tuple[Tensor | None, ...]:
            pairs = [
                (x, g) for x, g in zip(outputs, gradients, strict=True) if x.requires_grad
            ]  # not those of a frozen head
            differentiable, given = zip(*pairs, strict=True)
            parameters = list(aliases.values())
            return torch.autograd.grad(differentiable, parameters, given, allow_unused=True)

        # Autocast in the forward pass alone: else gradients of what is fp32 come in half precision.
        with torch.autocast(device_type, enabled=False), memory.preparing():
            for _ in range(_WARM_UP):
                outputs = predict()
                differentiate(outputs, [torch.empty_like(x) for x in outputs])
            self._forward, outputs = memory.capture(predict)
            self._output_gradients = [torch.empty_like(x) for x in outputs]
            self._backward, self._gradients = memory.capture(
                lambda: differentiate(outputs, self._output_gradients)
            )
        self._outputs = [x.detach() for x in outputs]

    def forward(self, images: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the outputs, in the graph's own memory."""
        with self._memory.using():
            for static, given in zip(self._images, images, strict=True):
                static.copy_(given)
            self._forward.replay()
        return tuple(x.detach() for x in self._outputs)

    def backward(self, output_gradients: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the gradients of the parameters, in memory of their own."""
        with self._memory.using():
            torch._foreach_copy_(self._output_gradients, list(output_gradients))
            self._backward.replay()
            graph_owned = [x for x in self._gradients if x is not None]
            copies = [torch.empty_like(x) for x in graph_owned]
            torch._foreach_copy_(copies, graph_owned)
        remaining = iter(copies)
        return [None if x is None else next(remaining) for x in self._gradients]


class _Replay(torch.autograd.Function):
    """A replay of a graph as a function of the parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        graphs: TrainingGraphs,
        replay: object,
        graph: _TrainingGraph,
        images: tuple[Tensor, ...],
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.graphs, ctx.replay, ctx.graph = graphs, replay, graph
        return graph.forward(images)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.graphs.finish(ctx.replay)
        return None, None, None, None, *ctx.graph.backward(output_gradients)
