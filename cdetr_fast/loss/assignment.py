"""Which query each target gets: costs -> the cheapest one-to-one assignment -> query numbers.

Two libraries solve it. scipy on the host gets the costs in one transfer, the only synchronisation
of a training step. `torch-linear-assignment`, where it is installed and the GPU suits it, solves on
the device, and the host waits for nothing: what only the device knows (predictions that are not
finite, labels out of range) is then reported by a later step, or at the end of the process.
"""

import atexit
import functools
import inspect
import logging
import sys
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cdetr_fast.config.model import ConditionalDetrConfig
from cdetr_fast.loss.targets import Targets, check_range
from cdetr_kernels import matching_cost

logger = logging.getLogger(__name__)

# In place of a cost that is not finite: such a pair is taken only when nothing else is left.
_WORST = torch.finfo(torch.float32).max


class Matches(NamedTuple):
    """int64 `[L, B, T]`, the query of each target or -1; also on the host if that has solved it."""

    queries: Tensor
    on_host: np.ndarray | None


def match(
    layer_logits: Tensor,
    layer_boxes_cxcywh: Tensor,
    targets: Targets,
    config: ConditionalDetrConfig,
    classification: str = "focal",
) -> Matches:
    """Assigns predictions to targets, one to one and at least cost, in every layer and image.

    Args:
        layer_logits: `[L, B, Q, K]`.
        layer_boxes_cxcywh: `[L, B, Q, 4]`, relative.
        targets: The padded labels.
        config: Holds the cost weights.
        classification: "focal" or "softmax" class cost.

    Raises:
        ValueError: Labels that came on a device are out of range (see `check_range`); where its
            solver is used, those of an earlier step were.

    Source: Kuhn, "The Hungarian method".
    """
    layers, batch, queries, classes = layer_logits.shape
    most = targets.labels.shape[1]
    cost = matching_cost(
        layer_logits,
        layer_boxes_cxcywh,
        targets.labels,
        targets.boxes_cxcywh,
        targets.counts,
        class_weight=config.class_cost,
        bbox_weight=config.bbox_cost,
        giou_weight=config.giou_cost,
        classification=classification,
    ).mT  # [L*B, T, Q], contiguous
    facts = [_sums(layer_logits), _sums(layer_boxes_cxcywh)]
    if targets.unchecked is not None:
        facts.append(targets.unchecked)
    facts = torch.cat([fact.flatten().to(cost.dtype) for fact in facts])
    report = functools.partial(
        _report,
        shape=(layers, batch, most),
        sizes=targets.sizes,
        classes=classes,
        compat=config.compat,
    )

    solve = device_solver(cost.device) if most <= queries else None
    if solve is not None:
        matches = solve_on_device(solve, cost.unflatten(0, (layers, batch)), targets.counts)
        LATE_REPORTS.add(facts, report)
        return Matches(matches, None)
    host = torch.cat([facts, cost.flatten()]).cpu().numpy()
    report(host[: len(facts)])
    on_host = solve_on_host(host[len(facts) :].reshape(layers, batch, most, queries), targets.sizes)
    return Matches(torch.from_numpy(on_host).to(cost.device, non_blocking=True), on_host)


