"""A driver that launches nothing: arguments of launches and their host time, without a GPU.

triton's own launch runs as on a GPU, from the arguments to the driver's door; only the compilation
is left out, and the call of the driver.
"""

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from cdetr_kernels import registry

_DEVICE = -7  # no GPU's index: triton keeps compiled kernels by device


class _Loaded(CompiledKernel):
    """A kernel as it is once the driver has loaded it."""

    def __init__(self, launch: Callable[..., None]) -> None:
        self.module, self.function, self.packed_metadata, self._run = object(), 0, (), launch
        self.name, self.src = "", None  # what hooks of profilers are told

    def __del__(self) -> None:
        """Leave out what unloads a module."""


@dataclass
class StubDriver:
    """The part of a driver that triton asks, with the launches that were asked for.

    Args:
        capability: Compute capability, as 90.
        keeps_launches: Whether `launches` is filled.
        launches: Name of the kernel, grid and arguments of each.
        compilations: Names of the kernels, one for each variant.
    """

    capability: int
    keeps_launches: bool = False
    launches: list[tuple[str, tuple[int, ...], tuple[Any, ...]]] = field(default_factory=list)
    compilations: list[str] = field(default_factory=list)

    def get_current_target(self) -> GPUTarget:
        """Return what kernels are compiled for."""
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        """Return the index of the only device."""
        return _DEVICE

    def get_current_stream(self, _device: int) -> int:
        """Return the only stream."""
        return 0

    def compiled(self, kernel: JITFunction[Any], key: str) -> CompiledKernel:
        """Return a kernel that can be launched, without compiling it."""
        name = kernel.fn.__qualname__
        self.compilations.append(name)

        def launch(*arguments: Any) -> None:
            # Grid, stream, function, three of metadata and hooks, and the kernel's own.
            if self.keeps_launches:
                self.launches.append((name, arguments[:3], arguments[9:]))

        made = kernel.device_caches[_DEVICE][0][key] = _Loaded(launch)
        return made


@contextlib.contextmanager
def stubbed(capability: int = 90, compiles: bool = False) -> Iterator[StubDriver]:
    """Make operators on CPU tensors run as on a GPU of a compute capability, launching nothing.

    Args:
        capability: As 90.
        compiles: Compile kernels, into triton's cache on disk; without it nothing is compiled.
    """
    from cdetr_kernels.gpu import launching

    for name in registry.NAMES:  # before the variable is set: triton reads it at decoration
        if "triton" in registry.operator(name).implementations:
            importlib.import_module(f"{registry.__package__}.ops.{name}.triton")
    stub = StubDriver(capability)

    kernels: list[JITFunction[Any]] = []

    compile_ = JITFunction._do_compile

    def compiled(kernel: JITFunction[Any], key: str, *rest: Any) -> CompiledKernel:
        kernels.append(kernel)
        if compiles:
            with mock.patch.dict(os.environ):
                os.environ.pop("TRITON_INTERPRET", None)  # it is for operators, not for triton
                compile_(kernel, key, *rest)
        return stub.compiled(kernel, key)

    launching.forget()
    try:
        with (
            # `driver.active` looks for a GPU, and raises where there is none.
            mock.patch.object(driver, "_active", stub),
            mock.patch.object(JITFunction, "_do_compile", compiled),
            mock.patch.object(launching, "architecture", return_value=f"sm_{capability}"),
            mock.patch.dict(os.environ, TRITON_INTERPRET="1"),  # or they refuse tensors on a CPU
        ):
            yield stub
    finally:
        launching.forget()
        for kernel in kernels:
            kernel.device_caches.pop(_DEVICE, None)
