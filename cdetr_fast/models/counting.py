"""Counter of what a step asks of torch and of the host, on a CPU as on a GPU.

    with as_on_a_gpu(), OperatorCounter() as counted:
        model(**inputs).loss.backward()
    print(counted.totals())

The host cannot wait for a CPU, but what would make it wait for a GPU can be seen: a number read
from a tensor (`item`, `tolist`, an `if`), `cpu()`, and an operator or index whose result has as
many elements as a mask has ones. Likewise each tensor made from data of the host would be a copy to
the device. Calls are counted where they are made, so a copy from CPU to CPU counts, although it
does nothing. Not seen: `to(device)` of an existing tensor, and waits inside torch's operators, such
as for memory.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cdetr_fast.models import base_model
from cdetr_fast.models.position import ConditionalDetrSinePositionEmbedding

# The host has to know how many ones there are to allocate their results.
DATA_DEPENDENT_OPERATORS = {"nonzero", "masked_select", "_unique2", "repeat_interleave"}
INDEXING_OPERATORS = {"index", "index_put", "index_put_"}


class OperatorCounter(TorchDispatchMode):
    """Counts operators, waits of the host and copies to the device while it is entered.

    Attributes:
        dispatches: Calls of each operator below autograd.
        launches: Those among them whose result is not a view of an input: on a GPU mostly a kernel.
        waits: Calls at which the host would wait for a GPU.
        copies: Calls that would copy data from the host to a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dispatches: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self._patches = contextlib.ExitStack()

    def totals(self) -> dict[str, int]:
        """Return the number of calls of each kind."""
        kinds = ("dispatches", "launches", "waits", "copies")
        return {kind: getattr(self, kind).total() for kind in kinds}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = function._schema.name.removeprefix("aten::")
        results = [result.alias_info for result in function._schema.returns]
        self.dispatches[name] += 1
        if not (results and all(alias and not alias.is_write for alias in results)):
            self.launches[name] += 1
        if name == "_local_scalar_dense" or name in DATA_DEPENDENT_OPERATORS:
            self.waits[name] += 1
        if name in INDEXING_OPERATORS and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        ):
            self.waits["a mask as index"] += 1
        return function(*args, **(kwargs or {}))

    def __enter__(self) -> Self:
        self._watch(Tensor, "cpu", self.waits)
        for name in ("tensor", "as_tensor", "from_numpy"):
            self._watch(torch, name, self.copies)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._patches.close()
        super().__exit__(*exception)

    def _watch(self, owner: Any, name: str, counter: Counter[str]) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            counter[name] += 1
            return function(*args, **kwargs)

        self._patches.enter_context(mock.patch.object(owner, name, watched))


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Keep our models from reading masks (for padding and rectangles), as they do on a CPU only."""
    with (
        mock.patch.object(base_model, "is_unpadded", return_value=False),
        mock.patch.object(ConditionalDetrSinePositionEmbedding, "is_separable", return_value=False),
    ):
        yield