def solve_on_host(costs: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Solves by scipy.

    Args:
        costs: `[L, B, T, Q]`.
        sizes: Number of targets of each image.

    Returns:
        int64 `[L, B, T]`, the query of each target, -1 if it has none.
    """
    from scipy.optimize import linear_sum_assignment  # 0.2 s, and it changes warnings.filters

    if not np.isfinite(costs.sum(dtype=np.float64)):
        costs = np.nan_to_num(costs, nan=_WORST, posinf=_WORST, neginf=_WORST)
    queries = np.full(costs.shape[:3], -1, np.int64)
    for layer, image in np.ndindex(*costs.shape[:2]):
        target, query = linear_sum_assignment(costs[layer, image, : sizes[image]])
        queries[layer, image, target] = query
    return queries


def solve_on_device(solve: Callable[[Tensor], Tensor], cost: Tensor, counts: Tensor) -> Tensor:
    """Solves by `torch-linear-assignment`, without a synchronisation.

    Targets beyond an image's own have equal costs for all queries. With at least as many queries as
    targets each of them takes a query that is left over: the others' optimum stays what it is.

    Args:
        solve: `[N, T, Q]` -> `[N, T]`, as `device_solver` returns it.
        cost: `[L, B, T, Q]`, T <= Q, 0 beyond an image's own targets.
        counts: int64 `[B]`.

    Returns:
        int64 `[L, B, T]`, the query of each target, -1 if there is no such target.
    """
    layers, batch, targets, queries = cost.shape
    # A kernel is compiled for each number of targets, so there are few: powers of two. In fp64 it
    # computes what scipy does, and _WORST does not overflow.
    rows = min(queries, max(16, 1 << (targets - 1).bit_length())) if targets else 0
    cost = F.pad(cost.flatten(0, 1).double(), (0, 0, 0, rows - targets))
    query = solve(torch.nan_to_num(cost, nan=_WORST, posinf=_WORST, neginf=_WORST))
    query = query[:, :targets].unflatten(0, (layers, batch))
    is_target = torch.arange(targets, device=cost.device) < counts[:, None]
    return query.where(is_target, -1)


def device_solver(device: torch.device) -> Callable[[Tensor], Tensor] | None:
    """Returns a solver for a device, None where the host solves."""
    return _device_solver(device)[0]


def solver_choice(device: torch.device | str) -> str:
    """Says which library solves for tensors on a device, and why."""
    solve, reason = _device_solver(torch.device(device))
    return reason if solve else f"scipy on the host, in one transfer: {reason}"


@functools.lru_cache
def _device_solver(device: torch.device) -> tuple[Callable[[Tensor], Tensor] | None, str]:
    if device.type != "cuda" or torch.version.hip or sys.platform != "linux":
        return None, f"torch-linear-assignment needs an NVIDIA GPU and Linux, not {device}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return None, "torch-linear-assignment needs compute capability 8.0"
    try:
        # Its public function waits for the device twice, to look for costs that are not finite, and
        # for problems without a solution: here there are none. This one can be told not to look.
        from torch_linear_assignment._triton import batch_linear_assignment
    except ImportError as error:
        return None, f"torch-linear-assignment cannot be imported ({error})"
    if "validation" not in inspect.signature(batch_linear_assignment).parameters:
        return None, "this version of torch-linear-assignment cannot leave out its checks"

    def solve(cost: Tensor) -> Tensor:
        with torch.cuda.device(cost.device):
            return batch_linear_assignment(cost, validation="off")

    return solve, "torch-linear-assignment on the device"


def _sums(x: Tensor) -> Tensor:
    """Sums of `[L, B, ...]` in each layer and image: finite if all is (`isfinite`: four passes).

    Finite values of a size whose sum overflows count as not finite; no logit comes near.
    """
    return x.flatten(2).sum(-1, dtype=torch.promote_types(x.dtype, torch.float32))


def _report(
    facts: np.ndarray, shape: tuple[int, int, int], sizes: list[int], classes: int, compat: str
) -> None:
    """Says which predictions are not finite, and refuses labels that are out of range."""
    layers, batch, most = shape
    logits, boxes, labels = np.split(facts, [layers * batch, 2 * layers * batch])
    for name, sums in (("logits", logits), ("pred_boxes", boxes)):
        for layer, finite in enumerate(np.isfinite(sums.reshape(layers, batch))):
            if not finite.all():
                logger.warning(
                    "non-finite %s of decoder layer %d of %d, images %s: matched last",
                    name,
                    layer,
                    layers,
                    np.flatnonzero(~finite).tolist(),
                )
    if labels.size:
        labels = labels.reshape(batch, most, 5)
        check_range(labels[..., 0], labels[..., 1:], sizes, classes, compat)


class LateReports:
    """Facts on their way from a device, and what is to be said about them once they are here.

    The host never waits: a step delivers what has arrived of the steps before it. What is left at
    the end of the process is delivered then.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[torch.cuda.Event, Tensor, Callable]] = deque()

    def add(self, facts: Tensor, report: Callable[[np.ndarray], None]) -> None:
        """Delivers what has arrived, and sends for these facts.

        While a CUDA graph is captured nothing is sent: its replays run without the host.

        Raises:
            ValueError: A report of an earlier step did.
        """
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return
        if not self._pending:
            atexit.unregister(self._deliver_at_exit)
            atexit.register(self._deliver_at_exit)
        host = torch.empty(facts.shape, dtype=facts.dtype, pin_memory=facts.is_cuda)
        host.copy_(facts, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(facts.device))
        self._pending.append((arrived, host, report))
        self.deliver()

    def deliver(self, wait: bool = False) -> None:
        """Reports what has arrived, or everything after waiting for it."""
        while self._pending:
            arrived, host, report = self._pending[0]
            if wait:
                arrived.synchronize()
            elif not arrived.query():
                return
            self._pending.popleft()
            try:
                report(host.numpy())
            except ValueError as error:
                raise ValueError(f"{error} (labels of an earlier step)") from None

    def _deliver_at_exit(self) -> None:
        while self._pending:
            try:
                self.deliver(wait=True)
            except (ValueError, RuntimeError) as error:  # too late to stop anything
                logger.error("%s", error)


LATE_REPORTS = LateReports()
