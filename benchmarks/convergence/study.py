"""Speed of convergence: epochs and time until an AP is reached, each arm from one start.

    python -m benchmarks.convergence                                # drawn scenes, on a CPU
    python -m benchmarks.convergence --train train.json --val val.json --config settings.yaml

Three comparisons (`--comparisons`), each arm with the same images, augmentation, order, schedule,
seed and backbone weights, through `cdetr_fast.training`:

- attention: conditional cross-attention; plain cross-attention (DETR) under the same loss; and
  plain cross-attention under DETR's own loss (`plain_detr.py`).
- start: the paper's initial weights, focal prior and class weight against those of transformers.
- head: a checkpoint gets a new class head, at the focal prior or with transformers' zero bias.

Runs are kept in `--folder`: a finished one is not repeated, an interrupted one is resumed. With
`--output` results go to `benchmarks/results`; `python -m benchmarks.convergence.plot` draws them.
The time to an AP is the number of steps times that of a step, which is measured for all arms in
turns.
"""

import argparse
import dataclasses
import json
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks import results
from benchmarks.convergence.plain_detr import PlainDetr, PlainDetrFocal, plain_counterpart
from benchmarks.timing import time_in_turns
from cdetr_fast import ConditionalDetrForObjectDetection
from cdetr_fast.demo import DEMO
from cdetr_fast.demo.scenes import TRAIN_SEED, write_coco_dataset
from cdetr_fast.training import TrainingConfig, TrainingStopped, setup
from cdetr_fast.training.config import read_yaml
from cdetr_fast.training.engine import Engine
from cdetr_fast.training.initial_weights import build_model
from cdetr_fast.training.run.log import read_rows
from cdetr_fast.training.run.signals import StopSignals

SCENES = Path(__file__).parent / "scenes.yaml"

Builder = Callable[[TrainingConfig, Sequence[str]], nn.Module]


def _with(config: TrainingConfig, **options: Any) -> TrainingConfig:
    return dataclasses.replace(config, model_options=config.model_options | options)


def _conditional(config: TrainingConfig, classes: Sequence[str]) -> nn.Module:
    return build_model(config, classes)


def _transformers(config: TrainingConfig, classes: Sequence[str]) -> nn.Module:
    """Return our model with the numbers and the initial weights of transformers'."""
    return build_model(_with(config, compat="transformers"), classes)


def _plain(kind: type[PlainDetr]) -> Builder:
    def build(config: TrainingConfig, classes: Sequence[str]) -> nn.Module:
        return plain_counterpart(build_model(config, classes), kind, config.seed)

    return build


def _zero_bias(config: TrainingConfig, classes: Sequence[str]) -> nn.Module:
    """Return the checkpoint under transformers' numbers, with the class head that it resets."""
    model: Any = _transformers(config, classes)
    nn.init.normal_(model.class_labels_classifier.weight, std=model.config.init_std)
    nn.init.zeros_(model.class_labels_classifier.bias)
    return model


ARMS: dict[str, dict[str, Builder]] = {
    "attention": {
        "conditional": _conditional,
        "plain, same loss": _plain(PlainDetrFocal),
        "plain, DETR's loss": _plain(PlainDetr),
    },
    "start": {"paper": _conditional, "transformers": _transformers},
    "head": {"new head, focal prior": _conditional, "new head, zero bias": _zero_bias},
}
SAME_RUN = {"paper": "conditional"}  # an arm of two comparisons is trained once


def settings_of(options: argparse.Namespace) -> TrainingConfig:
    """Return the settings that all arms share; draw the scenes if no data is given."""
    if options.train:
        values = read_yaml(options.config) if options.config else {}
        values |= {"train_annotations": options.train, "val_annotations": options.val}
    else:
        values = read_yaml(options.config or SCENES) | _draw_scenes(options)
    values |= {"epochs": options.epochs, "evaluate_every": options.evaluate_every}
    values |= {
        "resume": True,
        "keep": 1,
        "sample_pictures": 0,
        "save_every": 10**9,
        "accumulate": 1,
    }
    if options.queries:
        values["model_options"] |= {"num_queries": options.queries}
    if options.max_steps:
        values["max_steps"] = options.max_steps
    return TrainingConfig.from_dict(values)


def _draw_scenes(options: argparse.Namespace) -> dict[str, Any]:
    paths = {}
    for name, seeds in (
        ("train", range(TRAIN_SEED, TRAIN_SEED + options.scenes)),
        ("val", range(options.val_scenes)),
    ):
        folder = options.folder / f"{name}-{len(seeds)}"
        path = folder / "annotations.json"
        paths[f"{name}_annotations"] = str(path)
        if not path.is_file():
            write_coco_dataset(folder, seeds)
            if options.classes:
                _add_classes(path, options.classes)
    backbone = options.folder / "backbone.safetensors"
    demo = ConditionalDetrForObjectDetection.from_pretrained(DEMO, dtype=torch.float32)
    save_file(demo.model.backbone.model.state_dict(), backbone)
    return paths | {"backbone_weights": str(backbone)}


def _add_classes(path: Path, classes: int) -> None:
    content = json.loads(path.read_text())
    known = len(content["categories"])
    first = max(category["id"] for category in content["categories"]) + 1
    content["categories"] += [
        {"id": first + i, "name": f"never drawn {i}"} for i in range(classes - known)
    ]
    path.write_text(json.dumps(content))


def config_of(comparison: str, name: str, shared: TrainingConfig, options: Any) -> TrainingConfig:
    """Return the settings of an arm; only "head" starts from a checkpoint, with fewer epochs."""
    folder = re.sub(r"\W+", "-", SAME_RUN.get(name, name)).strip("-")
    changes: dict[str, Any] = {"output": str(options.folder / folder)}
    if comparison == "head":
        changes |= {"model": options.checkpoint, "head": "new", "model_options": {}}
        changes |= {"epochs": options.head_epochs, "evaluate_every": 1}
    return dataclasses.replace(shared, **changes)


