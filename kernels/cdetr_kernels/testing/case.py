"""Calls of the operators: inputs, options, counted work, and others that compute the same."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from cdetr_kernels import registry

Inputs = dict[str, Any]
"""Tensors by parameter name, None where absent; each operator knows which of them may be."""
Function = Callable[..., Tensor | Sequence[Tensor]]
"""Takes the inputs of a case by name."""


@dataclass(frozen=True)
class Sizes:
    """Arguments of an operator's `cases.make` for each use.

    Args:
        smallest: As little to compute as possible: what is left is the cost of the call.
        small: For triton's interpreter: several tiles, the last one of each axis incomplete.
        medium: For tests on a GPU: several images, nothing a multiple of a tile.
        typical: Sizes of the model, the most telling first, for benchmarks.
        dtypes: dtypes in which it is measured, the first one where no other is asked for.
        differentiable: Whether any input has a gradient.
        called: Sizes that a quick qualification covers: what our models call, the first ones first.
            None takes all of `typical`.
    """

    smallest: dict[str, Any]
    small: dict[str, Any]
    medium: dict[str, Any]
    typical: list[dict[str, Any]]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    differentiable: bool = True
    called: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Case:
    """One call of an operator.

    Args:
        op: Name of the operator.
        label: Its sizes, for the reader.
        dtype: dtype that is tested or measured.
        inputs: Tensors by parameter name (None: absent).
        public: The public function of the operator.
        options: Its other arguments by name.
        outputs: Returns the tensors of a result that are compared; None compares what it is.
        gradients: Names of the inputs that have a gradient.
        flops: Multiplications and additions, forward and then forward and backward.
        bytes_moved: Bytes to read and write once, forward and then forward and backward.
        per_image: The first axis of inputs and outputs is the image, so few images are checked.
        definition: The same in plain torch; None is the backend "torch".
        exact_options: Options that differ where the definition is called on fp64 inputs.
        peers: Makes other functions of the same inputs; what that raises says why one cannot run.
    """

    op: str
    label: str
    dtype: torch.dtype
    inputs: Inputs
    public: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    outputs: Callable[[Any], Sequence[Tensor]] | None = None
    gradients: tuple[str, ...] = ()
    flops: tuple[float, float] = (0.0, 0.0)
    bytes_moved: tuple[float, float] = (0.0, 0.0)
    per_image: bool = False
    definition: Function | None = None
    exact_options: dict[str, Any] = field(default_factory=dict)
    peers: dict[str, Callable[[], Function]] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """The device of the inputs."""
        device: torch.device = next(x for x in self.inputs.values() if x is not None).device
        return device

    def backends(self) -> list[str]:
        """Return the backends that can run the operator where the inputs are."""
        return registry.operator(self.op).supported(torch.empty(0, device=self.device))

    def function(self, backend: str, **changes: Any) -> Function:
        """Return the call on one backend, which takes the inputs by name; `changes` are options."""
        public, outputs = self.public, self.outputs
        options = self.options | changes | {"backend": backend}

        def call(**inputs: Any) -> Tensor | Sequence[Tensor]:
            result: Tensor | Sequence[Tensor] = public(**inputs, **options)
            return result if outputs is None else outputs(result)

        return call

    def handed_on(self, backend: str) -> tuple[Any, ...]:
        """Return what the public function hands on to an implementation."""
        operator = registry.operator(self.op)
        found: list[tuple[Any, ...]] = []

        def record(*arguments: Any) -> tuple[()]:
            found.append(arguments)
            return ()

        recorder = dataclasses.replace(operator.implementations[backend], run=record)
        with (
            mock.patch.dict(operator.implementations, {backend: recorder}),
            contextlib.suppress(Exception),  # of the public function, which gets no result
        ):
            self.public(**self.inputs, **self.options, backend=backend)
        return found[0]

    def torchs(self) -> Function:
        """Return the definition, for inputs in the dtype of the case."""
        return self.definition or self.function("torch")

    def exact(self) -> Function:
        """Return the definition, for inputs in fp64."""
        return self.definition or self.function("torch", **self.exact_options)


def registered() -> dict[str, tuple[Callable[..., Case], Sizes]]:
    """Return `make` and the sizes of every kind of call of every operator, by name."""
    return {
        name: (module.make, sizes)
        for module in map(registry.cases, registry.NAMES)
        for name, sizes in module.SIZES.items()
    }


class RandomTensors:
    """Seeded random tensors, the same numbers on every device; empty ones on "meta"."""

    def __init__(self, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return normally distributed numbers, rounded to `dtype` or that of this object."""
        return self._place(torch.randn, shape, dtype)

    def uniform(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return numbers in [0, 1), rounded likewise."""
        return self._place(torch.rand, shape, dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Return int64 numbers in [0, high)."""
        return (self.uniform(*shape, dtype=torch.float32) * high).long().clamp(max=high - 1)

    def _place(
        self, make: Callable[..., Tensor], shape: tuple[int, ...], dtype: torch.dtype | None
    ) -> Tensor:
        dtype = dtype or self.dtype
        if self.device.type == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        return make(shape, generator=self.generator).to(self.device, dtype)


def count_bytes(*tensors: Tensor | None) -> int:
    """Return the bytes that tensors hold."""
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def key_mask(
    kind: str | None, batch: int, height: int, width: int, device: torch.device | str
) -> Tensor | None:
    """Return a mask bool `[B, h, w]`, True = attend, or None.

    Args:
        kind: "padded" leaves three quarters of the height, of the width and then everything to one
            image after the other; "holes" takes random keys out; "no keys" does too, and leaves
            none to the first image; None masks nothing.
        batch: Images.
        height: Rows of the map.
        width: Columns of the map.
        device: Where it is made.
    """
    if kind is None:
        return None
    mask = torch.ones(batch, height, width, dtype=torch.bool)
    if kind == "padded":
        mask[0::3, height * 3 // 4 :] = False
        mask[1::3, :, width * 3 // 4 :] = False
    else:
        generator = torch.Generator().manual_seed(2)
        mask = torch.rand(batch, height, width, generator=generator) > 0.3
        mask[:, 0, 0] = True
        if kind == "no keys":
            mask[0] = False
    return mask.to(device)
