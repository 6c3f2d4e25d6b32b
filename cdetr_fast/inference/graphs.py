"""CUDA graphs of an engine, one a shape, in one pool of memory.

A captured graph is a forward pass that the host launches at once. It reads and writes fixed
addresses, so images are copied in and results copied out, and graphs that share a pool never run
side by side: each use waits, on the device, for the one before.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Outputs = dict[str, Tensor]
Key = tuple[tuple[int, ...], torch.dtype, bool]


@dataclass
class Captured:
    """One graph with its tensors.

    Attributes:
        replay: Launches it on the current stream.
        pixel_values: Where it reads images.
        pixel_mask: Where it reads the mask; None if it was captured without one.
        outputs: Where it leaves results.
        held: What it reads besides, which has to stay alive.
    """

    replay: Callable[[], Any]
    pixel_values: Tensor
    pixel_mask: Tensor | None
    outputs: Outputs
    held: Any = None


class Capturer(Protocol):
    """What captures graphs and orders their uses."""

    def capture(
        self, call: Callable, pixel_values: Tensor, pixel_mask: Tensor | None
    ) -> Captured: ...

    def begin(self) -> None:
        """Makes the current stream wait for the last use of the pool."""

    def end(self) -> None:
        """Marks the end of a use."""

    def wait(self) -> None:
        """Waits, on the host, until no graph runs."""


class CudaCapturer:
    """Captures on a CUDA device.

    Args:
        device: The device.
    """

    device_type = "cuda"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(device)
            self._done = torch.cuda.Event()

    def capture(self, call: Callable, pixel_values: Tensor, pixel_mask: Tensor | None) -> Captured:
        with torch.cuda.device(self.device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                # Libraries choose algorithms and allocate workspaces in the first calls.
                for _ in range(2):
                    call(pixel_values, pixel_mask)
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            # thread_local: other threads may go on using the device meanwhile
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                outputs = call(pixel_values, pixel_mask)
            torch.cuda.current_stream().wait_stream(self._stream)
        return Captured(graph.replay, pixel_values, pixel_mask, outputs, held=graph)

    def begin(self) -> None:
        torch.cuda.current_stream(self.device).wait_event(self._done)

    def end(self) -> None:
        self._done.record(torch.cuda.current_stream(self.device))

    def wait(self) -> None:
        self._done.synchronize()


class GraphCache:
    """Runs a call through graphs, captured when a shape is first seen.

    Args:
        call: Computes outputs from images and a mask (or None), on one device.
        held: Gives what the call reads besides its arguments and weights.
        capturer: What captures.
        limit: Graphs that are kept; the one not used for longest is dropped first.
        static_outputs: Return the graphs' own tensors.
    """

    def __init__(
        self,
        call: Callable[[Tensor, Tensor | None], Outputs],
        held: Callable[[], Any],
        capturer: Capturer,
        limit: int,
        static_outputs: bool,
    ) -> None:
        self._call, self._held, self._capturer = call, held, capturer
        self._limit, self._static_outputs = limit, static_outputs
        self._graphs: OrderedDict[Key, Captured] = OrderedDict()
        self._lock = threading.RLock()
        self.failures: dict[Key, str] = {}

    def __call__(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> Outputs:
        """Runs the call; a shape that cannot be captured runs without a graph from then on."""
        key = (tuple(pixel_values.shape), pixel_values.dtype, pixel_mask is not None)
        with self._lock:
            if key in self.failures:
                return self._without_graph(pixel_values, pixel_mask)
            captured = self._graphs.get(key)
            if captured is None:
                captured = self._capture(key, pixel_values, pixel_mask)
                if captured is None:
                    return self._without_graph(pixel_values, pixel_mask)
            self._graphs.move_to_end(key)
            self._capturer.begin()
            captured.pixel_values.copy_(pixel_values, non_blocking=True)
            if pixel_mask is not None:
                captured.pixel_mask.copy_(pixel_mask, non_blocking=True)
            captured.replay()
            outputs = captured.outputs
            if not self._static_outputs:
                outputs = {name: tensor.clone() for name, tensor in outputs.items()}
            self._capturer.end()
        return dict(outputs)

    def describe(self) -> list[tuple[str, str]]:
        """Which shapes have graphs, and which do not, with the reason."""
        with self._lock:
            rows = [("graph", describe(key)) for key in self._graphs]
            rows += [("no graph", f"{describe(k)}: {r}") for k, r in self.failures.items()]
        return rows

    def clear(self) -> None:
        """Drops all graphs, once none of them runs."""
        with self._lock:
            if self._graphs:
                self._capturer.wait()
            self._graphs.clear()
            self.failures.clear()

    def _capture(
        self, key: Key, pixel_values: Tensor, pixel_mask: Tensor | None
    ) -> Captured | None:
        while len(self._graphs) >= self._limit:
            self._drop_oldest()
        try:
            # Tensors that may be written to in later calls, in inference mode or not; channels-last
            # as the backbone wants them.
            with torch.inference_mode(False), torch.no_grad():
                static_values = torch.empty_like(pixel_values, memory_format=torch.channels_last)
                static_values.copy_(pixel_values)
                static_mask = None
                if pixel_mask is not None:
                    static_mask = torch.empty_like(pixel_mask, dtype=torch.bool).copy_(pixel_mask)
                captured = self._capturer.capture(self._call, static_values, static_mask)
        except Exception as error:  # a library in the call may refuse capture in any way
            lines = str(error).strip().splitlines()
            self.failures[key] = f"{type(error).__name__}: {lines[0] if lines else ''}"
            return None
        captured.held = (captured.held, self._held())
        self._graphs[key] = captured
        return captured

    def _drop_oldest(self) -> None:
        self._capturer.wait()
        self._graphs.popitem(last=False)

    def _without_graph(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> Outputs:
        try:
            return self._call(pixel_values, pixel_mask)
        except torch.OutOfMemoryError:
            if not self._graphs:
                raise
        while self._graphs:  # their memory may be what is missing
            self._drop_oldest()
        torch.cuda.empty_cache()
        return self._call(pixel_values, pixel_mask)


def describe(key: Key) -> str:
    """Says in words what a graph is for."""
    (batch, _, height, width), dtype, masked = key
    mask = "with a mask" if masked else "without mask"
    return f"{batch} x {height} x {width}, {str(dtype).removeprefix('torch.')}, {mask}"
