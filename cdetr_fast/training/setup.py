"""Parts of a run: processes, data, loaders, image processor."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cdetr_fast import ConditionalDetrConfig, ConditionalDetrImageProcessor
from cdetr_fast.models.predict import PredictingModel
from cdetr_fast.training.config import TrainingConfig
from cdetr_fast.training.data.dataset import DetectionDataset
from cdetr_fast.training.data.exports import has_validation, read_set
from cdetr_fast.training.data.index import CocoIndex
from cdetr_fast.training.data.label_checks import LabelReport, check_labels
from cdetr_fast.training.data.loader import make_loader
from cdetr_fast.training.data.sampling import EvaluationSampler, TrainingSampler
from cdetr_fast.training.data.shard_stream import ShardStream
from cdetr_fast.training.data.shards import ShardSet, is_shards, read_shards
from cdetr_fast.training.data.transforms import EvaluationTransform, TrainingTransform
from cdetr_fast.training.errors import DataError
from cdetr_fast.training.run import launch

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

_FOLLOWED = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """Return the Accelerator of the processes that `torchrun` or `accelerate launch` started.

    Raises:
        DataError: A tracker or precision is not available.
    """
    from accelerate import (
        Accelerator,
        DistributedType,
        FullyShardedDataParallelPlugin,
        PartialState,
    )
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

    plugin = None
    if config.fsdp:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=[
                "ConditionalDetrEncoderLayer",
                "ConditionalDetrDecoderLayer",
            ],
            state_dict_type="FULL_STATE_DICT",
        )
    precision = {"fp32": "no", "bf16-pure": "no"}.get(config.precision, config.precision)
    try:
        accelerator = Accelerator(
            cpu=config.device == "cpu",
            mixed_precision=precision,
            log_with=list(config.trackers) or None,
            project_dir=config.output,
            fsdp_plugin=plugin,
            kwargs_handlers=[
                DistributedDataParallelKwargs(find_unused_parameters=config.find_unused_parameters)
            ],
            # We scale losses ourselves; without it an environment variable would scale them too.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )
    except (ValueError, ImportError) as error:
        raise DataError(f"precision, trackers, fsdp: {error}") from error
    available = {str(name) for name in get_available_trackers()} | {"all"}
    if missing := [name for name in config.trackers if name not in available]:
        # Accelerate ignores them silently.
        raise DataError(
            f"trackers: {', '.join(missing)} not installed (available: {sorted(available)}): "
            f"pip install {' '.join(missing)}"
        )
    if config.precision == "fp16" and not accelerator.native_amp:
        # Accelerate has neither autocast nor a scaler for it then, and would train in fp32.
        raise DataError(
            f"precision: fp16 needs a GPU, the device is {accelerator.device}; use bf16 or fp32"
        )
    if plugin is not None and accelerator.distributed_type is DistributedType.MULTI_CPU:
        # Accelerate ignores the plugin on CPUs and would silently replicate instead of sharding;
        # torch shards over gloo too.
        for state in (PartialState(), accelerator.state):
            state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    return accelerator


def read_data(
    config: TrainingConfig,
) -> tuple[CocoIndex | ShardSet, CocoIndex | None, list[LabelReport]]:
    """Read and check the training and the validation set, with the classes of the first.

    Raises:
        DataError: A file cannot be used; see `read_coco` and `check_labels`.
    """
    if not config.train_annotations:
        raise DataError("train_annotations: expected a COCO JSON file, got none")
    train: CocoIndex | ShardSet
    segments = config.task == "segmentation"
    if is_shards(config.train_annotations):
        if config.task == "segmentation":
            raise DataError("task: segmentation needs a JSON file; shards hold boxes only")
        train = read_shards(config.train_annotations)
        report = train.report()
    else:
        train, report = check_labels(
            read_set(
                config.train_annotations,
                config.train_images,
                config.train_masks,
                config.exif,
                segments,
                split="train",
            ),
            config.bad_labels,
        )
    val_annotations = config.val_annotations
    if val_annotations is None and has_validation(config.train_annotations):
        val_annotations = config.train_annotations
    if val_annotations is None:
        return train, None, [report]
    val = read_set(
        val_annotations, config.val_images, config.val_masks, config.exif, segments, split="val"
    )
    val = val.with_classes(train.classes, f"the training set {train.path}")
    val, val_report = check_labels(val, config.bad_labels)
    return train, val, [report, val_report]


def make_processor(config: TrainingConfig, model: nn.Module) -> ConditionalDetrImageProcessor:
    """Return the image processor that is saved with the model, with the size of evaluation.

    Pixels are rescaled and normalised as the checkpoint says, or with timm's mean and deviation
    for the backbone.

    Raises:
        DataError: The checkpoint's image processor cannot be read.
    """
    settings: dict[str, Any] = {}
    if config.model:
        try:
            stored = cast(PredictingModel, model).image_processor
        except (OSError, TypeError, ValueError) as error:
            raise DataError(f"model: {error}") from error
        settings = {name: getattr(stored, name) for name in _FOLLOWED}
        if unfollowed := unfollowed_settings(stored):
            logger.warning(
                "%s: trained with images resized bilinearly; its image processor has %s",
                config.model,
                unfollowed,
            )
    else:
        import timm

        model_config = cast(ConditionalDetrConfig, model.config)
        name = model_config.backbone_config.backbone
        pretrained = timm.get_pretrained_cfg(name) if name else None
        if pretrained is not None:
            settings = {"image_mean": list(pretrained.mean), "image_std": list(pretrained.std)}
    size = {"shortest_edge": config.eval_size, "longest_edge": config.max_size}
    return ConditionalDetrImageProcessor(size=size, **settings)


def unfollowed_settings(processor: ConditionalDetrImageProcessor) -> str:
    """Return the settings that change pixels and that no loader follows; "" if there are none."""
    expected = {"do_resize": True, "resample": Image.Resampling.BILINEAR}
    found = {name: getattr(processor, name) for name in expected}
    return ", ".join(f"{name}={v!s}" for name, v in found.items() if v != expected[name])


def pixel_statistics(
    processor: ConditionalDetrImageProcessor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return mean and deviation `[3, 1, 1]` of pixels from 0 to 255.

    Subtracting one and dividing by the other does all that the processor does to pixels after
    resizing, without its normalisation or rescaling too.
    """
    normalizes = processor.do_normalize
    factor = processor.rescale_factor if processor.do_rescale else 1.0
    mean, std = (
        torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1).expand(3, 1, 1) / factor
        for values in (
            processor.image_mean if normalizes else 0.0,
            processor.image_std if normalizes else 1.0,
        )
    )
    return mean.to(device), std.to(device)


