"""The check of accuracy that a provider has to pass before its speed is reported."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.works import Function, Work

# Of torch's own error. Whatever is not a kernel of ours rounds where it likes.
KERNELS_FACTOR, OTHERS_FACTOR = 2.0, 10.0


def factor(provider: str) -> float:
    """Returns how many times torch's error against fp64 a provider may have."""
    kernel = provider.startswith("cdetr_fast") and not provider.endswith("torch")
    return KERNELS_FACTOR if kernel else OTHERS_FACTOR


@dataclasses.dataclass(frozen=True)
class Results:
    """Outputs of one call and, in mode "forward and backward", the gradients of its inputs."""

    outputs: tuple[Tensor, ...]
    gradients: dict[str, Tensor]

    def named(self) -> dict[str, Tensor]:
        outputs = {f"output {i}": x for i, x in enumerate(self.outputs)}
        return outputs | {f"gradient of {name}": x for name, x in self.gradients.items()}


@dataclasses.dataclass(frozen=True)
class Error:
    """The largest difference from fp64 in one tensor, torch's own, and what is allowed."""

    name: str
    error: float
    torchs: float
    floor: float

    def passes(self, factor: float) -> bool:
        return self.error <= factor * self.torchs + self.floor  # not if it is NaN


def tensors(output: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else tuple(output)


def grad_outputs(work: Work, outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The same random numbers for every provider, in the dtype of each output."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(x.shape, generator=generator).to(x.device, work.dtype).to(x.dtype)
        for x in outputs
    ]


def evaluate(
    function: Function,
    inputs: dict[str, Tensor | None],
    gradients: Sequence[str] = (),
    grads: Sequence[Tensor] = (),
    images: Tensor | None = None,
) -> Results:
    """Calls `function` and keeps results of `images` (all of them if None).

    Args:
        function: Takes the inputs by name.
        inputs: Tensors.
        gradients: Names of those that get a gradient.
        grads: Gradients of the outputs, if there are any.
        images: Indices into the first axis.
    """
    leaves = {
        name: x.detach().requires_grad_() if name in gradients else x for name, x in inputs.items()
    }
    outputs = tensors(function(**leaves))
    found = {}
    if gradients:
        wanted = [leaves[name] for name in gradients]
        grads = [g.to(x.dtype) for g, x in zip(grads, outputs, strict=True)]
        found = dict(zip(gradients, torch.autograd.grad(outputs, wanted, grads), strict=True))

    def kept(x):
        return x.detach() if images is None else x.detach()[images]

    return Results(tuple(map(kept, outputs)), {name: kept(x) for name, x in found.items()})


class Judge:
    """Holds what providers of a `Work` are compared with: fp64, and torch in the work's dtype.

    Args:
        work: What is checked. Of a work of many images the first and the last are.
        backward: Whether gradients are checked too.
    """

    def __init__(self, work: Work, backward: bool) -> None:
        self.work = work
        self.names = work.gradients if backward else ()
        first = next(x for x in work.inputs.values() if x is not None)
        self.images, inputs = None, work.inputs
        if work.per_image and len(first) > 2:
            self.images = torch.tensor([0, len(first) - 1], device=first.device)
            inputs = {
                name: None if x is None else x[self.images] for name, x in work.inputs.items()
            }
        doubles = {
            name: x.double() if x is not None and x.is_floating_point() else x
            for name, x in inputs.items()
        }
        grads: Sequence[Tensor] = ()
        self.grads: Sequence[Tensor] = ()
        if self.names:
            with torch.no_grad():
                whole = tensors(work.exact(**work.inputs))
            self.grads = grads = grad_outputs(work, whole)
            if self.images is not None:
                grads = [x[self.images] for x in grads]
        with torch.set_grad_enabled(bool(self.names)):
            self.exact = evaluate(work.exact, doubles, self.names, grads).named()
            plain = work.plain or work.exact
            self.torchs = evaluate(plain, inputs, self.names, grads).named()

    def evaluate(self, function: Function) -> Results:
        with torch.set_grad_enabled(bool(self.names)):
            return evaluate(function, self.work.inputs, self.names, self.grads, self.images)

    def errors(self, got: Results) -> list[Error]:
        """One for each output and gradient."""
        found = []
        for name, x in got.named().items():
            exact, torchs = self.exact[name], self.torchs[name]
            if x.shape != exact.shape:
                raise ValueError(f"{name}: expected {list(exact.shape)}, got {list(x.shape)}")
            # One rounding of the result, and the cancellation of two fp32 sums.
            eps = torch.finfo(x.dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps
            largest = exact.abs().max().item() if exact.numel() else 0.0
            found.append(
                Error(name, _distance(x, exact), _distance(torchs, exact), eps * max(1.0, largest))
            )
        return found


def _distance(got: Tensor, exact: Tensor) -> float:
    return (got.double() - exact.double()).abs().max().item() if exact.numel() else 0.0
