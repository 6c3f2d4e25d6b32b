"""CUDA graphs of a detection model in training: forward and backward, one pair a shape of batches.

`torch.cuda.make_graphed_callables` captures what the model and its heads compute from images and
mask, and the way back to the parameters; matching and loss stay outside, between the two, as they
may need the host. What is added to it here:

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

import contextlib
import functools
import gc
import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from cdetr_fast.inference.graphs import Key, describe
from cdetr_fast.models.modeling import ConditionalDetrForObjectDetection
from cdetr_fast.models.outputs import ConditionalDetrObjectDetectionOutput
from cdetr_fast.training.errors import DataError

logger = logging.getLogger(__name__)

EAGER_FIRST = 2
"""Batches of a shape that run without a graph before it gets one."""

LIMIT = 16
"""Graphs at most; each keeps gradients of all parameters, 170 MB for a ResNet-50 in fp32."""

_FAILURES = 3  # shapes that could not be captured, after which no other is tried


def reason_against(model: nn.Module) -> str | None:
    """Says why a model cannot be trained by graphs, None if it can."""
    if not isinstance(model, ConditionalDetrForObjectDetection):
        return f"a ConditionalDetrForObjectDetection, got {type(model).__name__}"
    if model.is_gradient_checkpointing:
        return "a model without gradient checkpointing"
    for name in ("encoder_layerdrop", "decoder_layerdrop"):
        if getattr(model.config, name) > 0:  # each step would need another graph
            return f"{name} 0, got {getattr(model.config, name)}"
    if "capture_error_mode" not in inspect.signature(torch.cuda.make_graphed_callables).parameters:
        return (
            "a newer torch (torch.cuda.make_graphed_callables without capture_error_mode would be "
            f"disturbed by the threads that load data), got {torch.__version__}"
        )
    return None


def use_graphs(
    model: ConditionalDetrForObjectDetection, limit: int = LIMIT, eager_first: int = EAGER_FIRST
) -> TrainingGraphs:
    """Lets a model's forward pass with labels run by graphs in training mode, in place.

    Before the first batch the model has to be on the current CUDA device, and train what it will
    train; its parameters and buffers keep their addresses from then on. Wrap it in DDP or autocast
    after this call. Outputs are the graphs' own memory, which the next batch overwrites, and have
    no hidden states. Calls with other arguments than images, mask, labels and `num_boxes` run
    without graphs, as do evaluation mode and `torch.no_grad`. Hooks of modules inside the model run
    at capture only.

    Args:
        model: The model; its `forward` is replaced.
        limit: Graphs that are kept.
        eager_first: Batches of a shape that run without a graph before it gets one.

    Raises:
        DataError: The model cannot be trained by graphs.
    """
    reason = reason_against(model)
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

    model.forward = forward
    return graphs


class TrainingGraphs:
    """The graphs of one model, captured as shapes come up.

    A shape that was seen more than `eager_first` times gets a graph. Once there are `limit` of
    them, it gets that of the shape that was seen least, if it was seen twice as often: so rare
    shapes cannot push each other out for ever.

    Args:
        model: The model.
        limit: Graphs that are kept.
        eager_first: Batches of a shape that run without a graph before it gets one.
    """

    def __init__(self, model: ConditionalDetrForObjectDetection, limit: int, eager_first: int):
        self.limit, self.eager_first = limit, eager_first
        self.seen: Counter[Key] = Counter()
        self.replays = 0
        self.failures: dict[Key, str] = {}
        self._predictor = _Predictor(model)
        self._graphs: dict[Key, Callable[..., tuple[Tensor, ...]]] = {}
        self._pool: Any = None
        self._use: object | None = None  # the replay whose backward pass is to come

    def __call__(
        self, pixel_values: Tensor, pixel_mask: Tensor | None
    ) -> tuple[Tensor, ...] | None:
        """Returns what `predict_layers` does, or None if this batch is to run without a graph."""
        kind, dtype = pixel_values.device.type, pixel_values.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        key = (tuple(pixel_values.shape), dtype, pixel_mask is not None)
        self.seen[key] += 1
        images = (pixel_values,) if pixel_mask is None else (pixel_values, pixel_mask)
        graph = self._graphs.get(key) or self._capture(key, images)
        if graph is None:
            return None
        self._use, self.replays = object(), self.replays + 1
        parameters = self._predictor.trained.values()
        return graph(*images, *_OwnGradients.apply(self, self._use, *parameters))

    def describe(self) -> list[tuple[str, str]]:
        """Which shapes have graphs, and which do not, with the reason."""
        rows = [("graph", describe(key)) for key in self._graphs]
        return rows + [("no graph", f"{describe(k)}: {r}") for k, r in self.failures.items()]

    def finish(self, use: object) -> None:
        """Ends a replay after its backward pass; RuntimeError if it was not the last one."""
        if use is not self._use:
            raise RuntimeError(
                "cuda_graphs: the backward pass of a batch has to come once, and before the "
                "forward pass of the next one: graphs share memory, these gradients are wrong"
            )
        self._use = None

    def _capture(self, key: Key, images: tuple[Tensor, ...]) -> Callable | None:
        """Returns a new graph; None if there is to be none, with a warning where it failed."""
        if self.seen[key] <= self.eager_first or key in self.failures:
            return None
        if len(self.failures) >= _FAILURES:
            return None
        rarest = min(self._graphs, key=self.seen.__getitem__, default=None)
        if len(self._graphs) >= self.limit:
            if rarest is None or self.seen[key] < 2 * self.seen[rarest]:
                return None
            self._drop(rarest)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            with _random_numbers_kept(images[0].device):
                graph = self._predictor.graphed(images, self._pool)
        except Exception as error:  # a library in the call may refuse capture in any way
            lines = str(error).strip().splitlines()
            self.failures[key] = f"{type(error).__name__}: {lines[0] if lines else ''}"
            logger.warning(
                "cuda_graphs: batches of %s run without a graph: %s%s",
                describe(key),
                self.failures[key],
                "; no other shape is tried" if len(self.failures) == _FAILURES else "",
            )
            self._drop(*self._graphs)  # they draw random numbers from the generator's old state
            return None
        self._graphs[key] = graph
        return graph

    def _drop(self, *keys: Key) -> None:
        torch.cuda.synchronize()  # one of them may still run
        for key in keys:
            del self._graphs[key]
        gc.collect()  # static tensors and the functions that hold them refer to each other


class _Predictor(nn.Module):
    """From images to logits and boxes, as a function of the trained parameters too."""

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

    def graphed(self, images: tuple[Tensor, ...], pool: Any) -> Callable[..., tuple[Tensor, ...]]:
        """Captures; the result takes images like these, and the trained parameters."""
        pixel_values, *mask = images
        # channels-last, as the backbone wants them: copying them there is all that it takes
        static = [torch.empty_like(pixel_values, memory_format=torch.channels_last)]
        static[0].copy_(pixel_values)
        static += [x.clone() for x in mask]
        # Parameters too, not tensors: layers with others are taken for more than plain ones.
        aliases = {name: nn.Parameter(p.detach()) for name, p in self.trained.items()}
        names = list(aliases)
        kind = pixel_values.device.type
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

        def predict(*arguments: Tensor) -> tuple[Tensor, ...]:
            given = arguments[: len(static)]
            parameters = dict(zip(names, arguments[len(static) :], strict=True))
            with torch.autocast(kind, dtype, enabled, cache_enabled=False):
                return functional_call(self, parameters, given)

        # Autocast in the forward pass alone: else gradients of what is fp32 come in half precision.
        with torch.autocast(kind, enabled=False):
            return torch.cuda.make_graphed_callables(
                predict,
                (*static, *aliases.values()),
                allow_unused_input=True,
                pool=pool,
                # threads that load data and watch collectives may go on using the device meanwhile
                capture_error_mode="thread_local",
            )


class _OwnGradients(torch.autograd.Function):
    """Hands parameters on; their gradients are copied to memory of their own."""

    @staticmethod
    def forward(ctx, graphs, use, *parameters):
        ctx.graphs, ctx.use = graphs, use
        ctx.set_materialize_grads(False)
        return tuple(p.detach() for p in parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        ctx.graphs.finish(ctx.use)
        given = [g for g in gradients if g is not None]
        own = [torch.empty_like(g) for g in given]
        torch._foreach_copy_(own, given)
        copies = iter(own)
        return None, None, *(None if g is None else next(copies) for g in gradients)


@contextlib.contextmanager
def _random_numbers_kept(device: torch.device) -> Iterator[None]:
    """Leaves the device's random numbers as if nothing had run."""
    generator = _generator(device)
    state = generator.get_state()
    try:
        yield
    except BaseException:
        # A capture that failed may leave the generator's state in capture for ever.
        fresh = torch.Generator(device)
        fresh.set_state(state)
        generator.graphsafe_set_state(fresh)
        raise
    generator.set_state(state)


def _generator(device: torch.device) -> torch.Generator:
    return torch.cuda.default_generators[device.index]
