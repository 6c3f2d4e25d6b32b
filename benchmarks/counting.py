"""What a step asks of torch and of the host, counted on a CPU.

A dispatch is a call of an operator below autograd whose result is not a view of its input: on a GPU
a kernel, mostly. A wait of the host for the device cannot happen on a CPU, but what would cause one
can be seen: a number that is read from a tensor (`item`, `tolist`, an `if`), `cpu()`, and an index
or operator whose result has as many elements as a mask has ones. The other way, each tensor made
of the host's data would be a copy to the device. What is counted is counted where it is called, so
that a copy from CPU to CPU, which does nothing, counts too. Not seen: `to(device)` of what is there
already, and waits inside of torch's operators, for memory say.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cdetr_fast.models import modeling

# Their results have as many elements as there are ones: the host has to know.
COUNTING_OPS = {"nonzero", "masked_select", "_unique2", "repeat_interleave"}
MASKED_INDICES = {"index", "index_put", "index_put_"}


class Counting(TorchDispatchMode):
    """Counts dispatches, waits of the host, and copies to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.dispatches = Counter()
        self.waits = Counter()
        self.copies = Counter()
        self._patches = contextlib.ExitStack()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        results = [result.alias_info for result in function._schema.returns]
        if not (results and all(alias and not alias.is_write for alias in results)):
            self.dispatches[name] += 1
        if name == "_local_scalar_dense" or name in COUNTING_OPS:
            self.waits[name] += 1
        if name in MASKED_INDICES and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        ):
            self.waits["a mask as index"] += 1
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        self._watch(Tensor, "cpu", self.waits)
        for name in ("tensor", "as_tensor", "from_numpy"):
            self._watch(torch, name, self.copies)
        return super().__enter__()

    def __exit__(self, *exception):
        self._patches.close()
        return super().__exit__(*exception)

    def _watch(self, owner, name, counter):
        function = getattr(owner, name)

        def watched(*args, **kwargs):
            counter[name] += 1
            return function(*args, **kwargs)

        self._patches.enter_context(mock.patch.object(owner, name, watched))


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Keeps our models from looking at masks, for ones and rectangles, as they do on a CPU."""
    position = modeling.ConditionalDetrSinePositionEmbedding
    with (
        mock.patch.object(modeling, "_is_trivial", return_value=False),
        mock.patch.object(position, "is_separable", return_value=False),
    ):
        yield