def training_loader(
    config: TrainingConfig, index: CocoIndex | ShardSet, accelerator: Accelerator
) -> tuple[TrainingSampler | ShardStream, DataLoader[Any]]:
    """Return the sampler that orders the training set, and the loader that follows it."""
    transform = TrainingTransform(
        config.scales,
        config.max_size,
        config.flip_probability,
        config.crop_probability,
        config.crop_scales,
        (config.crop_sizes[0], config.crop_sizes[1]),
        config.vertical_flip_probability,
        config.color_jitter,
    )
    workers, multiple = config.num_workers, config.pad_to_multiple
    rank, processes = accelerator.process_index, accelerator.num_processes
    split = (config.batch_size, config.accumulate, rank, processes)
    pin = accelerator.device.type == "cuda"
    if isinstance(index, ShardSet):
        stream = ShardStream(index, transform, *split, workers, multiple, config.seed)
        return stream, make_loader(stream, None, workers, multiple, pin)
    sampler = TrainingSampler(_aspect_ratios(index), *split, config.seed)
    return sampler, make_loader(DetectionDataset(index, transform), sampler, workers, multiple, pin)


def evaluation_loader(
    index: CocoIndex,
    batch_size: int,
    size: Mapping[str, int],
    workers: int,
    multiple: int = 32,
    accelerator: Accelerator | None = None,
) -> DataLoader[Any]:
    """Return a loader that yields each image once over all processes.

    Args:
        index: The images.
        batch_size: Images in a batch.
        size: Size of the images, in the form of the image processor.
        workers: Number of loading processes.
        multiple: Batches are padded to multiples of it.
        accelerator: Accelerator of the processes; None for one process.
    """
    rank, processes = 0, 1
    pin = torch.cuda.is_available()
    if accelerator is not None:
        rank, processes = accelerator.process_index, accelerator.num_processes
        pin = accelerator.device.type == "cuda"
    sampler = EvaluationSampler(_aspect_ratios(index), batch_size, rank, processes)
    dataset = DetectionDataset(index, EvaluationTransform(size), with_maps=True)
    return make_loader(dataset, sampler, workers, multiple, pin, persistent=False)


def _aspect_ratios(index: CocoIndex) -> list[float]:
    ratios: list[float] = (index.sizes_hw[:, 1] / index.sizes_hw[:, 0]).tolist()
    return ratios


def make_output_folder(output: str | os.PathLike[str]) -> Path:
    """Make a folder for results; DataError if it cannot be made."""
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"output: {folder} cannot be made ({error.strerror})") from error
    return folder


def prepare_folder(config: TrainingConfig, agents: list[dict[str, Any]]) -> bool:
    """Make the folder of a run; return whether to resume the run that is in it.

    Args:
        config: All settings.
        agents: See `launch.agents`; a run that they have restarted resumes by itself.

    Raises:
        DataError: The folder has a run already that is not to be resumed, or cannot be made.
    """
    folder = make_output_folder(config.output)
    resumes = config.resume or launch.has_run(folder, agents)
    if not resumes and (folder / "metrics.jsonl").exists():
        raise DataError(
            f"output: {folder} has a run already; pass --resume to continue it, or another output"
        )
    return resumes


def hyperparameters(config: TrainingConfig) -> dict[str, Any]:
    """Return the settings as trackers take them: numbers, booleans and text."""
    values = config.to_dict()
    return {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in values.items()}
