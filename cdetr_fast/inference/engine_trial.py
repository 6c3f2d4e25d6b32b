"""Trial of the engines on this machine: times in turns, and errors against the model in fp32."""

import datetime
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Self, get_args

import torch
from torch import Tensor, nn

from cdetr_fast.common.errors import first_line
from cdetr_fast.inference.engine_records import (
    DEFAULT,
    RIGHT,
    Engine,
    Finding,
    Precision,
    architecture,
)
from cdetr_fast.inference.optimize import optimize
from cdetr_kernels.testing.timing import time_in_turns

PRECISIONS: tuple[Precision, ...] = get_args(Precision)

_ENGINES: tuple[Engine, ...] = get_args(Engine)
_FLOOR = 1e-4
"""Error that is always allowed, relative to the norm; above it twice that of `DEFAULT` is."""
_OUTPUTS = ("logits", "pred_boxes")


class Shape(NamedTuple):
    """Shape of a batch of images; written as "4x480x640p".

    Attributes:
        batch: Number of images.
        height: Of the batch, in pixels.
        width: Of the batch, in pixels.
        padded: Whether all images but the first have a quarter less height.
    """

    batch: int
    height: int
    width: int
    padded: bool = False

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the shape that a text writes; ValueError if it writes none."""
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)(p?)", text)
        if found is None:
            raise ValueError(f"expected BxHxW or BxHxWp, got {text!r}")
        batch, height, width = map(int, found.groups()[:3])
        return cls(batch, height, width, bool(found[4]))

    def __str__(self) -> str:
        return f"{self.batch}x{self.height}x{self.width}" + "p" * self.padded

    def mask(self) -> Tensor | None:
        """Return the padding mask `[B, H, W]`, int64; None if nothing is padded."""
        if not self.padded:
            return None
        mask = torch.ones(self.batch, self.height, self.width, dtype=torch.int64, device="cpu")
        mask[1:, self.height * 3 // 4 :] = 0
        return mask


@torch.no_grad()
def try_engines(
    model: nn.Module,
    shape: Shape,
    images: Tensor,
    precisions: Iterable[Precision] = PRECISIONS,
    calibration: Sequence[Tensor] = (),
    repeats: int = 10,
) -> list[Finding]:
    """Time every engine in every precision, in turns, if its outputs are right.

    An engine is right if its error is at most twice that of PyTorch in the same precision.

    Args:
        model: A detection model of this package, in fp32 on a CPU in eval mode; not changed.
        shape: Shape of the batch.
        images: `[B, 3, H, W]`, prepared.
        precisions: Those with int8 need `calibration`.
        calibration: Batches of prepared images, for the ranges of int8.
        repeats: Timed calls of each engine and precision.
    """
    mask = shape.mask()
    if mask is not None:
        images = images * mask[:, None]
    expected = model(images, mask, return_dict=True)
    name = architecture(model)
    today = datetime.date.today().isoformat()
    calls: dict[str, Callable[[], Any]] = {}
    found: dict[str, dict[str, Any]] = {}
    for precision in precisions:
        options: dict[str, Any] = {}
        if "bf16" in precision:
            options["dtype"] = torch.bfloat16
        if "int8" in precision:
            options["int8_calibration"] = calibration
        for engine in _ENGINES:
            work = f"{precision} {engine}"
            row = found[work] = {"precision": precision, "engine": engine}
            try:
                fast = optimize(model, engine=engine, **options)
                dtype = next(p.dtype for p in fast.parameters())
                call = functools.partial(fast, images.to(dtype), mask, return_dict=True)
                errors = [_error(call()[key], expected[key]) for key in _OUTPUTS]
            except (RuntimeError, TypeError, ValueError) as error:
                row["verdict"] = first_line(error)
                continue
            row |= zip(("logits_error", "boxes_error"), errors, strict=True)
            row["verdict"] = _verdict(engine, errors, found[f"{precision} {DEFAULT}"])
            if row["verdict"] == RIGHT:
                calls[work] = call
    for work, times in time_in_turns(calls, repeats).items():
        found[work] |= {key: times[key] for key in ("ms", "min_ms")}
    return [Finding(model=name, shape=str(shape), date=today, **row) for row in found.values()]


def _error(got: Tensor, expected: Tensor) -> float:
    return ((got.float() - expected).norm() / expected.norm()).item()


def _verdict(engine: Engine, errors: list[float], default: dict[str, Any]) -> str:
    """Return whether errors are small enough beside those of the default in the precision."""
    for name, error in zip(("logits", "boxes"), errors, strict=True):
        limit = float("inf")
        if engine != DEFAULT:
            if f"{name}_error" not in default:
                return f"nothing to compare with, as {DEFAULT} does not run: {default['verdict']}"
            limit = 2 * default[f"{name}_error"] + _FLOOR
        if not error < limit:  # NaN is never right
            return f"{name} are off by {error:.1e} of their norm, expected at most {limit:.1e}"
    return RIGHT
