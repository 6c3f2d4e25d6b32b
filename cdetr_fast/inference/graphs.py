"""Inference by CUDA graphs, captured when a shape is first seen."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, cuda

from cdetr_fast.common.cuda_graphs import (
    GraphKey,
    GraphMemory,
    GraphTable,
    channels_last_copy,
    free_cached_memory,
    is_capturing,
)

Outputs = dict[str, Tensor]
Call = Callable[[Tensor, Tensor | None], Outputs]

_WARM_UP = 2  # libraries choose algorithms and allocate workspaces in the first calls


class GraphCache:
    """Runs a call through graphs; a shape that cannot be captured runs without from then on.

    Args:
        call: Computes outputs from images and a mask (or None), on one device.
        constants: Returns tensors that the call reads besides its arguments and the weights; a
            graph keeps them alive.
        limit: Number of graphs to keep; the least recently used one is dropped first.
        static_outputs: Return the graphs' own tensors, which the next use overwrites.
    """

    def __init__(
        self, call: Call, constants: Callable[[], object], limit: int, static_outputs: bool
    ) -> None:
        self._call, self._constants = call, constants
        self._static_outputs = static_outputs
        self._table: GraphTable[_InferenceGraph] = GraphTable(limit)
        self._lock = threading.RLock()

    def __call__(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> Outputs:
        """Return what the call does."""
        if is_capturing():  # by the caller, whose graph cannot hold another one
            return self._call(pixel_values, pixel_mask)
        key = GraphKey(tuple(pixel_values.shape), pixel_values.dtype, pixel_mask is not None)
        table = self._table
        with self._lock:
            graph = table.graphs.get(key)
            if graph is None and key not in table.failures:
                while table.is_full:
                    table.drop(next(iter(table.graphs)))
                graph = table.capture(
                    key,
                    pixel_values.device,
                    lambda memory: self._capture(memory, pixel_values, pixel_mask),
                )
            if graph is None:
                return self._without_graph(pixel_values, pixel_mask)
            table.graphs.move_to_end(key)
            return graph.replay(pixel_values, pixel_mask, self._static_outputs)

    def describe(self) -> list[tuple[str, str]]:
        """Return which shapes have graphs, and which do not, with the reason."""
        with self._lock:
            return self._table.describe()

    def clear(self) -> None:
        """Drop all graphs and failures, once no graph runs."""
        with self._lock:
            self._table.drop(*self._table.graphs)
            self._table.failures.clear()

    def _capture(
        self, memory: GraphMemory, pixel_values: Tensor, pixel_mask: Tensor | None
    ) -> "_InferenceGraph":
        # Tensors that later calls may write to, in inference mode or not.
        with torch.inference_mode(False), torch.no_grad():
            pixel_values = channels_last_copy(pixel_values)
            if pixel_mask is not None:
                pixel_mask = torch.empty_like(pixel_mask, dtype=torch.bool).copy_(pixel_mask)
            with memory.preparing():
                for _ in range(_WARM_UP):
                    self._call(pixel_values, pixel_mask)
                graph, outputs = memory.capture(lambda: self._call(pixel_values, pixel_mask))
            return _InferenceGraph(
                memory, graph, pixel_values, pixel_mask, outputs, self._constants()
            )

    def _without_graph(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> Outputs:
        try:
            return self._call(pixel_values, pixel_mask)
        except torch.OutOfMemoryError:
            if not self._table.graphs:
                raise
        self._table.drop(*self._table.graphs)  # their memory may be what is missing
        free_cached_memory()
        return self._call(pixel_values, pixel_mask)


@dataclass
class _InferenceGraph:
    """One graph, the tensors that it reads and writes, and the constants that it reads."""

    memory: GraphMemory
    graph: cuda.CUDAGraph
    pixel_values: Tensor
    pixel_mask: Tensor | None
    outputs: Outputs
    constants: object

    def replay(
        self, pixel_values: Tensor, pixel_mask: Tensor | None, static_outputs: bool
    ) -> Outputs:
        with self.memory.using():
            self.pixel_values.copy_(pixel_values, non_blocking=True)
            if self.pixel_mask is not None and pixel_mask is not None:
                self.pixel_mask.copy_(pixel_mask, non_blocking=True)
            self.graph.replay()
            if static_outputs:
                return dict(self.outputs)
            return {name: tensor.clone() for name, tensor in self.outputs.items()}
