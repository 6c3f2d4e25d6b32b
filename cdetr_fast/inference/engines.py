"""A runner whose engine was chosen by `optimize(model, engine="auto")`."""

import dataclasses
import logging
from typing import Any

from torch import nn

from cdetr_fast.common.errors import first_line
from cdetr_fast.inference.engine_records import DEFAULT, Choice
from cdetr_fast.inference.runner import Family, Options, Runner

logger = logging.getLogger(__name__)


class ChosenRunner(Runner):
    """Runs a model on the engine that was chosen for it, or on PyTorch where that engine fails.

    Args:
        options: As of `Runner`; the engine is that of the choice.
        family: As of `Runner`.
        choice: The engine, and why it was chosen.
    """

    def __init__(self, options: Options, family: Family, choice: Choice) -> None:
        super().__init__(dataclasses.replace(options, engine=choice.engine), family)
        self.choice = choice

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"choice": self.choice}

    def _prepare(self, model: nn.Module) -> None:
        try:
            super()._prepare(model)
        except Exception as error:  # whatever the engine raises: it has not run, or is off
            if self.choice.engine == DEFAULT:
                raise
            logger.warning("%s runs the model instead: %s", DEFAULT, first_line(error))
            self.choice = Choice(DEFAULT, first_line(error))
            self.options = dataclasses.replace(self.options, engine=DEFAULT)
            super()._prepare(model)

    def explain(self, model: nn.Module) -> str:
        """Describe the choice, then what `Runner.explain` describes."""
        rest = super().explain(model)
        return f"{'chosen':<16} {self.choice.engine}: {self.choice.reason}\n{rest}"
