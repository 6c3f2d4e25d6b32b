"""Evaluation of a checkpoint on a data set: figures, tables and pictures."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Literal

import torch

from cdetr_fast import (
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    ConditionalDetrForSegmentation,
    ConditionalDetrImageProcessor,
)
from cdetr_fast.common import progress
from cdetr_fast.common.devices import qualify_kernels
from cdetr_fast.common.validation import NonNegativeInt, PositiveInt, Probability, checked
from cdetr_fast.models.auto import class_of_checkpoint
from cdetr_fast.models.predict import PredictingModel
from cdetr_fast.training import setup
from cdetr_fast.training.data.coco import Exif
from cdetr_fast.training.data.exports import read_set
from cdetr_fast.training.data.index import CocoIndex
from cdetr_fast.training.data.label_checks import check_labels
from cdetr_fast.training.errors import DataError
from cdetr_fast.training.evaluation.detection import Evaluation, evaluate_detections, predict
from cdetr_fast.training.evaluation.report import Report, write_report
from cdetr_fast.training.evaluation.scored import (
    Scored,
    read_saved,
    saved_detections,
    write_evaluation,
)
from cdetr_fast.training.evaluation.segments import segment_scorer
from cdetr_fast.training.run.launch import shared_errors

logger = logging.getLogger(__name__)


def evaluate(
    model: str | os.PathLike[str],
    annotations: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    *,
    masks: str | os.PathLike[str] | None = None,
    batch_size: int = 1,
    num_workers: int = 2,
    device: Literal["auto", "cpu"] = "auto",
    threshold: float = 0.5,
    bad_labels: Literal["stop", "drop"] = "stop",
    bad_images: Literal["stop", "skip"] = "stop",
    exif: Exif = "auto",
    against: str | os.PathLike[str] | None = None,
) -> Evaluation | None:
    """Evaluate a checkpoint, on all processes that `torchrun` started.

    Args:
        model: Folder or hub name, with its image processor; or the authors' .pth file.
        annotations: COCO JSON file, or the folder of a split that Roboflow exported, whose
            categories the model knows by name; by id if it is one of the authors' files, which have
            no names. Of a segmentation checkpoint, masks are scored too if the file has them.
        images: Folder of its images; None looks in the usual places.
        output: Folder for report.html, figures and detections; None writes none.
        masks: Folder of panoptic PNG files, to measure panoptic quality too; `annotations` is a
            panoptic JSON file then, and `model` a segmentation checkpoint.
        batch_size: Images in a forward pass.
        num_workers: Number of processes that load images.
        device: "auto" or "cpu".
        threshold: Lowest score that counts in the confusion matrix, among the worst images and for
            a segment. AP and AR take all scores.
        bad_labels: "stop" or "drop", as in training.
        bad_images: "stop" makes images that cannot be read an error; "skip" leaves them out of the
            figures, and reports them.
        exif: Which picture labels are on, as in `read_coco`.
        against: Folder of an earlier evaluation of the same images, or of a training run; the
            report then has what got better and what got worse.

    Returns:
        The figures; None on all processes but the first.

    Raises:
        DataError: An argument, the model or the data cannot be used.
    """
    from accelerate import Accelerator

    try:
        checked(PositiveInt, batch_size, "batch_size")
        checked(NonNegativeInt, num_workers, "num_workers")
        checked(Probability, threshold, "threshold")
        checked(Literal["auto", "cpu"], device, "device")
        checked(Literal["stop", "drop"], bad_labels, "bad_labels")
        checked(Literal["stop", "skip"], bad_images, "bad_images")
        checked(Exif, exif, "exif")
    except (TypeError, ValueError) as error:
        raise DataError(str(error)) from error
    accelerator = Accelerator(cpu=device == "cpu")
    qualify_kernels(accelerator.device)
    with shared_errors(accelerator):
        if output is not None:  # before an hour of work, not after
            setup.make_output_folder(output)
        network_class = _class_of(model, masks is not None)
        segments = network_class is ConditionalDetrForSegmentation
        index = read_set(annotations, images, masks, exif, segments)
        if segments and masks is None and not index.has_segmentations:
            index, network_class = index.without_segmentations(), ConditionalDetrForObjectDetection
        with progress.task("loading the model"):
            network, processor = _load(model, network_class)
        names = _class_names(network.config, model, index)
        index, report = check_labels(index.with_classes(names, f"the model {model}"), bad_labels)
        if against is not None and output is None:
            raise DataError("against: is for the report; expected output with it, got none")
        if against is not None and accelerator.is_main_process:  # before an hour of work, too
            saved_detections(Path(against), index)
    if accelerator.is_main_process:
        logger.info("\n".join(report.lines()))
    loader = setup.evaluation_loader(
        index, batch_size, processor.size, num_workers, accelerator=accelerator
    )
    network.to(accelerator.device)
    statistics = setup.pixel_statistics(processor, accelerator.device)
    scorer = segment_scorer(index, threshold)
    found = predict(network, loader, *statistics, accelerator, observe=scorer)
    if scorer is not None:
        scorer.gather(accelerator)
    if found.failures and bad_images == "stop":
        elsewhere = not accelerator.is_main_process
        raise DataError(found.described_failures(), reported_elsewhere=elsewhere)
    index, found = found.without_failures(index)
    accelerator.wait_for_everyone()  # see the end of `Engine.run`
    if not accelerator.is_main_process:
        return None
    if found.failures:
        logger.warning("%s\nthey are left out of the figures", found.described_failures())
    with progress.task("scoring"):
        evaluation = evaluate_detections(index, found, scorer)
    if output is None:
        return evaluation
    scored = Scored(index, found, evaluation, threshold, scorer)
    settings = {
        "model": model,
        "annotations": annotations,
        "images": images,
        "masks": masks,
        "batch_size": batch_size,
        "threshold": threshold,
        "bad_labels": bad_labels,
        "bad_images": bad_images,
        "exif": exif,
        "processes": accelerator.num_processes,
    }
    content = Report(
        f"Evaluation of {model}",
        settings,
        accelerator.device,
        [("Labels", index, report)],
        scored,
        against=None
        if against is None
        else (str(against), read_saved(Path(against), index, threshold)),
    )
    try:
        with progress.task("writing the report"):
            write_evaluation(scored, Path(output))
            write_report(content, Path(output, "report.html"))
    except OSError as error:  # a full disk is no reason to lose the figures
        figures = ", ".join(f"{name} {value:.4f}" for name, value in evaluation.stats.items())
        raise DataError(f"output: {output} cannot be written ({error}); {figures}") from error
    return evaluation


def _class_of(
    model: str | os.PathLike[str], needs_segments: bool
) -> type[ConditionalDetrForObjectDetection | ConditionalDetrForSegmentation]:
    try:
        network_class = class_of_checkpoint(model)
    except (OSError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"model: {error}") from error
    if needs_segments and network_class is not ConditionalDetrForSegmentation:
        raise DataError(
            f"masks: {model} is not a segmentation checkpoint but one of "
            f"{network_class.__name__}; leave masks out to score its boxes"
        )
    return network_class


def _load(
    model: str | os.PathLike[str],
    network_class: type[ConditionalDetrForObjectDetection | ConditionalDetrForSegmentation],
) -> tuple[PredictingModel, ConditionalDetrImageProcessor]:
    """Load model and image processor."""
    try:
        network = network_class.from_pretrained(model, dtype=torch.float32)
        if os.path.isfile(model):  # the processor beside it, or the default
            processor = network.image_processor
        else:
            processor = ConditionalDetrImageProcessor.from_pretrained(model)
    except (OSError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"model: {error}") from error
    if unfollowed := setup.unfollowed_settings(processor):
        raise DataError(
            f"model: {model}: its image processor has {unfollowed}, but evaluate resizes, and "
            "bilinearly; change preprocessor_config.json if the model may see such images, or "
            "score what its predict returns"
        )
    return network, processor


def _class_names(
    config: ConditionalDetrConfig, model: str | os.PathLike[str], index: CocoIndex
) -> list[str]:
    """Return the names of a model's classes; the authors' files go by category ids."""
    names = [config.id2label.get(i, str(i)) for i in range(config.num_labels)]
    if not os.path.isfile(model) or names != [f"LABEL_{i}" for i in range(len(names))]:
        return names
    for category, name in zip(index.category_ids.tolist(), index.classes, strict=True):
        if not 0 <= category < len(names):
            raise DataError(
                f"{index.path}: category {category} ({name!r}): expected an id from 0 to "
                f"{len(names) - 1}, as {model} has {len(names)} classes, which go by category ids"
            )
        names[category] = name
    return names
