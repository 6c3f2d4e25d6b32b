"""What an optimised model holds besides its weights: its engine, up to date, and how to run it."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdetr_fast.common import cuda_graphs
from cdetr_fast.inference.engine import Engine
from cdetr_fast.inference.graphs import GraphCache
from cdetr_fast.inference.origin import Origin
from cdetr_fast.inference.watch import Settings, Watch

_FAST = ("pixel_values", "pixel_mask", "return_dict")
"""Arguments that the engine takes; with any other, the model's own forward runs."""


@dataclass(frozen=True)
class Options:
    """How `optimize` was asked to run; see there."""

    compile: str | None = None
    cuda_graphs: bool = False
    bucket: int | None = None
    max_batch: int | None = None
    max_graphs: int = 8
    static_outputs: bool = False
    int8_calibration: tuple[Tensor, ...] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True)
class Kind:
    """What differs between models of this package and others of the same architecture.

    Args:
        optimized_class: Class of the optimised model.
        twin_of: Gives this package's model with a model's weights.
        is_harmless: Whether a forward hook of a submodule may go uncalled by the engine.
    """

    optimized_class: type[nn.Module]
    twin_of: Callable[[nn.Module], nn.Module]
    is_harmless: Callable[[Callable], bool]


class Runner:
    """Runs a model's engine, and prepares it anew when the model's weights change.

    Args:
        options: How to run.
        kind: What the model is.
    """

    def __init__(self, options: Options, kind: Kind) -> None:
        self.options, self.kind = options, kind
        self.engine: Engine | None = None
        self.refreshed = 0
        self.last_plain: str | None = None
        self.origin: Origin | None = None
        self._watch: Watch | None = None
        self._lock = threading.Lock()
        self._call: Callable | None = None
        self._graphs: GraphCache | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Copied or pickled, a model prepares itself again at its first call.
        return {"options": self.options, "kind": self.kind}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def reason_for_plain(self, model: nn.Module, arguments: dict[str, Any]) -> str | None:
        """Says why the model's own forward has to run, or returns None."""
        for name, value in arguments.items():
            if name not in _FAST and value is not None and value is not False:
                return f"{name} is given"
        for name in ("output_attentions", "output_hidden_states"):
            asked = arguments.get(name)
            if asked is None and getattr(model.config, name, False):
                return f"config.{name} is set"
        pixel_values = arguments.get("pixel_values")
        if not isinstance(pixel_values, Tensor):
            return "pixel_values is no tensor"  # the model complains
        if torch.is_grad_enabled() and pixel_values.requires_grad:
            return "pixel_values needs a gradient"
        return None

    def prepare(self, model: nn.Module) -> str | None:
        """Brings the engine up to date; returns why the model's own forward has to run, or None."""
        if torch.compiler.is_compiling():
            return None if self.engine is not None else "the engine is not prepared"
        if self._is_stale():
            with self._lock:
                if self._is_stale():
                    self._build(model)
        return self._watch.attachment(self.kind.is_harmless)

    def _is_stale(self) -> bool:
        if self._watch is None or self._watch.change() is not None:
            return True
        return self.origin is not None and self.origin.has_changed()

    def refresh(self, model: nn.Module) -> None:
        """Prepares the engine anew, whether or not anything seems to have changed."""
        with self._lock:
            self._build(model)

    def _build(self, model: nn.Module) -> Watch:
        if self.origin is not None:
            self.origin.follow(model)
        watch = Watch(model, Settings(model.config))
        fresh = Engine(self.kind.twin_of(model), self.options.int8_calibration)
        if self._graphs is not None:
            self._graphs.clear()  # they read the addresses of the old weights
        if self.engine is None or not self.engine.take(fresh):
            self.engine = fresh
            self._call = self._graphs = None
        self.refreshed += self._watch is not None
        self._watch = watch
        return watch

    def explain(self, model: nn.Module) -> str:
        """Says what was done, what runs a call, and what was left, with reasons."""
        self.prepare(model)
        rows = self.engine.describe()
        rows.append(("compile", self.options.compile or "no"))
        if self._graphs is not None:
            rows += self._graphs.describe()
        elif self.options.cuda_graphs and self.engine.device.type == cuda_graphs.DEVICE_TYPE:
            rows.append(("graph", "none captured yet"))
        else:
            rows.append(("graph", "not used"))
        rows.append(("prepared anew", f"{self.refreshed} times"))
        if self.last_plain is not None:
            rows.append(("last call", f"the model's own forward, as {self.last_plain}"))
        return "\n".join(f"{name:<16} {text}" for name, text in rows)

    def run(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> dict[str, Tensor]:
        """Runs the engine; arguments as of `Engine.forward`."""
        engine = self.engine
        device = pixel_values.device.type
        if torch.is_autocast_enabled(device):
            # The engine computes in the weights' dtype: autocast would take the boxes out of fp32.
            with torch.autocast(device, enabled=False):
                return self.run(pixel_values.to(engine.dtype), pixel_mask)
        with torch.no_grad():
            if pixel_mask is not None and is_trivial(pixel_mask):
                pixel_mask = None
            size = None
            if self.options.bucket is not None:
                size = pixel_values.shape[-2:]
                pixel_values, pixel_mask = pad_to_bucket(
                    pixel_values, pixel_mask, self.options.bucket
                )
            limit = self.options.max_batch or len(pixel_values)
            if len(pixel_values) > limit:
                parts = [
                    self._call_engine(
                        pixel_values[i : i + limit],
                        None if pixel_mask is None else pixel_mask[i : i + limit],
                    )
                    for i in range(0, len(pixel_values), limit)
                ]
                output = {name: _joined(name, [p[name] for p in parts]) for name in parts[0]}
            else:
                output = self._call_engine(pixel_values, pixel_mask)
            if size is not None and "pred_masks" in output:
                output["pred_masks"] = _cropped(output["pred_masks"], size, pixel_values.shape[-2:])
            return output

    def reason_for_plain_above(self, batch: int) -> str | None:
        """Says why the model's own `forward_above` has to run, or returns None."""
        if self.options.bucket is not None:
            return "masks of padded images would have to be cropped"
        if batch > (self.options.max_batch or batch):
            return "parts of a batch would keep different numbers of queries"
        return None

    def run_above(
        self, pixel_values: Tensor, pixel_mask: Tensor | None, threshold: float
    ) -> dict[str, Tensor]:
        """Runs the engine's `forward_above`: no graph, as an image decides how much is computed."""
        engine = self.engine
        device = pixel_values.device.type
        with torch.no_grad(), torch.autocast(device, enabled=False):
            if pixel_mask is not None and is_trivial(pixel_mask):
                pixel_mask = None
            return engine.forward_above(pixel_values.to(engine.dtype), pixel_mask, threshold)

    def _call_engine(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> dict[str, Tensor]:
        if torch.compiler.is_compiling():
            return self.engine(pixel_values, pixel_mask)
        call = self._call
        if call is None:
            with self._lock:
                call = self._call = self._call or self._make_call()
        try:
            return call(pixel_values, pixel_mask)
        except torch.OutOfMemoryError as error:
            bucket = self.options.bucket
            padded = f", padded to multiples of {bucket}," if bucket else ""
            raise torch.OutOfMemoryError(
                f"pixel_values: {list(pixel_values.shape)}{padded} does not fit into the memory of "
                f"{pixel_values.device}; set max_batch, or use smaller images. {error}"
            ) from error

    def _make_call(self) -> Callable:
        call = self.engine
        if self.options.compile is not None:
            call = torch.compile(call, mode=self.options.compile, fullgraph=True, dynamic=False)
        if self.options.cuda_graphs and self.engine.device.type == cuda_graphs.DEVICE_TYPE:
            options = (self.options.max_graphs, self.options.static_outputs)
            call = GraphCache(call, self.engine.kept_constants, *options)
            self._graphs = call
        return call


def is_trivial(pixel_mask: Tensor) -> bool:
    """Whether nothing is padded, where that can be seen without a device synchronisation."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or pixel_mask.device.type != "cpu":
        return False
    return bool(pixel_mask.numpy().all())  # no tensor operation, nothing to wait for


def pad_to_bucket(
    pixel_values: Tensor, pixel_mask: Tensor | None, bucket: int
) -> tuple[Tensor, Tensor | None]:
    """Pads images at the right and bottom to multiples of `bucket`, and says so in the mask."""
    height, width = pixel_values.shape[-2:]
    down, right = -height % bucket, -width % bucket
    if not down and not right:
        return pixel_values, pixel_mask
    if pixel_mask is None:
        pixel_mask = pixel_values.new_ones(len(pixel_values), height, width, dtype=torch.bool)
    padding = (0, right, 0, down)
    return F.pad(pixel_values, padding), F.pad(pixel_mask, padding)


def _joined(name: str, parts: list[Tensor]) -> Tensor:
    batch_dim = 1 if name in ("intermediate_hidden_states", "reference_points") else 0
    return torch.cat(parts, batch_dim)


def _cropped(masks: Tensor, size: torch.Size, padded: torch.Size) -> Tensor:
    height, width = (-(-masks.shape[-2 + i] * size[i] // padded[i]) for i in range(2))
    return masks[..., :height, :width]
