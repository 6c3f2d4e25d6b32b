"""Training log: metrics.jsonl, trackers, and a progress bar or lines."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cdetr_fast.common import progress
from cdetr_fast.common.files import write_text
from cdetr_fast.training.step import StepReport

logger = logging.getLogger(__name__)

_MAIN_FIGURES = ("AP", "AP50", "AP75", "PQ", "mask_AP")  # printed at each evaluation
_SECONDS_OF_RATE = 5.0  # images per second are an average over so long
_SECONDS_OF_FIRST_RATE = 0.5  # reports of two steps may come at once


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl, without a line that a kill cut short."""
    rows = []
    if path.is_file():
        for line in path.read_text("utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows


class RunLog:
    """Log of a run: collects reports of steps and writes their means every `every` steps.

    Args:
        path: metrics.jsonl; None writes nothing (all processes but the first).
        every: Steps between rows.
        total_steps: Of the run.
        tracker: Called with values and the step; `log` of an Accelerator.
    """

    def __init__(
        self, path: Path | None, every: int, total_steps: int, tracker: Callable[..., None]
    ) -> None:
        self.path = path
        self.every = every
        self.tracker = tracker
        self.window: list[dict[str, float]] = []
        self.skipped = 0
        self.clock: float | None = None
        self.images = 0
        self.rate: float | None = None  # images per second, once known
        self.seconds = 0.0  # in training steps; evaluation is not counted
        self.step_clock = time.perf_counter()
        self.total_steps = total_steps
        self.done = 0
        self.display = progress.Display()
        if path is not None:
            self.display = progress.chosen() or progress.suitable()
        self.task = progress.Task()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the steps, and what else is done while the context is open."""
        with (
            progress.shown_by(self.display),
            self.display.task("training", self.total_steps) as self.task,
        ):
            self.task.update(done=self.done)
            yield

    def resume(self, step: int, state: dict[str, Any]) -> None:
        """Continue after `step` steps; rows of later steps, which will run again, are removed."""
        self.window, self.skipped = list(state["window"]), state["skipped"]
        self.seconds = state.get("seconds", 0.0)  # missing in old checkpoints
        self.done = step
        if self.path is not None:
            rows = [row for row in read_rows(self.path) if row["step"] <= step]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            write_text(self.path, text)

    def state_dict(self) -> dict[str, Any]:
        """Return what `resume` takes."""
        window = [dict(row) for row in self.window]
        return {"window": window, "skipped": self.skipped, "seconds": self.seconds}

    def start_clock(self) -> None:
        """Leave the time since the last step out of `seconds` and the rate."""
        now = time.perf_counter()
        if self.clock is not None:
            self.clock += now - self.step_clock
        self.step_clock = now

    def add(self, report: StepReport, rates: dict[str, float]) -> None:
        """Add the report of a step."""
        for problem in report.problems:
            logger.warning("step %d skipped, not finite: %s", report.step + 1, problem)
        if report.skipped:
            self.skipped += 1
        else:
            self.window.append(report.losses | {"grad_norm": report.grad_norm})
        self._measure_rate(report.images)
        before, self.step_clock = self.step_clock, time.perf_counter()
        self.seconds += self.step_clock - before
        self.task.update(
            done=report.step + 1, doing=f"{_losses_text(report.losses)}  {self._rate_text()}"
        )
        if (report.step + 1) % self.every == 0:
            self._write_window(report, rates)

    def _measure_rate(self, images: int) -> None:
        now = time.perf_counter()
        if self.clock is None:  # the first step also starts workers and caches
            self.clock = now
            return
        self.images += images
        elapsed = now - self.clock
        if elapsed > (_SECONDS_OF_FIRST_RATE if self.rate is None else _SECONDS_OF_RATE):
            self.rate = self.images / elapsed
        if elapsed > _SECONDS_OF_RATE:
            self.clock, self.images = now, 0

    def _rate_text(self) -> str:
        return "" if self.rate is None else f"{self.rate:.1f} images/s"

    def _write_window(self, report: StepReport, rates: dict[str, float]) -> None:
        names = self.window[0] if self.window else {}
        means = {name: sum(row[name] for row in self.window) / len(self.window) for name in names}
        rate = None if self.rate is None else round(self.rate, 2)
        extra = {"images_per_second": rate, "skipped": self.skipped}
        self.write("train", report.step + 1, means | rates | extra)
        if means and not self.display.shows_tasks:
            self.display.line(
                f"step {report.step + 1} of {self.total_steps}: {_losses_text(means)}, "
                f"gradient {means['grad_norm']:.2f}, {self._rate_text()}".rstrip(", ")
            )
        self.window = []

    def write_evaluation(self, epoch: int, step: int, stats: dict[str, float]) -> None:
        """Print the main figures of an evaluation and write all of them."""
        figures = [f"{name} {stats[name]:.3f}" for name in _MAIN_FIGURES if name in stats]
        self.display.line(f"epoch {epoch}: {', '.join(figures)}")
        self.write("eval", step, {"epoch": epoch} | without_nan(stats))

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append a row, and pass its numbers to the trackers."""
        if self.path is None:
            return
        values = values | {"seconds": round(self.seconds, 2)}
        numbers = {k: v for k, v in values.items() if isinstance(v, (int, float))}
        try:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"kind": kind, "step": step} | values) + "\n")
            self.tracker({f"{kind}/{k}": v for k, v in numbers.items()}, step=step)
        except OSError as error:  # a full disk is no reason to lose the run
            logger.error("%s: row of step %d lost (%s)", self.path, step, error)


def without_nan(values: dict[str, Any]) -> dict[str, Any]:
    """Return values that JSON has: NaN becomes None."""
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}


def _losses_text(losses: dict[str, float]) -> str:
    """Describe the weighted sum over all layers, and the parts of the last layer."""
    parts = [f"{k[5:]} {v:.3f}" for k, v in losses.items() if k.startswith("loss_")]
    return f"loss {losses['loss']:.3f} ({', '.join(parts)})"
