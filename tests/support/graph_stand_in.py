"""A CPU that plays what `cdetr_fast.common.cuda_graphs` needs of CUDA.

A capture records each operator below autograd with the tensors it reads and writes; a replay runs
the operators again and leaves the results in the same tensors. So inputs, outputs, gradients and
all between them stay at fixed addresses, as in a real graph, and more strictly than there each
replay spoils what the other graphs of its pool hold, but for what it reads of them itself.

It complains where a GPU would give wrong results or refuse: a graph or a warm-up that does not wait
for the last use of the memory, two captures at a time, a look at a number while capturing. The
host's random numbers are those of the device.
"""

import contextlib
import threading
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cdetr_fast.common import cuda_graphs


class Pool:
    """Memory of several graphs."""

    def __init__(self):
        self.graphs = []
        self.last_graph = None
        self.last_use = None  # stream, and how much it had been given


class Stream:
    """A queue of work that knows which work of other queues it comes after."""

    def __init__(self, *_):
        self.given = 0
        self.after = {}

    def work(self, pool):
        """Do something that uses a pool; what used it before has to be over by then."""
        if pool.last_use is not None:
            stream, given = pool.last_use
            assert stream is self or self.after.get(stream, 0) >= given, "a use was not waited for"
        self.given += 1
        pool.last_use = self, self.given

    def wait_event(self, event):
        for stream, given in event.before.items():
            self.after[stream] = max(given, self.after.get(stream, 0))

    def wait_stream(self, stream):
        event = Event()
        event.record(stream)
        self.wait_event(event)

    def synchronize(self):
        pass


class Event:
    def __init__(self):
        self.before = {}
        self.waits = 0

    def record(self, stream):
        self.before = stream.after | {stream: stream.given}

    def synchronize(self):
        self.waits += 1


class Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        result = function(*args, **kwargs)
        given = {_address(x) for x in _tensors((args, kwargs))}
        fresh = [x for x in _tensors(result) if _address(x) not in given]
        self.calls.append((function, args, kwargs, result, fresh))
        return result

    def reads(self):
        return {_address(x) for _, args, kwargs, *_ in self.calls for x in _tensors((args, kwargs))}

    def writes(self):
        return {_address(x) for *_, fresh in self.calls for x in fresh}


class Graph:
    """Replaces `torch.cuda.CUDAGraph`.

    Attributes:
        source: The graph captured just before, if this one reads its results: the forward pass of
            a backward pass.
    """

    def __init__(self):
        self.cuda, self.pool, self.source, self.recording = None, None, None, Recording()

    def captured(self, cuda, pool):
        self.cuda, self.pool = cuda, pool
        before = pool.graphs[-1] if pool.graphs else None
        if before is not None and self.recording.reads() & before.recording.writes():
            self.source = before
        pool.graphs.append(self)

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)
    def replay(self):
        pool = self.pool
        self.cuda.current_stream().work(pool)
        for graph in pool.graphs:
            if graph is not self and (graph is not self.source or graph is not pool.last_graph):
                graph.spoil()
        for function, args, kwargs, result, fresh in self.recording.calls:
            again = function(*args, **kwargs)
            kept = {id(x) for x in fresh}
            for new, old in zip(_tensors(again), _tensors(result), strict=True):
                if id(old) in kept:
                    old.data.copy_(new)  # no version of autograd's counts it, as with a graph
        if self.source is not None:
            self.source.spoil()  # what it saved for this graph is freed
        pool.last_graph = self

    @torch.no_grad()
    def spoil(self):
        for *_, fresh in self.recording.calls:
            for tensor in fresh:
                tensor.data.fill_(float("nan") if tensor.is_floating_point() else 1)


class Generator:
    """The device's: the host's, which a failed capture leaves unusable."""

    def __init__(self):
        self.renewed = 0

    def get_state(self):
        return torch.default_generator.get_state()

    def set_state(self, state):
        torch.default_generator.set_state(state)

    def graphsafe_set_state(self, generator):
        self.renewed += 1
        torch.default_generator.set_state(generator.get_state())


class Cuda:
    """The part of `torch.cuda` that the package's graphs use.

    Attributes:
        captured: Number of captures that succeeded.
        generator: The device's random numbers.
        allocating: Pools that the allocator is in capture mode for.
        emptied: How often cached memory was given back.
        before_capture: Called before each capture, as another thread might do something then.
    """

    CUDAGraph, Stream, Event, graph_pool_handle = Graph, Stream, Event, Pool

    def __init__(self):
        self.captured, self.emptied = 0, 0
        self.generator = Generator()
        self.default_generators = [self.generator]
        self.allocating = []
        self.before_capture = lambda: None
        self.memory = SimpleNamespace(
            _cuda_endAllocateToPool=self._end_allocation, _cuda_releasePool=lambda *_: None
        )
        self.default_stream = Stream()
        self._current = threading.local()
        self._capturing = threading.Lock()
        self._pools_by_stream = {}

    def is_initialized(self):
        return True

    def is_current_stream_capturing(self):
        return getattr(self._current, "capturing", False)

    def current_device(self):
        return 0

    def device(self, _):
        return contextlib.nullcontext()

    def current_stream(self, _=None):
        return getattr(self._current, "stream", self.default_stream)

    def empty_cache(self):
        self.emptied += 1

    @contextlib.contextmanager
    def stream(self, stream):
        before = self.current_stream()
        self._current.stream = stream
        if stream in self._pools_by_stream:  # the workspaces of libraries, which warm-up uses
            stream.work(self._pools_by_stream[stream])
        try:
            yield
        finally:
            self._current.stream = before

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        self.before_capture()
        assert self._capturing.acquire(blocking=False), "two captures at a time"
        self._current.capturing = True
        self.allocating.append(pool)
        self._pools_by_stream[stream] = pool
        try:
            with graph.recording:
                yield
            self.allocating.remove(pool)  # else it stays, as where CUDA refuses to end a capture
        finally:
            self._current.capturing = False
            self._capturing.release()
        graph.captured(self, pool)
        self.captured += 1

    def _end_allocation(self, _, pool):
        if pool not in self.allocating:
            raise RuntimeError("not currently recording to the pool")
        self.allocating.remove(pool)


def install(monkeypatch):
    """Let graphs run on a CPU; return what plays `torch.cuda`."""
    cuda = Cuda()
    monkeypatch.setattr(cuda_graphs, "cuda", cuda)
    monkeypatch.setattr(cuda_graphs, "DEVICE_TYPE", "cpu")
    return cuda


def _tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def _address(tensor):
    packed = tensor.layout is not torch.strided  # weights of oneDNN, which have no address
    return id(tensor) if packed else tensor.untyped_storage().data_ptr()
