"""Optimised forms of this package's models: same names, same weights, another forward."""

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from cdetr_fast.inference.runner import Kind, Runner
from cdetr_fast.models import modeling
from cdetr_fast.models.outputs import (
    ConditionalDetrModelOutput,
    ConditionalDetrObjectDetectionOutput,
    ConditionalDetrSegmentationOutput,
    ModelOutput,
)


class OptimizedModel:
    """What `optimize` adds to a model's class.

    Calls with images and a mask run the prepared engine; all others (labels, attention maps, hidden
    states, an encoder output ...) run the model's own forward with the same weights.
    """

    runner: Runner
    _output_class: type

    def train(self, mode: bool = True) -> Self:
        """Refuses training mode: what was prepared is for inference.

        Raises:
            RuntimeError: `mode` is True.
        """
        if mode:
            raise RuntimeError(
                "train: expected mode=False, as this model is optimised for inference; train the "
                "model it was made from, and this one follows its weights"
            )
        return super().train(False)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Loads weights, and prepares the engine anew at once."""
        result = super().load_state_dict(*args, **kwargs)
        self.runner.prepare(self)
        return result

    def refresh(self) -> None:
        """Prepares the engine anew, after writes to weights that no call can see; see `optimize`.

        Raises:
            RuntimeError: The model that this one was made from has tensors of other shapes now.
        """
        self.runner.refresh(self)

    @torch.no_grad()
    def warmup(self, shapes: Iterable[tuple[int, int, int]], masks: bool | None = None) -> None:
        """Prepares for shapes, so that their first call is as fast as the next ones.

        Args:
            shapes: Batch size, height and width of the images `(B, H, W)`; as the calls will be.
            masks: With padding masks or without; None is both.

        Raises:
            TypeError: `shapes` is no list of shapes.
            ValueError: A shape is not three positive integers.
        """
        shapes = _checked(shapes)
        weight = next(p for p in self.parameters() if p.is_floating_point())
        self.runner.prepare(self)
        for shape in shapes:
            batch, height, width = shape
            channels = self.runner.engine.num_channels
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
        """Says what was done to the model, what runs a call, and what was left, with reasons."""
        return self.runner.explain(self)

    def _run(self, arguments: dict[str, Any]) -> Any:
        """Runs the engine; None where the model's own forward has to run."""
        runner = self.runner
        reason = runner.reason_for_plain(self, arguments) or runner.prepare(self)
        runner.last_plain = reason
        if reason is not None:
            return None
        pixel_values, pixel_mask = arguments["pixel_values"], arguments.get("pixel_mask")
        runner.engine.check(pixel_values, pixel_mask)
        output = self._output_class(**runner.run(pixel_values, pixel_mask))
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


def forward_of(base: type[nn.Module]) -> Callable:
    """An optimised forward with the signature and documentation of a model's own."""
    names = [name for name in inspect.signature(base.forward).parameters if name != "self"]

    @functools.wraps(base.forward)
    def forward(self, *args, **kwargs):
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

    def forward_above(
        self, pixel_values: Tensor, pixel_mask: Tensor | None, threshold: float
    ) -> ConditionalDetrSegmentationOutput:
        """As the model's own, by the engine; it is what `predict` calls."""
        runner = self.runner
        arguments = {"pixel_values": pixel_values, "pixel_mask": pixel_mask}
        reason = (
            runner.reason_for_plain(self, arguments)
            or runner.reason_for_plain_above(len(pixel_values))
            or runner.prepare(self)
        )
        runner.last_plain = reason
        if reason is not None:
            return super().forward_above(pixel_values, pixel_mask, threshold)
        runner.engine.check(pixel_values, pixel_mask)
        return self._output_class(**runner.run_above(pixel_values, pixel_mask, threshold))


def _itself(model: nn.Module) -> nn.Module:
    return model


def _never(hook: Callable) -> bool:
    return False


def recogniser(
    optimized: Iterable[type[nn.Module]],
    twin_of: Callable[[nn.Module], nn.Module],
    is_harmless: Callable[[Callable], bool],
) -> Callable[[nn.Module], Kind | None]:
    """Makes a function that says of what kind a model is.

    Args:
        optimized: Classes whose last base is the class they optimise; exactly those are recognised,
            as another subclass may do otherwise.
        twin_of: As of `Kind`.
        is_harmless: As of `Kind`.
    """
    kinds = {cls.__bases__[-1]: Kind(cls, twin_of, is_harmless) for cls in optimized}
    return lambda model: kinds.get(type(model))


recognise = recogniser(
    (ConditionalDetrModel, ConditionalDetrForObjectDetection, ConditionalDetrForSegmentation),
    _itself,
    _never,
)
