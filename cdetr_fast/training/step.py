"""One step of training: forward and backward of its batches, and one update of the weights.

The host never waits for the device here. Whether a step is finite is decided on the device, where
the fused optimizer skips the update; losses, gradient norms and the names of what was not
finite are copied to the host and read one step later, when they have long arrived.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cdetr_fast.training.config import TrainingConfig
from cdetr_fast.training.data.dataset import Batch

if TYPE_CHECKING:
    from accelerate import Accelerator

ImageIds = list[tuple[int, list[int]]]  # of each batch: number of decoder layers, ids

_PARTS = ("loss_ce", "loss_bbox", "loss_giou", "loss_mask", "loss_dice")


@dataclass
class StepReport:
    """Result of a step.

    Attributes:
        step: Number of the step, from 0.
        losses: "loss" and the parts of the last layer, averaged over the processes.
        grad_norm: Norm of all gradients before clipping.
        skipped: Whether the weights were left unchanged because something was not finite.
        stop: Whether any process has been told to stop.
        images: Images of this step, over all processes.
        boxes: Boxes of this step, over all processes.
        problems: What was not finite on this process: layer, tensor and image ids.
    """

    step: int
    losses: dict[str, float]
    grad_norm: float
    skipped: bool
    stop: bool
    images: int
    boxes: int
    problems: list[str]


@dataclass
class _Pending:
    step: int
    values: Tensor
    arrived: torch.cuda.Event | None
    names: list[str]
    describe: Callable[[list[float]], list[str]]


class TrainingStep:
    """Steps of training.

    Args:
        accelerator: Accelerator that has prepared `model` and `optimizer`.
        model: The model.
        optimizer: Fused AdamW.
        config: Settings.
        mean: Mean of the pixels, three values in units of uint8.
        std: Standard deviation of the pixels, likewise.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: TrainingConfig,
        mean: Tensor,
        std: Tensor,
    ) -> None:
        self.accelerator = accelerator
        self.model = model
        self.optimizer = optimizer
        self.max_norm = config.max_grad_norm
        self.device = accelerator.device
        self.mean = mean.to(self.device)
        self.std = std.to(self.device)
        self.dtype = next(p.dtype for p in model.parameters())
        self.names = [
            n.removeprefix("module.") for n, p in model.named_parameters() if p.requires_grad
        ]
        self.with_gradient: list[str] = []
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.pending: deque[_Pending] = deque()

    def __call__(self, step: int, batches: list[Batch], stop: bool = False) -> None:
        """Compute a step.

        Args:
            step: Number of the step.
            batches: Batches of this process.
            stop: Whether this process has been told to stop.
        """
        totals = self._totals(batches, stop)
        num_boxes = (totals[0] / self.accelerator.num_processes).clamp(min=1)
        losses: dict[str, Tensor] = {}
        output_norms: list[Tensor] = []
        image_ids: ImageIds = []
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                parts, norms, layers = self._backward(batch, num_boxes)
            losses = {k: losses[k] + v for k, v in parts.items()} if losses else parts
            output_norms.append(norms)
            image_ids.append((layers, batch.image_ids))
        gradient_norms, grad_norm = self._clip()
        finite = grad_norm.isfinite()
        self._update(finite)

        shared = torch.stack([v.float() for v in losses.values()])
        if self.accelerator.num_processes > 1:
            dist.all_reduce(shared)
            shared = shared / self.accelerator.num_processes
        own_norms = output_norms + ([] if gradient_norms is None else [gradient_norms])
        values = torch.cat(
            [
                totals,
                shared,
                grad_norm.float()[None],
                finite.float()[None],
                *((~norms.isfinite()).float() for norms in own_norms),
            ]
        )
        self._send(step, values, list(losses), image_ids)

    def _totals(self, batches: list[Batch], stop: bool) -> Tensor:
        """Return boxes, images and processes told to stop, summed over all processes `[3]`."""
        boxes = sum(len(x["class_labels"]) for batch in batches for x in batch.labels)
        images = sum(len(batch.labels) for batch in batches)
        # Filling needs no copy from the host, unlike torch.tensor.
        totals = torch.empty(3, device=self.device)
        for place, value in zip(totals, (boxes, images, stop), strict=True):
            place.fill_(value)
        if self.accelerator.num_processes > 1:
            dist.all_reduce(totals)
        return totals

    def _backward(self, batch: Batch, num_boxes: Tensor) -> tuple[dict[str, Tensor], Tensor, int]:
        """Return losses, the norms of logits and boxes `[L * 2 * B]`, and L."""
        inputs = batch.model_inputs(self.device, self.mean, self.std, self.dtype)
        outputs = self.model(**inputs, num_boxes=num_boxes)
        layers = [*(outputs.auxiliary_outputs or []), outputs]
        tensors = [
            image.detach()
            for layer in layers
            for name in ("logits", "pred_boxes")
            for image in layer[name].unbind()
        ]
        norms = torch.stack(torch._foreach_norm(tensors)).float()
        # A non-finite value, even of a box that no loss uses, makes the gradients non-finite: then
        # every process sees it, without another message between them.
        loss = outputs.loss
        poison = 1 + 0 * (norms.sum() + loss.detach())
        self.accelerator.backward(loss * poison)
        parts = {name: outputs.loss_dict[name] for name in _PARTS if name in outputs.loss_dict}
        return (
            {"loss": loss.detach()} | {k: v.detach() for k, v in parts.items()},
            norms,
            len(layers),
        )

    def _clip(self) -> tuple[Tensor | None, Tensor]:
        """Clip the gradients; return their norms `[P]` (None if sharded) and the norm of all."""
        if getattr(self.accelerator, "scaler", None) is not None:
            self.accelerator.unscale_gradients(self.optimizer)
        limit = self.max_norm or float("inf")
        if _is_sharded(self.accelerator):
            norm = self.accelerator.clip_grad_norm_(self.parameters, limit)
            return None, norm.detach().full_tensor()
        named = zip(self.names, self.parameters, strict=True)
        self.with_gradient = [name for name, p in named if p.grad is not None]
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norms = torch.stack([n.float() for n in torch._foreach_norm(grads)])
        total = torch.linalg.vector_norm(norms)
        if self.max_norm:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, limit, total, foreach=True)
        return norms, total

    def _update(self, finite: Tensor) -> None:
        inner: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        if getattr(self.accelerator, "scaler", None) is None:
            inner.found_inf = 1 - finite.float()  # the scaler of fp16 sets it itself
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _send(self, step: int, values: Tensor, names: list[str], image_ids: ImageIds) -> None:
        arrived = None
        if values.device.type == "cuda":
            stream = torch.cuda.current_stream(values.device)  # which need not be the current one
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(stream)
        with_gradient = self.with_gradient

        def describe(flags: list[float]) -> list[str]:
            return _describe(flags, image_ids, with_gradient)

        self.pending.append(_Pending(step, values, arrived, names, describe))

    def reports(self, keep: int = 1) -> Iterator[StepReport]:
        """Yield the reports of finished steps, in order.

        Args:
            keep: How many of the newest steps to leave for later; with 1 the host never waits.
                Every process reads the same steps at the same time.
        """
        while len(self.pending) > keep:
            pending = self.pending.popleft()
            if pending.arrived is not None:
                pending.arrived.synchronize()
            values = pending.values.tolist()
            boxes, images, stop = values[:3]
            end = 3 + len(pending.names)
            grad_norm, finite = values[end : end + 2]
            yield StepReport(
                step=pending.step,
                losses=dict(zip(pending.names, values[3:end], strict=True)),
                grad_norm=grad_norm,
                skipped=not finite,
                stop=stop > 0,
                images=round(images),
                boxes=round(boxes),
                problems=[] if finite else pending.describe(values[end + 2 :]),
            )


def _describe(flags: list[float], image_ids: ImageIds, parameters: list[str]) -> list[str]:
    """Name what the flags stand for: layers, tensors and images, then gradients."""
    problems: list[str] = []
    place = 0
    for layers, ids in image_ids:
        for layer in range(layers):
            for name in ("logits", "pred_boxes"):
                bad = [i for i, flag in zip(ids, flags[place:], strict=False) if flag]
                place += len(ids)
                if bad:
                    problems.append(f"{name} of decoder layer {layer}, image ids {bad}")
    wrong = [name for name, flag in zip(parameters, flags[place:], strict=False) if flag]
    if wrong and not problems:
        ids = [i for _, group in image_ids for i in group]
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        # The backward pass ends at the first layers: it began at the last of the names.
        problems.append(f"gradient of {wrong[-1]}{more}, image ids {ids}")
    return problems


def _is_sharded(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type.value in ("FSDP", "DEEPSPEED", "MEGATRON_LM")
