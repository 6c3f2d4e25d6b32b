"""Registration of launchers as operators of torch, `torch.ops.cdetr_fast.*`."""

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("cdetr_fast", "FRAGMENT")


def register(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> None:
    """Define an operator on GPUs, and on CPUs for triton's interpreter.

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
    torch.library.register_fake(f"cdetr_fast::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            f"cdetr_fast::{name}", backward, setup_context=setup_context, lib=LIBRARY
        )


def refuse_second_derivative(name: str) -> Callable[..., Any]:
    """Return the backward of a backward operator that has none."""

    def backward(ctx: Any, *_: Any) -> None:
        raise NotImplementedError(
            f"{name} has no derivative: use backend='torch' for a gradient of the gradient"
        )

    return backward
