"""An optimised model at run time: prepared copy kept up to date, graphs, buckets and parts."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_tracing  # type: ignore[attr-defined]  # public, but not in its __all__

from cdetr_fast.common import cuda_graphs
from cdetr_fast.common.masks import is_unpadded
from cdetr_fast.inference.following import Original, Watch
from cdetr_fast.inference.graphs import GraphCache
from cdetr_fast.inference.openvino import OpenVinoCall
from cdetr_fast.inference.plain import forward_hooks, nan_reason, unsupported_reason
from cdetr_fast.inference.prepare import PreparedModel, shallow_copy

Outputs = dict[str, Tensor]

_PREPARED_ARGUMENTS = ("pixel_values", "pixel_mask", "return_dict")
"""With any other argument the model's own forward runs."""


@dataclass(frozen=True)
class Options:
    """Options of `optimize`; see there."""

    engine: str = "torch"
    compile: str | None = None
    cuda_graphs: bool = False
    bucket: int | None = None
    max_batch: int | None = None
    max_graphs: int = 8
    static_outputs: bool = False
    int8_calibration: tuple[Tensor, ...] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True)
class Family:
    """Differences between this package's models and others of the same architecture.

    Attributes:
        optimized_class: Class of the optimised model.
        convert: Returns this package's model that shares the weights of a model; raises ValueError
            with the reason where there is none.
        is_harmless: Whether a forward hook of a submodule may go uncalled.
    """

    optimized_class: type[nn.Module]
    convert: Callable[[nn.Module], nn.Module]
    is_harmless: Callable[[Any], bool]


