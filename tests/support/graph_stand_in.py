"""What `torch.cuda.make_graphed_callables` needs of CUDA, played by a CPU.

torch's own function runs on it. A capture records each operator below autograd with the tensors it
reads and writes; a replay runs the operators again and leaves the results in the same tensors. So
inputs, outputs, gradients and all between them lie at fixed addresses, as in a real graph, and more
strictly than there each replay spoils what the other graphs of its pool hold, but for what its own
backward graph needs. A capture cannot look at a number, and the host's random numbers are those of
the device.
"""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cdetr_fast.training import graphs as graphs_module


class Pool:
    """Memory of several graphs, forward and backward in turns as they are captured."""

    def __init__(self):
        self.recordings = []
        self.last = None


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


class Graph:
    """In place of `torch.cuda.CUDAGraph`."""

    def __init__(self):
        self.pool, self.recording = None, Recording()

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)
    def replay(self):
        place = self.pool.recordings.index(self)
        is_backward = place % 2 == 1
        if is_backward and self.pool.last != place - 1:
            self.pool.recordings[place - 1].spoil()
        for other, graph in enumerate(self.pool.recordings):
            if graph is not self and not (is_backward and other == place - 1):
                graph.spoil()
        for function, args, kwargs, result, fresh in self.recording.calls:
            again = function(*args, **kwargs)
            kept = {id(x) for x in fresh}
            for new, old in zip(_tensors(again), _tensors(result), strict=True):
                if id(old) in kept:
                    old.data.copy_(new)  # no version of autograd's counts it, as with a graph
        if is_backward:
            self.pool.recordings[place - 1].spoil()
        self.pool.last = place

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


def install(monkeypatch):
    """Lets the graphs of training run on a CPU; returns the generator."""
    generator = Generator()

    @contextlib.contextmanager
    def capture(graph, stream, pool, capture_error_mode, **_):
        assert capture_error_mode == "thread_local"
        with graph.recording:
            yield
        graph.pool = pool
        pool.recordings.append(graph)

    for name, stand_in in {
        "CUDAGraph": Graph,
        "graph": capture,
        "graph_pool_handle": Pool,
        "synchronize": lambda *_: None,
        "Stream": object,
        "stream": lambda _: contextlib.nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(graphs_module, "_generator", lambda device: generator)
    return generator


def _tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def _address(tensor):
    return tensor.untyped_storage().data_ptr()
