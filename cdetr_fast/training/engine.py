"""Training loop: epochs of steps, checkpoints, evaluations, and how a run stops and resumes."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn

from cdetr_fast import ConditionalDetrConfig, ConditionalDetrForObjectDetection
from cdetr_fast.common import progress
from cdetr_fast.common.devices import qualify_kernels
from cdetr_fast.common.files import write_text
from cdetr_fast.training import setup
from cdetr_fast.training.config import TrainingConfig
from cdetr_fast.training.data.dataset import Batch
from cdetr_fast.training.data.index import CocoIndex
from cdetr_fast.training.data.loader import grouped
from cdetr_fast.training.errors import DataError, TrainingStopped
from cdetr_fast.training.evaluation.detection import evaluate_detections, predict
from cdetr_fast.training.evaluation.pictures import draw_samples
from cdetr_fast.training.evaluation.report import Report, write_report
from cdetr_fast.training.evaluation.scored import Scored, write_evaluation
from cdetr_fast.training.evaluation.segments import segment_scorer
from cdetr_fast.training.graphs import use_graphs
from cdetr_fast.training.initial_weights import build_model
from cdetr_fast.training.optim import LearningRates, WeightAverage, make_optimizer
from cdetr_fast.training.run import launch
from cdetr_fast.training.run.identity import (
    changed_settings,
    require_one_folder,
    require_same_run,
    run_identity,
)
from cdetr_fast.training.run.launch import all_gather_object, shared_errors
from cdetr_fast.training.run.log import RunLog, read_rows
from cdetr_fast.training.run.model_card import model_card
from cdetr_fast.training.run.signals import StopSignals
from cdetr_fast.training.run.state import (
    checkpoint_files,
    full_state,
    load_checkpoint,
    load_full_state,
    random_state,
    save_checkpoint,
    set_random_state,
)
from cdetr_fast.training.step import StepReport, TrainingStep

logger = logging.getLogger(__name__)

GRAPHS_RUN_ON = "cuda"

ModelBuilder = Callable[[TrainingConfig, Sequence[str]], nn.Module]


def train(config: TrainingConfig, build: ModelBuilder = build_model) -> dict[str, Any]:
    """Train a model, or resume a run.

    Writes to `config.output`: config.yaml, labels.txt, metrics.jsonl, report.html, `checkpoints`
    (to resume from), `model` (the newest weights, for `from_pretrained`), `best` (those of highest
    AP, panoptic quality or mask AP) and `evaluation` (figures and detections of the last epoch).

    Args:
        config: All settings.
        build: Makes the model from the settings and the class names. Any model will do that is
            called and saved like ours, has outputs of the same names, can be built from its class
            and its `config`, and has an `image_processor` if it starts from a checkpoint.

    Returns:
        The figures of the last evaluation (empty without a validation set), and "step".

    Raises:
        DataError: A setting or file cannot be used.
        TrainingStopped: The run has saved its state and ended early.
    """
    with StopSignals() as signals:
        engine = Engine(config, signals, build)
        try:
            return engine.run()
        finally:
            engine.close()


class Engine:
    """A training run, from its settings to its last step.

    Args:
        config: All settings.
        signals: Signals that stop the run.
        build: Makes the model; see `train`.
    """

    def __init__(
        self, config: TrainingConfig, signals: StopSignals, build: ModelBuilder = build_model
    ) -> None:
        self.config = config
        self.signals = signals
        self.accelerator = setup.make_accelerator(config)
        qualify_kernels(self.accelerator.device)
        self.is_main = self.accelerator.is_main_process
        self.folder = Path(config.output)
        self.agents = launch.agents(self.accelerator)
        resumes = False
        with shared_errors(self.accelerator):
            if self.is_main:
                resumes = setup.prepare_folder(config, self.agents)
        resumes = all_gather_object(self.accelerator, resumes)[0]
        self.step = self.epoch = self.step_in_epoch = self.bad_in_a_row = 0
        self.best = -1.0
        self.result: dict[str, float] = {}
        self.awaits_evaluation = False
        self.batches: Any = None
        self.failure: str | None = None  # an image that could not be read
        self.unwritten: list[str] = []  # by the last evaluation
        self.stop_reason: str | None = None  # the same on all processes, at the same step

        with shared_errors(self.accelerator):
            self.train_index, self.val_index, self.label_reports = setup.read_data(config)
            with progress.task("building the model"):
                model = build(config, self.train_index.classes)
            self.model_config = cast(ConditionalDetrConfig, model.config)
            if isinstance(self.train_index, CocoIndex):  # shards do not say what an image has
                queries = self.model_config.num_queries
                self.label_reports[0].compare_with_queries(self.train_index, queries)
            self.processor = setup.make_processor(config, model)
            self.model_class: Any = type(model)
            if config.precision == "bf16-pure":
                model.bfloat16()
            if config.compile:
                model.compile()
            if config.cuda_graphs:
                if (device := self.accelerator.device).type != GRAPHS_RUN_ON:
                    raise DataError(f"cuda_graphs: expected a GPU, the device is {device}")
                self.graphs = use_graphs(cast(ConditionalDetrForObjectDetection, model))
            self.sampler, self.loader = setup.training_loader(
                config, self.train_index, self.accelerator
            )
        self.identity = run_identity(config, self.train_index, self.sampler)
        self.total_steps = config.epochs * self.sampler.steps_per_epoch
        if config.max_steps is not None:
            self.total_steps = min(self.total_steps, config.max_steps)
        optimizer = make_optimizer(model, config)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.rates = LearningRates(config, self.sampler.steps_per_epoch, self.total_steps)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.average = WeightAverage(trained, config.ema_decay) if config.ema_decay else None
        self.statistics = setup.pixel_statistics(self.processor, self.accelerator.device)
        self.training_step = TrainingStep(
            self.accelerator, self.model, self.optimizer, config, *self.statistics
        )
        if config.trackers:
            self.accelerator.init_trackers("training", config=setup.hyperparameters(config))
        path = self.folder / "metrics.jsonl" if self.is_main else None
        self.log = RunLog(path, config.log_every, self.total_steps, self.accelerator.log)
        torch.manual_seed(config.seed + 1 + self.accelerator.process_index)
        self._start(resumes)

    def _start(self, resumes: bool) -> None:
        newest = checkpoint_files(self.folder / "checkpoints")[-1:] if resumes else []
        with shared_errors(self.accelerator):
            require_one_folder(
                self.folder, all_gather_object(self.accelerator, [p.name for p in newest])
            )
        if newest:
            self._load(newest[0])
        with shared_errors(self.accelerator):
            if self.is_main:
                self._describe_run(begins=not newest)

    def _describe_run(self, begins: bool) -> None:
        text = "\n".join(line for report in self.label_reports for line in report.lines())
        try:
            changes = changed_settings(self.folder / "config.yaml", self.config)
            # Whoever repeats the run from this file does not mean to resume.
            written = copy.copy(self.config)
            written.resume = False
            written.to_yaml(self.folder / "config.yaml")
            launch.remember(self.folder, self.agents)
            if begins:
                (self.folder / "labels.txt").write_text(text + "\n", encoding="utf-8")
                (self.folder / "metrics.jsonl").write_text("")  # from here on there is a run
        except OSError as error:
            raise DataError(f"output: {self.folder} cannot be written ({error})") from error
        logger.info(text if begins else "\n".join(changes))

    # the loop -------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Run to the end; see `train`."""
        with self.log.shown():
            if self.awaits_evaluation:
                self._finish_epoch()
            while self.step < self.total_steps:
                self._run_epoch()
        if self.config.trackers:
            self.accelerator.end_training()
        # Nobody leaves before the last checkpoint is written. And a process that ends right after a
        # message may abort, as gloo's thread still frees the message's tensors; a barrier has none.
        self.accelerator.wait_for_everyone()
        if self.unwritten:
            raise TrainingStopped(
                f"trained to the last step, but {', '.join(self.unwritten)} in {self.folder} could "
                "not be written; see above, free some space, and pass --resume to write them"
            )
        return self.result | {"step": self.step}

    def close(self) -> None:
        """End the loading processes, which an exception's traceback would keep alive."""
        shut_down = getattr(self.batches, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()

    def _run_epoch(self) -> None:
        self.sampler.start_at(self.epoch, self.step_in_epoch)
        self.log.start_clock()
        self.batches = iter(self.loader)
        for batches in grouped(self.batches, self.config.accumulate):
            batches = [self._usable(batch) for batch in batches]
            self.rates.apply(self.optimizer, self.step)
            stop = self.signals.received is not None or self.failure is not None
            self.training_step(self.step, batches, stop)
            if self.average is not None:
                self.average.update()
            self.step += 1
            self.step_in_epoch += 1
            self._read_reports(keep=1)
            if self.accelerator.num_processes == 1 and (self.signals.received or self.failure):
                self._stop()  # there is nobody to agree with
            if self.stop_reason is not None:
                self._stop()
            if self.step >= self.total_steps:
                break
            if self.step % self.config.save_every == 0:
                self._save()
        self._read_reports(keep=0)
        if self.stop_reason is not None:
            self._stop()
        self.epoch += 1
        self.step_in_epoch = 0
        self.awaits_evaluation = True
        self._save()
        self._finish_epoch()

    def _usable(self, batch: Batch) -> Batch:
        """Report images that could not be read and, with `bad_images` "stop", stop the run."""
        for failure in batch.failures:
            logger.error("%s", failure)
            if self.config.bad_images == "stop":
                self.failure = failure
        batch.fill_if_empty(masks=self.config.task == "segmentation")
        return batch

    def _read_reports(self, keep: int) -> None:
        for report in self.training_step.reports(keep):
            self._take(report)

    def _take(self, report: StepReport) -> None:
        factor = self.rates.factor(report.step)
        groups = self.optimizer.param_groups
        rates = {f"lr_{g['name']}": g["initial_lr"] * factor for g in groups}
        self.log.add(report, rates)
        self.bad_in_a_row = self.bad_in_a_row + 1 if report.skipped else 0
        if report.stop:
            self.stop_reason = "told to stop"
        elif self.stop_reason is None and self.bad_in_a_row >= self.config.max_nonfinite:
            self.stop_reason = (
                f"{self.bad_in_a_row} steps in a row were not finite, the last one in "
                f"{'; '.join(report.problems) or 'another process'}; the weights are those before "
                "them. Try a lower learning rate, a longer warm-up, or bf16 instead of fp16"
            )

    def _stop(self) -> None:
        """Save the state and raise."""
        self._save()
        where = self._saved()
        received = self.signals.received
        if self.failure is not None:
            raise TrainingStopped(f"{self.failure}\n{where}")
        if received is not None:
            raise TrainingStopped(f"stopped by signal {received}\n{where}", 128 + received)
        raise TrainingStopped(f"{self.stop_reason}\n{where}")

    def _saved(self) -> str:
        return f"Step {self.step} is saved in {self.folder / 'checkpoints'}; continue with --resume"

    # state ----------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Save what the next step depends on; all processes take part."""
        self._read_reports(keep=0)
        randoms = all_gather_object(self.accelerator, random_state(self.accelerator.device))
        state = {
            "step": self.step,
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "run": self.identity,
            "awaits_evaluation": self.awaits_evaluation,
            "best": self.best,
            "bad_in_a_row": self.bad_in_a_row,
            "log": self.log.state_dict(),
            "random": randoms,
            **full_state(self.model, self.optimizer, self.accelerator),
        }
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        if self.average is not None:
            state["average"] = self.average.state_dict()
        if self.is_main:
            save_checkpoint(self.folder / "checkpoints", self.step, state, self.config.keep)

    def _load(self, path: Path) -> None:
        with shared_errors(self.accelerator):
            state = load_checkpoint(path)
            require_same_run(path, state["run"], self.identity)
        with shared_errors(self.accelerator):
            try:
                load_full_state(self.model, self.optimizer, self.accelerator, state)
            except (KeyError, RuntimeError, ValueError) as error:
                raise DataError(
                    f"{path}: the weights do not fit the model of the settings "
                    f"({' '.join(str(error).split())[:300]}); resume with the same backbone and "
                    "model_options, or choose another output"
                ) from error
        if self.accelerator.scaler is not None and "scaler" in state:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.restart()  # from the weights, if there was none
            if "average" in state:
                self.average.load_state_dict(state["average"])
        for name in ("step", "epoch", "step_in_epoch", "awaits_evaluation", "best", "bad_in_a_row"):
            setattr(self, name, state[name])
        self.log.resume(self.step, state["log"])
        rank = self.accelerator.process_index
        if rank < len(state["random"]):
            set_random_state(state["random"][rank], self.accelerator.device)
        logger.info("resumed at step %d from %s", self.step, path)

    # epochs ---------------------------------------------------------------------------------------

    def _finish_epoch(self) -> None:
        """Evaluate if it is due, and write the model and the pictures of the run."""
        self.unwritten = []
        last = self.step >= self.total_steps
        due = last or self.epoch % self.config.evaluate_every == 0
        with self.average.applied() if self.average is not None else nullcontext():
            if due:
                self._evaluate_and_export(last)
        self.awaits_evaluation = last and bool(self.unwritten)
        self._save()

    def _evaluate_and_export(self, last: bool) -> None:
        is_best, figure, scored = False, self.best, None
        if self.val_index is not None:
            loader = setup.evaluation_loader(
                self.val_index,
                self.config.batch_size,
                self.processor.size,
                self.config.num_workers,
                self.config.pad_to_multiple,
                self.accelerator,
            )
            # Sharded parameters must be gathered by the wrapper; another one only costs time.
            model = self.model if self.config.fsdp else self.accelerator.unwrap_model(self.model)
            segments = segment_scorer(self.val_index)
            found = predict(model, loader, *self.statistics, self.accelerator, observe=segments)
            if found.failures and self.config.bad_images == "stop":  # on all processes
                raise TrainingStopped(f"{found.described_failures()}\n{self._saved()}")
            if segments is not None:
                segments.gather(self.accelerator)
            index, found = found.without_failures(self.val_index)
            if self.is_main:
                evaluation = evaluate_detections(index, found, segments)
                scored = Scored(index, found, evaluation, segments=segments)
                self.result = evaluation.stats
                if found.failures:
                    text = found.described_failures()
                    logger.warning("%s\nthey are left out of the figures", text)
                self.log.write_evaluation(self.epoch, self.step, evaluation.stats)
                figure = self.result["AP" if segments is None else segments.figure]
                # The newest of equals: PQ and mask AP stay 0 for a while. NaN: no objects.
                is_best = math.isnan(figure) or figure >= self.best
                path = Path("samples", f"epoch_{self.epoch:04d}.jpg")
                count = self.config.sample_pictures
                self._write(path, lambda path: draw_samples(path, scored, count))
                if last:
                    self._write("evaluation", partial(write_evaluation, scored))
        weights = self.accelerator.get_state_dict(self.model)
        if self.is_main:
            self._write("model", lambda path: self._export(weights, path))
            if is_best and self._write("best", lambda path: self._export(weights, path)):
                self.best = max(self.best, figure)  # NaN is not greater
            self._write(
                "report.html", lambda path: write_report(self._report(scored), path), (Exception,)
            )
        self.accelerator.wait_for_everyone()

    def _report(self, scored: Scored | None) -> Report:
        sets = (("Labels: training", self.train_index), ("Labels: validation", self.val_index))
        return Report(
            f"Training of {self.folder.name}, step {self.step} of {self.total_steps}",
            self.config.to_dict(),
            self.accelerator.device,
            [
                (title, index, report)
                for (title, index), report in zip(sets, self.label_reports, strict=False)
                if index is not None
            ],
            scored,
            read_rows(self.folder / "metrics.jsonl"),
        )

    def _write(
        self,
        name: str | Path,
        write: Callable[[Path], None],
        errors: tuple[type[Exception], ...] = (OSError, SafetensorError),
    ) -> bool:
        """Write a result that the next evaluation, or the one of `--resume`, writes again.

        Args:
            name: File or folder in the run's folder.
            write: Called with its path.
            errors: What is no reason to lose the run.

        Returns:
            Whether it was written; a full disk is logged, and training continues.
        """
        try:
            write(self.folder / name)
        except errors as error:
            unexpected = not isinstance(error, (OSError, SafetensorError))
            path = self.folder / name
            logger.error("%s could not be written (%s)", path, error, exc_info=unexpected)
            self.unwritten.append(str(name))
            return False
        return True

    def _export(self, weights: dict[str, torch.Tensor], folder: Path) -> None:
        """Write a folder for `from_pretrained`, with a model card."""
        config = copy.deepcopy(self.model_config)
        # Only training needs it, and with it transformers computes other numbers than the paper.
        config.auxiliary_loss = False
        with torch.random.fork_rng(devices=[]):  # building a model draws its initial weights
            model = self.model_class(config)
        model.load_state_dict(weights)
        folder.mkdir(exist_ok=True)
        model.float().save_pretrained(folder)
        self.processor.save_pretrained(folder)
        card = model_card(self.config, self.train_index, self.val_index, self.result)
        write_text(folder / "README.md", card)
