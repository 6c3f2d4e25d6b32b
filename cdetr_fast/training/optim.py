"""Parameter groups, learning rates over time, and the average of the weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from cdetr_fast.training.config import TrainingConfig


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """Return fused AdamW with the backbone in a group of its own, as in the paper.

    The fused form can skip a step on the device (`found_inf`): a non-finite gradient costs no
    synchronisation.
    """
    groups: dict[str, list[nn.Parameter]] = {"rest": [], "backbone": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups["backbone" if "backbone" in name else "rest"].append(parameter)
    rates = {"rest": config.learning_rate, "backbone": config.backbone_learning_rate}
    return torch.optim.AdamW(
        [
            {"params": members, "lr": rates[name], "initial_lr": rates[name], "name": name}
            for name, members in groups.items()
            if members
        ],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=True,
    )


class LearningRates:
    """Learning rates as a function of nothing but the step.

    Args:
        config: Kind of schedule.
        steps_per_epoch: Steps of an epoch.
        total_steps: Steps of the run.
    """

    def __init__(self, config: TrainingConfig, steps_per_epoch: int, total_steps: int) -> None:
        self.config = config
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = total_steps

    def factor(self, step: int) -> float:
        """Return the factor of the learning rates in step `step`, counted from 0."""
        config = self.config
        warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
        if config.schedule == "cosine":
            span = max(1, self.total_steps - config.warmup_steps)
            progress = min(1.0, max(0.0, (step - config.warmup_steps) / span))
            end = config.final_learning_rate
            return warmup * (end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress)))
        if config.schedule == "step":
            epoch = step // self.steps_per_epoch
            return warmup * 0.1 ** sum(epoch >= decay for decay in config.decay_epochs)
        return warmup

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Set the rates of all groups."""
        factor = self.factor(step)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor


class WeightAverage:
    """Exponential moving average of the trained parameters, in fp32.

    Args:
        parameters: The parameters to average.
        decay: Of the average in the long run; it rises to there from 0.1, as (1 + n) / (10 + n).
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.restart()

    def restart(self) -> None:
        """Start again from the parameters' values."""
        self.average = [p.detach().clone().float() for p in self.parameters]
        self._local_part = [_local_part(a) for a in self.average]
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Add the parameters' values to the average."""
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        values = [_local_part(p.detach()).float() for p in self.parameters]
        torch._foreach_lerp_(self._local_part, values, weight)
        self.updates += 1

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Give the parameters the values of the average within the block."""
        own = [_local_part(p.detach()) for p in self.parameters]
        values = [p.clone() for p in own]
        torch._foreach_copy_(own, self._local_part)
        try:
            yield
        finally:
            torch._foreach_copy_(own, values)

    def state_dict(self) -> dict[str, list[Tensor] | int]:
        """Return the average, in the order of the parameters; whole even if they are sharded.

        All processes take part.
        """
        whole = [a.full_tensor() if isinstance(a, DTensor) else a for a in self.average]
        return {"average": whole, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        for own, whole in zip(self.average, state["average"], strict=True):
            if isinstance(own, DTensor):
                whole = distribute_tensor(whole.to(own.device), own.device_mesh, own.placements)
            own.copy_(whole)
        self.updates = state["updates"]


def _local_part(values: Tensor) -> Tensor:
    """Return what this process holds of a sharded tensor (an alias), and others as they are."""
    return values.to_local() if isinstance(values, DTensor) else values
