"""Registration of launchers as operators of torch, `torch.ops.cdetr_fast.*`."""

from collections.abc import Callable
from typing import Any

import torch
from torch.jit import is_tracing

LIBRARY = torch.library.Library("cdetr_fast", "FRAGMENT")


def register(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Define an operator on GPUs, and on CPUs for triton's interpreter; return a call of it.

    Args:
        schema: Name, arguments and results as `torch.library.Library.define` takes them.
        implementation: Launches the kernels.
        fake: Returns empty results of the right shapes.
        backward: Returns the gradients; None registers no autograd.
        setup_context: Keeps what `backward` needs.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, implementation, "CUDA")
    LIBRARY.impl(name, implementation, "CPU")
    operator = getattr(torch.ops.cdetr_fast, name).default
    torch.library.register_fake(f"cdetr_fast::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            f"cdetr_fast::{name}", backward, setup_context=setup_context, lib=LIBRARY
        )
    if backward is None or setup_context is None:
        return operator
    return _differentiable(operator, backward, setup_context)


def _differentiable(
    operator: Callable[..., Any], backward: Callable[..., Any], setup_context: Callable[..., None]
) -> Callable[..., Any]:
    """Return a call with gradients that takes less of the host's time.

    In each call torch's own registration of gradients reads the schema again: forward and backward
    of attention take a fifth longer. What traces or exports gets the operator itself.
    """

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = operator(*inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return backward(ctx, *gradients)

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling() or is_tracing() or not torch.is_grad_enabled():
            return operator(*inputs)
        return Differentiable.apply(*inputs)

    return call


def refuse_second_derivative(name: str) -> Callable[..., Any]:
    """Return the backward of a backward operator that has none."""

    def backward(ctx: Any, *_: Any) -> None:
        raise NotImplementedError(
            f"{name} has no derivative: use backend='torch' for a gradient of the gradient"
        )

    return backward
