"""CUDA graphs, one per shape of input: capture, shared memory, order of use, failures.

A captured graph is work that the host launches at once. It reads and writes fixed addresses, so
inputs are copied in and results copied out. Graphs that share memory never run side by side: each
use waits, on the device, for the one before.
"""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, cuda

from cdetr_fast.common.errors import first_line

DEVICE_TYPE = "cuda"
"""Type of the devices that graphs run on."""

# torch captures one graph at a time per process, and must not free memory or wait for the device
# meanwhile.
_CAPTURE_LOCK = threading.RLock()

Graph = TypeVar("Graph")
Result = TypeVar("Result")


def is_capturing() -> bool:
    """Return whether a graph is being captured: results then have values in its replays only."""
    return cuda.is_initialized() and cuda.is_current_stream_capturing()


def current_stream(device: torch.device) -> cuda.Stream | None:
    """Return the stream that work on a device is given to, None where there are no streams."""
    return cuda.current_stream(device) if device.type == DEVICE_TYPE else None


def free_cached_memory() -> None:
    """Give memory that torch keeps for later back to the device."""
    with _CAPTURE_LOCK:
        cuda.empty_cache()


class GraphKey(NamedTuple):
    """Inputs that a graph is captured for.

    Attributes:
        shape: Shape of the images `[B, C, H, W]`.
        dtype: Dtype of the images, or that of autocast.
        masked: Whether there is a padding mask.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    masked: bool

    def __str__(self) -> str:
        batch, _, height, width = self.shape
        mask = "with a mask" if self.masked else "without mask"
        return f"{batch} x {height} x {width}, {str(self.dtype).removeprefix('torch.')}, {mask}"


class GraphMemory:
    """Memory pool and stream that graphs are captured in, and the order in which they run.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with cuda.device(device):
            self._pool = cuda.graph_pool_handle()
            # One stream for all captures: a pool reuses memory only on the stream that freed it.
            self._stream = cuda.Stream(device)
            self._last_use = cuda.Event()

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """Run warm-up and captures on the capture stream, one thread of the process at a time.

        The device's random numbers are afterwards as if nothing had run.
        """
        with _CAPTURE_LOCK, cuda.device(self.device), _random_numbers_kept(self.device):
            caller = cuda.current_stream(self.device)
            self._stream.wait_stream(caller)
            # A graph that another thread launched may still use the workspaces of this stream.
            self._stream.wait_event(self._last_use)
            with cuda.stream(self._stream):
                yield
            caller.wait_stream(self._stream)

    def capture(self, call: Callable[[], Result]) -> tuple[cuda.CUDAGraph, Result]:
        """Capture a call, inside `preparing`; return the graph and the tensors that it writes."""
        self._stream.synchronize()
        graph = cuda.CUDAGraph()
        try:
            # thread_local: threads that load data or watch collectives may use the device meanwhile
            with cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                result = call()
        except BaseException:
            self._end_allocation()
            raise
        return graph, result

    @contextlib.contextmanager
    def using(self) -> Iterator[None]:
        """Make the current stream wait for the last use of the memory, and later uses for this."""
        stream = cuda.current_stream(self.device)
        stream.wait_event(self._last_use)
        try:
            yield
        finally:
            self._last_use.record(stream)

    def wait(self) -> None:
        """Wait, on the host, until no graph runs."""
        self._last_use.synchronize()

    def _end_allocation(self) -> None:
        """End the allocator's capture mode, which torch leaves on where CUDA refuses a capture."""
        index = self.device.index if self.device.index is not None else cuda.current_device()
        memory: Any = cuda.memory  # torch declares no public names for these two
        with contextlib.suppress(RuntimeError):  # it had ended
            memory._cuda_endAllocateToPool(index, self._pool)
            memory._cuda_releasePool(index, self._pool)


class GraphTable(Generic[Graph]):
    """Captured graphs by the inputs they are for, least recently used first, and failures.

    Attributes:
        limit: Number of graphs to keep; `drop` makes room.
        graphs: The graphs.
        failures: Inputs that could not be captured, with the reason.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.graphs: OrderedDict[GraphKey, Graph] = OrderedDict()
        self.failures: dict[GraphKey, str] = {}
        self._memory: GraphMemory | None = None

    @property
    def is_full(self) -> bool:
        """Whether a graph has to be dropped before the next capture."""
        return len(self.graphs) >= self.limit

    def capture(
        self, key: GraphKey, device: torch.device, make: Callable[[GraphMemory], Graph]
    ) -> Graph | None:
        """Make and keep a graph; return None, and keep the reason, if that fails."""
        if self._memory is None:
            self._memory = GraphMemory(device)
        try:
            graph = make(self._memory)
        except Exception as error:  # a library in the call may refuse capture in any way
            self.failures[key] = f"{type(error).__name__}: {first_line(error)}"
            return None
        self.graphs[key] = graph
        return graph

    def drop(self, *keys: GraphKey) -> None:
        """Drop graphs, once none runs."""
        if keys and self._memory is not None:
            with _CAPTURE_LOCK:
                self._memory.wait()
                for key in keys:
                    del self.graphs[key]

    def describe(self) -> list[tuple[str, str]]:
        """Return which inputs have graphs, and which do not, with the reason."""
        rows = [("graph", str(key)) for key in self.graphs]
        return rows + [("no graph", f"{key}: {why}") for key, why in self.failures.items()]


def channels_last_copy(pixel_values: Tensor) -> Tensor:
    """Return a copy of images in the memory format of the backbone, for a graph to read."""
    return torch.empty_like(pixel_values, memory_format=torch.channels_last).copy_(pixel_values)


@contextlib.contextmanager
def _random_numbers_kept(device: torch.device) -> Iterator[None]:
    """Leave the device's random numbers as if nothing had run."""
    index = device.index if device.index is not None else cuda.current_device()
    generator = cuda.default_generators[index]
    state = generator.get_state()
    try:
        yield
    except BaseException:
        # A capture that failed may leave the generator's state in capture for ever.
        fresh = torch.Generator(device)
        fresh.set_state(state)
        generator.graphsafe_set_state(fresh)
        raise
    generator.set_state(state)
