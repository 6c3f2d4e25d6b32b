"""Helpers of the launchers: the architecture of a device, the precision of dots, the launch.

triton binds, specialises and looks up every argument in every call, which takes more of the host
than all else that an operator does. So `run` keeps, for each kind of call (shapes, strides, dtypes,
alignment, numbers), the compiled kernels and their arguments; a later call of the kind fills in
addresses.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from cdetr_kernels import evidence
from cdetr_kernels.gpu import configurations
from cdetr_kernels.gpu.tiles import Tile

# triton decides when it decorates a kernel, that is when this package is imported.
INTERPRETED = bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Launch:
    """One kernel with its grid, arguments and tile: what runs, and what the audit compiles."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    tile: Tile

    @property
    def options(self) -> dict[str, Any]:
        """Compiler options of the launch."""
        # Multiply-adds with one rounding, as in every library; triton 3.10 has another default.
        return {
            "num_warps": self.tile.warps,
            "num_stages": self.tile.stages,
            "enable_fp_fusion": True,
        }

    def run(self) -> Any:
        """Launch on the current stream of the current device; return the compiled kernel."""
        if self.programs == 0:
            return None
        return self.kernel[(self.programs,)](**self.arguments, **self.options)


Make = Callable[..., Launch | Sequence[Launch]]


@dataclass(frozen=True)
class _Prepared:
    """A compiled kernel with its grid, its arguments, and which of them are addresses."""

    launch: Callable[..., None]
    arguments: list[Any]
    addresses: tuple[tuple[int, int], ...]  # position among the arguments, index of the tensor


@dataclass(frozen=True)
class _Plan:
    """The launches of one kind of call, and the memory that they need besides its tensors."""

    prepared: tuple[_Prepared, ...]
    scratch: tuple[tuple[torch.Size, torch.dtype], ...]

    def run(self, like: Tensor, addresses: list[int]) -> None:
        scratch = [like.new_empty(shape, dtype=dtype) for shape, dtype in self.scratch]
        addresses += [x.data_ptr() for x in scratch]
        for x in self.prepared:
            arguments = x.arguments.copy()
            for position, index in x.addresses:
                arguments[position] = addresses[index]
            x.launch(*arguments)


_IS_HIP = torch.version.hip is not None
_PLANS: dict[tuple[Any, ...], _Plan] = {}
# Of a few kilobytes each. Beyond that, sizes change all the time: all are dropped.
_MOST_PLANS = 4096


def run(make: Make, *inputs: Any) -> None:
    """Launch what `make` returns for some inputs, on the current stream of their device.

    Args:
        make: Returns a launch, or several in their order. It may go by shapes, strides and dtypes
            of the tensors, by the numbers among the inputs, by what is the same in the whole
            process, and by `dot_precision` of the first tensor's dtype. Memory that it allocates is
            allocated in each call.
        inputs: Tensors, all that the kernels read and write, and what else `make` takes. The first
            one is a tensor.
    """
    index = inputs[0].get_device()
    if index >= 0 and index != torch.cuda.current_device():
        with torch.cuda.device(index):
            _run(make, inputs)
    else:
        _run(make, inputs)


def _run(make: Make, inputs: tuple[Any, ...]) -> None:
    if INTERPRETED:
        for launch in _launches(make, inputs):
            launch.run()
        return
    key: list[Any] = [make]
    if inputs[0].dtype == torch.float32:
        key.append(dot_precision(torch.float32))
    addresses = []
    for x in inputs:
        if isinstance(x, Tensor):
            address = x.data_ptr()
            addresses.append(address)
            # Besides sizes, triton specialises kernels on the alignment of addresses, and for AMD
            # on whether 32 bits reach all of a tensor.
            key += x.dtype, x.shape, x.stride(), address % 16 == 0, x.get_device()
            if _IS_HIP:
                key.append(x.untyped_storage().nbytes() < 2**31)
        else:
            key.append(x)
    kind = tuple(key)
    plan = _PLANS.get(kind)
    if plan is not None:
        plan.run(inputs[0], addresses)
        return
    if len(_PLANS) >= _MOST_PLANS:
        _PLANS.clear()
    _PLANS[kind] = _launch_first(make, inputs)