class Runner:
    """Runs a model's prepared copy, and prepares it again when the model changes.

    Args:
        options: How to run.
        family: Which models the model belongs to.

    Attributes:
        prepared: The prepared copy; None until `prepare` is called.
        refreshed: How many times it was prepared again.
        fallback_reason: Why the last call ran the model's own forward; None if it did not.
        original: The model that this one follows, if there is one.
    """

    def __init__(self, options: Options, family: Family) -> None:
        self.options, self.family = options, family
        self.prepared: PreparedModel | None = None
        self.refreshed = 0
        self.fallback_reason: str | None = None
        self.original: Original | None = None
        self._watch: Watch | None = None
        self._parts: list[nn.Module] = []
        self._settings: tuple[Any, ...] = ()
        self._unsupported: str | None = None
        self._attached: str | None = None  # of `_unsupported`, what a watch does not see going
        self._lock = threading.Lock()
        self._call: Callable[[Tensor, Tensor | None], Outputs] | None = None
        self._graphs: GraphCache | None = None
        self._openvino: OpenVinoCall | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Copied or pickled, a model prepares itself again in its first call.
        return {"options": self.options, "family": self.family}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # the state is its arguments

    def unsupported_call(self, model: nn.Module, arguments: dict[str, Any]) -> str | None:
        """Return why the model's own forward has to run this call, or None."""
        for name, value in arguments.items():
            if name not in _PREPARED_ARGUMENTS and value is not None and value is not False:
                return f"{name} is given"
        for name in ("output_attentions", "output_hidden_states"):
            if arguments.get(name) is None and getattr(model.config, name, False):
                return f"config.{name} is set"
        pixel_values = arguments.get("pixel_values")
        if not isinstance(pixel_values, Tensor):
            return "pixel_values is not a tensor"  # the model complains
        if torch.is_grad_enabled() and pixel_values.requires_grad:
            return "pixel_values needs a gradient"
        if is_tracing():
            return "torch.jit.trace cannot record the prepared copy; torch.export can"
        return None

    def prepare(self, model: nn.Module) -> str | None:
        """Bring the copy up to date; return why the model's own forward has to run, or None."""
        if torch.compiler.is_compiling():
            return None if self.prepared is not None else "the model is not prepared"
        if self._is_stale(model):
            with self._lock:
                if self._is_stale(model):
                    self._prepare(model)
        if self._unsupported is not None:
            return self._unsupported
        for part in self._parts:
            if not all(map(self.family.is_harmless, forward_hooks(part))):
                return "a submodule has a forward hook"
            if "forward" in vars(part):
                return "a submodule has a forward of its own"
            if part.training:
                return "a submodule is in training mode"
        return None

    def _is_stale(self, model: nn.Module) -> bool:
        if self._watch is None or self._watch.has_changed():
            return True
        if self._settings != _settings(model) or (
            self._attached is not None and self._attached != self._attachment(model)
        ):
            return True
        return self.original is not None and self.original.has_changed()

    def _attachment(self, model: nn.Module) -> str | None:
        # The model's own hooks run in any case: they are its caller's, and the copy has none.
        return unsupported_reason(model, self.family.is_harmless, own_hooks=False)

    def refresh(self, model: nn.Module) -> None:
        """Prepare the copy again, whether or not a change can be seen."""
        with self._lock:
            self._prepare(model)

    def _prepare(self, model: nn.Module) -> None:
        if self.original is not None:
            self.original.copy_values(model)
        watch, settings = Watch(model), _settings(model)
        self._parts = list(model.modules())[1:]  # the model's own hooks always run
        # Whether the copy that there is differs from the model in values alone.
        is_same = (
            self._unsupported is None
            and self._watch is not None
            and not self._watch.modules_have_changed()
        )
        source = None
        self._attached = self._attachment(model)
        self._unsupported = self._attached or nan_reason(model)
        if self._unsupported is None:
            try:
                source = self.family.convert(model)
            except ValueError as error:
                self._unsupported = str(error)
        if source is not None:
            source = _with_own_forward(source, self.family)
            calibration = self.options.int8_calibration
            uses_openvino = self.options.engine == "openvino"
            fresh = PreparedModel(source, () if uses_openvino else calibration)
            if self._graphs is not None:
                self._graphs.clear()  # they read the addresses of the old weights
            if not (is_same and self._model.take_values(fresh)):
                self.prepared = fresh
                self._call = self._graphs = None
            stream = cuda_graphs.current_stream(self._model.device)
            if stream is not None:  # calls on other streams read what was computed on this one
                stream.synchronize()
            if uses_openvino:
                self._call = self._openvino = None  # no call may run with the old weights
                self._call = self._openvino = OpenVinoCall(source, calibration)
        self.refreshed += self._watch is not None
        self._watch, self._settings = watch, settings

    def explain(self, model: nn.Module) -> str:
        """Describe what was done, what runs a call, and what was left, and why."""
        self.prepare(model)
        rows = [] if self.prepared is None else self.prepared.describe()
        if self._openvino is not None:
            # What it runs is the exported copy: its own kernels, and constants of no map size.
            rows = [row for row in rows if row[0] not in ("backbone", "map sizes kept")]
            rows.insert(0, ("engine", self._openvino.describe()))
        else:
            rows.append(("compile", self.options.compile or "no"))
            if self._graphs is not None:
                rows += self._graphs.describe()
            else:
                rows.append(("graph", "none captured yet" if self._uses_graphs() else "not used"))
        rows.append(("prepared again", f"{self.refreshed} times"))
        if self.fallback_reason is not None:
            rows.append(("last call", f"the model's own forward, as {self.fallback_reason}"))
        return "\n".join(f"{name:<16} {text}" for name, text in rows)

    def run(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> Outputs:
        """Run the prepared copy; arguments as in `PreparedModel.forward`."""
        self._model.check_images(pixel_values, pixel_mask)
        device = pixel_values.device.type
        if torch.is_autocast_enabled(device):
            # The copy computes in the weights' dtype: autocast would take the boxes out of fp32.
            with torch.autocast(device, enabled=False):
                return self.run(pixel_values.to(self._model.dtype), pixel_mask)
        with torch.no_grad():
            if pixel_mask is not None and is_unpadded(pixel_mask):
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
                    self._own(
                        self._run_part(
                            pixel_values[i : i + limit],
                            None if pixel_mask is None else pixel_mask[i : i + limit],
                        )
                    )
                    for i in range(0, len(pixel_values), limit)
                ]
                output = {name: _joined(name, [p[name] for p in parts]) for name in parts[0]}
            else:
                output = self._run_part(pixel_values, pixel_mask)
            if size is not None and "pred_masks" in output:
                output["pred_masks"] = _cropped(output["pred_masks"], size, pixel_values.shape[-2:])
            return output

    def unsupported_kept_call(self, batch: int) -> str | None:
        """Return why the model's own `forward_kept` has to run, or None."""
        if self.options.bucket is not None:
            return "masks of padded images would have to be cropped"
        if batch > (self.options.max_batch or batch):
            return "parts of a batch would keep different numbers of queries"
        return None

    def run_kept(self, pixel_values: Tensor, pixel_mask: Tensor | None, threshold: float) -> Any:
        """Run `forward_kept`: without graphs, as an image decides how much is computed."""
        self._model.check_images(pixel_values, pixel_mask)
        with torch.no_grad(), torch.autocast(pixel_values.device.type, enabled=False):
            pixel_values = pixel_values.to(self._model.dtype)
            return self._model.model.forward_kept(pixel_values, pixel_mask, threshold)

    @property
    def _model(self) -> PreparedModel:
        assert self.prepared is not None, "prepare() comes first"
        return self.prepared

    def _run_part(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> Outputs:
        if torch.compiler.is_compiling():
            return self._model(pixel_values, pixel_mask)
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

    def _own(self, output: Outputs) -> Outputs:
        """Return outputs of a part that the call of the next part does not overwrite."""
        if not self.options.static_outputs:
            return output
        return {name: tensor.clone() for name, tensor in output.items()}

    def _uses_graphs(self) -> bool:
        is_capturable = (
            self.prepared is not None and self.prepared.device.type == cuda_graphs.DEVICE_TYPE
        )
        return self.options.cuda_graphs and is_capturable

    def _make_call(self) -> Callable[[Tensor, Tensor | None], Outputs]:
        call: Callable[[Tensor, Tensor | None], Outputs] = self._model
        if self.options.compile is not None:
            call = torch.compile(call, mode=self.options.compile, fullgraph=True, dynamic=False)
        if self._uses_graphs():
            options = (self.options.max_graphs, self.options.static_outputs)
            call = self._graphs = GraphCache(call, self._model.constants, *options)
        return call


def _with_own_forward(model: nn.Module, family: Family) -> nn.Module:
    """Return a model that is not optimised: the same one, or a copy that shares its weights."""
    if type(model) is not family.optimized_class:
        return model
    copied: nn.Module = shallow_copy(model, without=("runner",))
    copied.__class__ = family.optimized_class.__bases__[-1]
    for hooks in (copied._forward_hooks, copied._forward_pre_hooks):
        hooks.clear()  # the optimised model runs them
    return copied


def _settings(model: nn.Module) -> tuple[Any, ...]:
    """Return the fields of the configuration that decide what is computed."""
    return tuple(getattr(model.config, name, None) for name in ("auxiliary_loss", "compat"))


def pad_to_bucket(
    pixel_values: Tensor, pixel_mask: Tensor | None, bucket: int
) -> tuple[Tensor, Tensor | None]:
    """Pad images at the right and bottom to multiples of `bucket`, and record it in the mask."""
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