def train_arm(config: TrainingConfig, build: Builder) -> None:
    """Train an arm, or resume it."""
    with StopSignals() as signals:
        engine = Engine(config, signals, build)
        try:
            engine.run()
        finally:
            engine.close()


def evaluations(config: TrainingConfig) -> list[dict[str, Any]]:
    """Return the rows of an arm's evaluations so far."""
    rows = read_rows(Path(config.output) / "metrics.jsonl")
    return [row for row in rows if row["kind"] == "eval"]


def measure_steps(arms: dict[str, tuple[TrainingConfig, Builder]], repeats: int) -> dict[str, Any]:
    """Time forward and backward of all arms in turns on one batch, at their start.

    Returns:
        For each arm its times, and the class loss of the last layer in the first step.
    """
    calls, losses = {}, {}
    for name, (config, build) in arms.items():
        train, _, _ = setup.read_data(config)
        accelerator = setup.make_accelerator(config)
        model = build(config, train.classes).to(accelerator.device)
        _, loader = setup.training_loader(config, train, accelerator)
        statistics = setup.pixel_statistics(setup.make_processor(config, model), accelerator.device)
        inputs = next(iter(loader)).model_inputs(accelerator.device, *statistics)
        inputs["num_boxes"] = torch.tensor(
            float(sum(len(label["boxes"]) for label in inputs["labels"]))
        ).to(accelerator.device)

        def step(model: Any = model, inputs: Any = inputs) -> Any:
            model.zero_grad()
            outputs = model(**inputs)
            outputs.loss.backward()
            return outputs.loss_dict["loss_ce"].item()

        calls[name], losses[name] = step, step()
    times = time_in_turns(calls, repeats)
    return {name: times[name] | {"first class loss": losses[name]} for name in calls}


def reached(curve: list[dict[str, Any]], name: str, level: float) -> int | None:
    """Return the first evaluated epoch with at least that AP."""
    return next((row["epoch"] for row in curve if (row[name] or 0) >= level), None)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convergence", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--comparisons", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--train", help="COCO JSON file; scenes are drawn without it")
    parser.add_argument("--val", help="COCO JSON file of the validation set")
    parser.add_argument("--config", help="YAML file of training settings, to give with --train")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--evaluate-every", type=int, default=2)
    parser.add_argument("--max-steps", type=int, help="of each arm, to try a set out")
    parser.add_argument("--scenes", type=int, default=512, help="different training scenes")
    parser.add_argument("--val-scenes", type=int, default=200)
    parser.add_argument(
        "--classes", type=int, help="of the scenes' files; those that are not drawn have no objects"
    )
    parser.add_argument("--queries", type=int, help="of the scenes' models, but for a checkpoint's")
    parser.add_argument("--checkpoint", default=str(DEMO), help='of the comparison "head"')
    parser.add_argument("--head-epochs", type=int, default=6)
    parser.add_argument("--levels", type=float, nargs="+", default=(0.01, 0.05, 0.1, 0.2, 0.3, 0.4))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9, help="steps that are timed")
    parser.add_argument("--folder", type=Path, default=Path("output/convergence"))
    parser.add_argument("--report", action="store_true", help="report runs, train nothing")
    parser.add_argument("--output", help="name of the file in benchmarks/results to write")
    options = parser.parse_args(arguments)
    if bool(options.train) != bool(options.val):
        parser.error("--train and --val: expected both files or none")
    if options.train and (options.classes or options.queries):
        parser.error("--classes and --queries: expected drawn scenes, not --train")

    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "benchmarks.convergence", *given])
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    shared = settings_of(options)
    rows = []
    for comparison in options.comparisons:
        arms = {
            name: (config_of(comparison, name, shared, options), build)
            for name, build in ARMS[comparison].items()
        }
        times = measure_steps(arms, options.repeats)
        for name, (config, build) in arms.items():
            if not options.report:
                print(f"--- {comparison}: {name}, {config.output}", file=sys.stderr, flush=True)
                try:
                    train_arm(config, build)
                except TrainingStopped as stopped:
                    print(stopped, file=sys.stderr)
                    return stopped.exit_code
            if not (curve := evaluations(config)):
                continue
            rows.append(row_of(comparison, name, curve, times[name], options))
            if options.output:  # also while later arms train
                results.save(options.output, rows, command)
    results.print_table([{k: v for k, v in row.items() if k != "curve"} for row in rows])
    return 0


def row_of(
    comparison: str, name: str, curve: list[dict[str, Any]], timing: dict[str, Any], options: Any
) -> dict[str, Any]:
    """Return the row of an arm: times, epochs to each AP, and its curve."""
    last = curve[-1]
    per_epoch = last["step"] / last["epoch"]
    row: dict[str, Any] = {
        "comparison": comparison,
        "arm": name,
        "ms": timing["ms"],
        "min_ms": timing["min_ms"],
        "first class loss": timing["first class loss"],
        "epochs": last["epoch"],
        "steps": last["step"],
        "AP": last["AP"],
        "AP50": last["AP50"],
    }
    for level in options.levels:
        epoch = reached(curve, "AP", level)
        row[f"epochs to {level:g}"] = epoch
        minutes = None if epoch is None else epoch * per_epoch * timing["ms"] / 6e4
        row[f"minutes to {level:g}"] = minutes
    kept = ("epoch", "step", "AP", "AP50", "seconds")
    row["curve"] = [{key: one[key] for key in kept} for one in curve]
    return row