def _launch_first(make: Make, inputs: tuple[Any, ...]) -> _Plan:
    """Launch by way of triton, which compiles; return the plan of later calls."""
    # A tensor that is there twice need not be in the next call of this kind.
    seen: set[int] = set()
    inputs = tuple(
        x.detach() if isinstance(x, Tensor) and (id(x) in seen or seen.add(id(x))) else x
        for x in inputs
    )
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    known = {id(x): i for i, x in enumerate(tensors)}
    prepared, scratch = [], []
    for launch in _launches(make, inputs):
        compiled = launch.run()
        if compiled is None:
            continue
        arguments, addresses = [], []
        for position, name in enumerate(launch.kernel.arg_names):
            x = launch.arguments[name]
            if isinstance(x, Tensor):
                if id(x) not in known:
                    known[id(x)] = len(tensors) + len(scratch)
                    scratch.append(x)
                addresses.append((position, known[id(x)]))
                x = 0
            arguments.append(x)
        grid = (launch.programs, 1, 1)
        prepared.append(_Prepared(compiled[grid], arguments, tuple(addresses)))
    return _Plan(tuple(prepared), tuple((x.shape, x.dtype) for x in scratch))


def _launches(make: Make, inputs: tuple[Any, ...]) -> Sequence[Launch]:
    made = make(*inputs)
    return (made,) if isinstance(made, Launch) else made


def forget() -> None:
    """Make later calls choose tiles and parts again: what chooses them has changed."""
    _PLANS.clear()


def strides(name: str, axes: str, tensor: Tensor) -> dict[str, int]:
    """Return the arguments that hold the strides of a tensor: `name_a` for each of its axes."""
    return {f"{name}_{axis}": step for axis, step in zip(axes, tensor.stride(), strict=True)}


def shared_strides(name: str, axes: str, tensor: Tensor | None) -> dict[str, int]:
    """Return strides as `strides` does, 0 for an absent tensor and along a batch of 1."""
    if tensor is None:
        return dict.fromkeys((f"{name}_{axis}" for axis in axes), 0)
    # A size of 1 is shared by the batch: whatever its stride is, no step is taken.
    shared = {f"{name}_b": 0} if len(tensor) == 1 else {}
    return strides(name, axes, tensor) | shared


@functools.lru_cache
def architecture(device: torch.device) -> str:
    """Return "sm_90", "gfx942" and the like, or "interpreter" for a CPU."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.lru_cache
def multiprocessors(device: torch.device) -> int:
    """Return how many programs run side by side at least."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def dot_precision(dtype: torch.dtype) -> str:
    """Return how kernels multiply: "tf32" for fp32 where torch is allowed to, else "ieee"."""
    if INTERPRETED and dtype == torch.bfloat16:
        return "interpreted_bf16"
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if dtype == torch.float32 and allowed and not torch.version.hip else "ieee"


def sum_precision(dtype: torch.dtype, device: torch.device) -> str:
    """Return how kernels for `dtype` multiply fp32 sums with what they read.

    For fp32 that is `dot_precision`. Numbers in half precision lose nothing in TF32, and sums less
    than if they were rounded to half precision.
    """
    if dtype == torch.float32:
        return dot_precision(dtype)
    return "tf32" if architecture(device).startswith("sm_") else "ieee"


def attention_tile(kernel: str, q_content: Tensor, value: Tensor) -> Tile:
    """Return the tile of an attention kernel for these tensors.

    Kernels over queries go by `[B, Q, N, D]`, those over keys by `[B, S, N, Dv]`.
    """
    half = q_content.dtype != torch.float32
    precision = "half" if half else dot_precision(q_content.dtype)
    size = max(q_content.shape[-1], value.shape[-1])
    device = q_content.device
    if device.type in ("cuda", "cpu"):  # not "meta", where the audit's launches are
        record = evidence.of(device).record
        if record is not None and record.tiles:
            batch, rows, heads, _ = (value if "_keys" in kernel else q_content).shape
            many = configurations.fills(batch * rows * heads, multiprocessors(device))
            name = f"{precision} {configurations.width(size)} {kernel}"
            found = record.tiles.get(name + configurations.MANY * many)
            if found is not None:
                return Tile.of(found)
    return configurations.tile(kernel, architecture(device), precision, size)
