"""Assignment of queries to targets: one to one, at the lowest total cost.

Two libraries solve it. scipy, on the host, gets the costs in one transfer, the only synchronisation
of a training step. `torch-linear-assignment`, if it is installed and supports the GPU, solves on
the device, and the host never waits: what only the device knows (predictions that are not finite,
labels out of range) is then reported by a later step, or at the end of the process.
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

Report = Callable[[np.ndarray], None]

# Replaces costs that are not finite: such pairs are matched only if nothing else is left.
_WORST = torch.finfo(torch.float32).max


class Matches(NamedTuple):
    """The query of each target.

    Attributes:
        queries: int64 `[L, B, T]`, -1 for targets without a query.
        on_host: The same on the host, if it was solved there.
    """

    queries: Tensor
    on_host: np.ndarray | None


def match(
    layer_logits: Tensor,
    layer_boxes_cxcywh: Tensor,
    targets: Targets,
    config: ConditionalDetrConfig,
    classification: str = "focal",
) -> Matches:
    """Assign predictions to targets, one to one and at the lowest cost, in each layer and image.

    Args:
        layer_logits: `[L, B, Q, K]`.
        layer_boxes_cxcywh: `[L, B, Q, 4]`, relative.
        targets: The padded labels.
        config: Model configuration with the cost weights.
        classification: Kind of class cost, "focal" or "softmax".

    Raises:
        ValueError: Labels that were passed on a device are out of range (see `check_range`). Where
            the device solves, the error is that of an earlier step.

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
    to_check = [_sums(layer_logits), _sums(layer_boxes_cxcywh)]
    if targets.unchecked is not None:
        to_check.append(targets.unchecked)
    findings = torch.cat([values.flatten().to(cost.dtype) for values in to_check])
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
        LATE_REPORTS.add(findings, report)
        return Matches(matches, None)
    host = torch.cat([findings, cost.flatten()]).cpu().numpy()
    report(host[: len(findings)])
    costs = host[len(findings) :].reshape(layers, batch, most, queries)
    on_host = solve_on_host(costs, targets.sizes)
    return Matches(torch.from_numpy(on_host).to(cost.device, non_blocking=True), on_host)


def solve_on_host(costs: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Solve with scipy.

    Args:
        costs: `[L, B, T, Q]`.
        sizes: Number of targets of each image.

    Returns:
        int64 `[L, B, T]`, the query of each target, -1 for targets without a query.
    """
    from scipy.optimize import linear_sum_assignment  # takes 0.2 s, changes warnings.filters

    if not np.isfinite(costs.sum(dtype=np.float64)):
        costs = np.nan_to_num(costs, nan=_WORST, posinf=_WORST, neginf=_WORST)
    queries = np.full(costs.shape[:3], -1, np.int64)
    for layer, image in np.ndindex(*costs.shape[:2]):
        target, query = linear_sum_assignment(costs[layer, image, : sizes[image]])
        queries[layer, image, target] = query
    return queries


def solve_on_device(solve: Callable[[Tensor], Tensor], cost: Tensor, counts: Tensor) -> Tensor:
    """Solve with `torch-linear-assignment`, without a synchronisation.

    Padding targets cost the same for all queries. With at least as many queries as targets each of
    them takes a query that is left over, and the optimum of the image's own targets is unchanged.

    Args:
        solve: Solver from `device_solver`, `[N, T, Q]` -> `[N, T]`.
        cost: `[L, B, T, Q]`, T <= Q, 0 for padding targets.
        counts: int64 `[B]`, targets of each image.

    Returns:
        int64 `[L, B, T]`, the query of each target, -1 for padding.
    """
    layers, batch, targets, queries = cost.shape
    # A kernel is compiled per number of targets, hence powers of two. In fp64 the library computes
    # what scipy does, and _WORST does not overflow.
    rows = min(queries, max(16, 1 << (targets - 1).bit_length())) if targets else 0
    cost = F.pad(cost.flatten(0, 1).double(), (0, 0, 0, rows - targets))
    query = solve(torch.nan_to_num(cost, nan=_WORST, posinf=_WORST, neginf=_WORST))
    query = query[:, :targets].unflatten(0, (layers, batch))
    is_target = torch.arange(targets, device=cost.device) < counts[:, None]
    return query.where(is_target, -1)


def device_solver(device: torch.device) -> Callable[[Tensor], Tensor] | None:
    """Return the solver of a device, None where the host solves."""
    return _device_solver(device)[0]


def solver_choice(device: torch.device | str) -> str:
    """Return which library solves for tensors on a device, and why."""
    solve, reason = _device_solver(torch.device(device))
    return reason if solve else f"scipy on the host, in one transfer: {reason}"


@functools.lru_cache
def _device_solver(device: torch.device) -> tuple[Callable[[Tensor], Tensor] | None, str]:
    if device.type != "cuda" or torch.version.hip or sys.platform != "linux":
        return None, f"torch-linear-assignment needs an NVIDIA GPU and Linux, not {device}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return None, "torch-linear-assignment needs compute capability 8.0"
    try:
        # The public function waits for the device twice, to look for costs that are not finite and
        # for problems without a solution, which do not occur here. This one can skip its checks.
        from torch_linear_assignment._triton import batch_linear_assignment
    except ImportError as error:
        return None, f"torch-linear-assignment cannot be imported ({error})"
    if "validation" not in inspect.signature(batch_linear_assignment).parameters:
        return None, "this version of torch-linear-assignment cannot skip its checks"

    def solve(cost: Tensor) -> Tensor:
        with torch.cuda.device(cost.device):
            return batch_linear_assignment(cost, validation="off")

    return solve, "torch-linear-assignment on the device"


def _sums(x: Tensor) -> Tensor:
    """Return the sums of `[L, B, ...]` per layer and image, finite if all values are.

    `isfinite` takes four passes. Values whose sum overflows count as not finite; no logit is that
    large.
    """
    return x.flatten(2).sum(-1, dtype=torch.promote_types(x.dtype, torch.float32))


def _report(
    findings: np.ndarray, shape: tuple[int, int, int], sizes: list[int], classes: int, compat: str
) -> None:
    """Warn of predictions that are not finite, and refuse labels that are out of range."""
    layers, batch, most = shape
    logits, boxes, labels = np.split(findings, [layers * batch, 2 * layers * batch])
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
    """Findings on their way from a device, and the functions that report them on arrival.

    The host never waits: a step reports what has arrived of earlier steps. The rest is reported at
    the end of the process.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[torch.cuda.Event, Tensor, Report]] = deque()

    def add(self, findings: Tensor, report: Report) -> None:
        """Start copying findings to the host, and report those that have arrived.

        While a CUDA graph is captured nothing is copied: its replays run without the host.

        Args:
            findings: On the device.
            report: Called with the findings on the host.

        Raises:
            ValueError: A report of an earlier step raised it.
        """
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return
        if not self._pending:
            atexit.unregister(self._deliver_at_exit)
            atexit.register(self._deliver_at_exit)
        host = torch.empty(
            findings.shape, dtype=findings.dtype, device="cpu", pin_memory=findings.is_cuda
        )
        host.copy_(findings, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(findings.device))
        self._pending.append((arrived, host, report))
        self.deliver()

    def deliver(self, wait: bool = False) -> None:
        """Report what has arrived; with `wait`, everything."""
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
