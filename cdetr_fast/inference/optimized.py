"""Optimised forms of this package's models: same names and weights, run by a prepared copy."""

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from cdetr_fast.inference.runner import Family, Runner
from cdetr_fast.models import modeling
from cdetr_fast.models.outputs import (
    ConditionalDetrModelOutput,
    ConditionalDetrObjectDetectionOutput,
    ConditionalDetrSegmentationOutput,
    ModelOutput,
)


class OptimizedModel(nn.Module):
    """Mixin that `optimize` puts in front of a model's class.

    Calls with images and a mask run the prepared copy; all others (labels, attention maps, hidden
    states, an encoder output ...) run the model's own forward with the same weights.
    """

    config: Any
    runner: Runner
    _output_class: type

    def train(self, mode: bool = True) -> Self:
        """Refuse training mode: the prepared copy is for inference.

        Raises:
            RuntimeError: `mode` is True.
        """
        if mode:
            raise RuntimeError(
                "train: expected mode=False, as this model is optimised for inference; train the "
                "model it was made from, and this one follows its weights"
            )
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Buffers become other tensors, which follow the original as the ones before did.
        original = self.runner.original
        names = [] if original is None else original.following(self)
        super()._apply(fn, recurse)
        if original is not None:
            original.take(self, names)
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load weights, and prepare the copy again at once."""
        result = super().load_state_dict(*args, **kwargs)
        self.runner.prepare(self)
        return result

    def refresh(self) -> None:
        """Prepare the copy again, after writes to weights that no call can see; see `optimize`.

        Raises:
            RuntimeError: The model that this one was made from has tensors of other shapes now.
        """
        self.runner.refresh(self)

    @torch.no_grad()
    def warmup(self, shapes: Iterable[tuple[int, int, int]], masks: bool | None = None) -> None:
        """Prepare for shapes, so that their first call is as fast as the next ones.

        Args:
            shapes: Batch size, height and width of the images `(B, H, W)`; as the calls will be.
            masks: With padding masks or without; None is both.

        Raises:
            TypeError: `shapes` is not a list of shapes.
            ValueError: A shape is not three positive integers.
        """
        shapes = _checked(shapes)
        weight = next(p for p in self.parameters() if p.is_floating_point())
        if (reason := self.runner.prepare(self)) is not None:
            raise RuntimeError(f"warmup: the model's own forward would run, as {reason}")
        assert self.runner.prepared is not None, "prepare() has given no reason"
        channels = self.runner.prepared.num_channels
        for batch, height, width in shapes:
            pixel_values = torch.zeros(
                batch, channels, height, width, device=weight.device, dtype=weight.dtype
            )
            for masked in (False, True) if masks is None else (masks,):
                pixel_mask = None
                if masked:
                    pixel_mask = torch.ones(
                        batch, height, width, dtype=torch.int64, device=weight.device
                    )
                    pixel_mask[:, -1, -1] = 0  # a mask of ones is dropped on a CPU
                self.runner.run(pixel_values, pixel_mask)

    def explain(self) -> str:
        """Describe what was done to the model, what runs a call, and what was left, and why."""
        return self.runner.explain(self)

    def _run(self, arguments: dict[str, Any]) -> Any:
        """Run the prepared copy; None where the model's own forward has to run."""
        runner = self.runner
        reason = runner.unsupported_call(self, arguments) or runner.prepare(self)
        runner.fallback_reason = reason
        if reason is not None:
            return None
        found = runner.run(arguments["pixel_values"], arguments.get("pixel_mask"))
        output = self._output_class(**found)
        wants_dict = arguments.get("return_dict")
        if wants_dict is None:
            wants_dict = self.config.return_dict
        return output if wants_dict else output.to_tuple()


def _checked(shapes: Any) -> list[tuple[int, int, int]]:
    if not isinstance(shapes, Iterable) or isinstance(shapes, str):
        raise TypeError(f"shapes: expected a list of (batch, height, width), got {shapes!r}")
    shapes = list(shapes)
    for shape in shapes:
        is_triple = isinstance(shape, Sequence) and len(shape) == 3
        if not is_triple or not all(type(size) is int and size > 0 for size in shape):
            raise ValueError(f"shapes: expected (batch, height, width) each, got {shape!r}")
    return shapes


def forward_of(base: type[nn.Module]) -> Callable[..., Any]:
    """Return an optimised forward with the signature and documentation of a model's own."""
    names = [name for name in inspect.signature(base.forward).parameters if name != "self"]

    @functools.wraps(base.forward)
    def forward(self: OptimizedModel, *args: Any, **kwargs: Any) -> Any:
        arguments = dict(zip(names, args, strict=False)) | kwargs
        output = self._run(arguments)
        return base.forward(self, *args, **kwargs) if output is None else output

    return forward


class ConditionalDetrModel(OptimizedModel, modeling.ConditionalDetrModel):
    """`cdetr_fast.ConditionalDetrModel` for inference."""

    _output_class: type[ModelOutput] = ConditionalDetrModelOutput
    forward = forward_of(modeling.ConditionalDetrModel)


class ConditionalDetrForObjectDetection(OptimizedModel, modeling.ConditionalDetrForObjectDetection):
    """`cdetr_fast.ConditionalDetrForObjectDetection` for inference."""

    _output_class: type[ModelOutput] = ConditionalDetrObjectDetectionOutput
    forward = forward_of(modeling.ConditionalDetrForObjectDetection)


class ConditionalDetrForSegmentation(OptimizedModel, modeling.ConditionalDetrForSegmentation):
    """`cdetr_fast.ConditionalDetrForSegmentation` for inference."""

    _output_class: type[ModelOutput] = ConditionalDetrSegmentationOutput
    forward = forward_of(modeling.ConditionalDetrForSegmentation)

    def forward_kept(
        self, pixel_values: Tensor, pixel_mask: Tensor | None, threshold: float
    ) -> ConditionalDetrSegmentationOutput:
        """Segment as the model does, by the prepared copy; `predict` calls it."""
        runner = self.runner
        arguments = {"pixel_values": pixel_values, "pixel_mask": pixel_mask}
        reason = (
            runner.unsupported_call(self, arguments)
            or runner.unsupported_kept_call(len(pixel_values))
            or runner.prepare(self)
        )
        runner.fallback_reason = reason
        if reason is not None:
            return super().forward_kept(pixel_values, pixel_mask, threshold)
        return runner.run_kept(pixel_values, pixel_mask, threshold)


def _share(model: nn.Module) -> nn.Module:
    return model


def _never(hook: Any) -> bool:
    return False


def recogniser(
    optimized: Iterable[type[nn.Module]],
    convert: Callable[[nn.Module], nn.Module],
    is_harmless: Callable[[Any], bool],
) -> Callable[[Any], Family | None]:
    """Return a function that returns the family of a model; None if it has none.

    Args:
        optimized: Classes whose last base is the class that they optimise. Models of exactly those
            bases are recognised, as a derived class may compute something else.
        convert: As in `Family`.
        is_harmless: As in `Family`.
    """
    families = {cls.__bases__[-1]: Family(cls, convert, is_harmless) for cls in optimized}
    return lambda model: families.get(type(model))


recognise = recogniser(
    (ConditionalDetrModel, ConditionalDetrForObjectDetection, ConditionalDetrForSegmentation),
    _share,
    _never,
)
