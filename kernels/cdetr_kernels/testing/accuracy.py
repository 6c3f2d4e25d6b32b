"""Check of accuracy against fp64, in multiples of the error of torch itself."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from cdetr_kernels.testing.case import Case, Function, Inputs

# Of torch's own error. What is not a kernel of ours rounds where it likes.
KERNELS_FACTOR, OTHERS_FACTOR = 2.0, 10.0


def factor(provider: str) -> float:
    """Return how many times torch's error against fp64 a provider may have."""
    kernel = provider.startswith("cdetr_fast") and not provider.endswith("torch")
    return KERNELS_FACTOR if kernel else OTHERS_FACTOR


@dataclasses.dataclass(frozen=True)
class Results:
    """Outputs of one call and, in mode "forward and backward", the gradients of its inputs."""

    outputs: tuple[Tensor, ...]
    gradients: dict[str, Tensor]

    def named(self) -> dict[str, Tensor]:
        """Return all tensors by a name that errors print."""
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
        """Return whether the error is at most `factor` times torch's, and a rounding."""
        return self.error <= factor * self.torchs + self.floor  # not if it is NaN


def tensors(output: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return one or several outputs as a tuple."""
    return (output,) if isinstance(output, Tensor) else tuple(output)


def grad_outputs(case: Case, outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the same random numbers for every provider, in the dtype of each output."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(x.shape, generator=generator).to(x.device, case.dtype).to(x.dtype)
        for x in outputs
    ]


def evaluate(
    function: Function,
    inputs: Inputs,
    gradients: Sequence[str] = (),
    grads: Sequence[Tensor] = (),
    images: Tensor | None = None,
) -> Results:
    """Call `function` and keep the results of `images` (all of them if None).

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
    found: dict[str, Tensor] = {}
    if gradients:
        wanted = [leaves[name] for name in gradients]
        grads = [g.to(x.dtype) for g, x in zip(grads, outputs, strict=True)]
        found = dict(zip(gradients, torch.autograd.grad(outputs, wanted, grads), strict=True))

    def kept(x: Tensor) -> Tensor:
        return x.detach() if images is None else x.detach()[images]

    return Results(tuple(map(kept, outputs)), {name: kept(x) for name, x in found.items()})


class Judge:
    """References of a case: fp64, and torch in the dtype of the case.

    Args:
        case: What is checked. Of a case of many images the first and the last are.
        backward: Whether gradients are checked too.
    """

    def __init__(self, case: Case, backward: bool) -> None:
        self.case = case
        self.names = case.gradients if backward else ()
        first = next(x for x in case.inputs.values() if x is not None)
        self.images: Tensor | None = None
        inputs = case.inputs
        if case.per_image and len(first) > 2:
            self.images = kept = torch.tensor([0, len(first) - 1], device=first.device)
            inputs = {name: None if x is None else x[kept] for name, x in case.inputs.items()}
        doubles = {
            name: x.double() if x is not None and x.is_floating_point() else x
            for name, x in inputs.items()
        }
        grads: Sequence[Tensor] = ()
        self.grads: Sequence[Tensor] = ()
        if self.names:
            with torch.no_grad():
                whole = tensors(case.torchs()(**case.inputs))
            self.grads = grads = grad_outputs(case, whole)
            if self.images is not None:
                grads = [x[self.images] for x in grads]
        with torch.set_grad_enabled(bool(self.names)):
            self.exact = evaluate(case.exact(), doubles, self.names, grads).named()
            self.torchs = evaluate(case.torchs(), inputs, self.names, grads).named()

    def evaluate(self, function: Function) -> Results:
        """Call a provider, with gradients if they are checked."""
        with torch.set_grad_enabled(bool(self.names)):
            return evaluate(function, self.case.inputs, self.names, self.grads, self.images)

    def errors(self, got: Results) -> list[Error]:
        """Return an error for each output and gradient."""
        found = []
        for name, x in got.named().items():
            exact, torchs = self.exact[name], self.torchs[name]
            if x.shape != exact.shape:
                raise ValueError(f"{name}: expected {list(exact.shape)}, got {list(x.shape)}")
            # One rounding of the result, and the cancellation of two fp32 sums.
            eps = torch.finfo(x.dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps
            largest = float(exact.abs().max()) if exact.numel() else 0.0
            found.append(
                Error(name, _distance(x, exact), _distance(torchs, exact), eps * max(1.0, largest))
            )
        return found


def _distance(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact.double()).abs().max()) if exact.numel() else 0.0
