"""The training criterion: labels -> matching -> weighted losses, all decoder layers at once.

Source: the authors' models/conditional_detr.py (SetCriterion) and models/matcher.py.
"""

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import sigmoid_focal_loss

from cdetr_fast.configuration import ConditionalDetrConfig
from cdetr_kernels import matching_cost, set_loss

logger = logging.getLogger(__name__)

Labels = list[dict[str, Tensor]]

# Annotation tools round; a box may overshoot the image by this much of its side. transformers
# trains on boxes of any place.
_BOX_TOLERANCE = {"paper": 1e-3, "transformers": float("inf")}


@dataclass(frozen=True)
class Targets:
    """The labels of a batch as padded tensors.

    Attributes:
        labels: int64 `[B, T]`, padded with 0.
        boxes_cxcywh: `[B, T, 4]`, relative, padded with 0.
        counts: int64 `[B]`.
        sizes: The counts as Python integers.
    """

    labels: Tensor
    boxes_cxcywh: Tensor
    counts: Tensor
    sizes: list[int]


def detection_loss(
    logits: Tensor,
    labels: Labels,
    device: torch.device,
    pred_boxes: Tensor,
    config: ConditionalDetrConfig,
    outputs_class: Tensor | None = None,
    outputs_coord: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor], list[dict[str, Tensor]] | None]:
    """Computes the loss of a detection model; the signature is that of transformers.

    Args:
        logits: Class logits of the last decoder layer `[B, Q, K]`.
        labels: For each image `class_labels` int64 `[T]` in [0, K), and `boxes` `[T, 4]` as centre
            and size relative to the image. T may be 0.
        device: Device to compute on; labels are moved there.
        pred_boxes: Boxes of the last decoder layer `[B, Q, 4]`, relative.
        config: Holds the weights of costs and losses, `auxiliary_loss` and `compat`.
        outputs_class: Class logits of every decoder layer `[L, B, Q, K]`, for the auxiliary losses.
        outputs_coord: Boxes of every decoder layer `[L, B, Q, 4]`.

    Returns:
        The weighted sum; each loss by name, with `_i` appended for layer i < L-1; and the outputs
        of the layers before the last, or None.

    Raises:
        TypeError: `labels` is not a list of dictionaries of tensors.
        ValueError: A label or box is out of range, or shapes do not fit.
    """
    criterion = _criterion(
        logits, labels, device, pred_boxes, config, outputs_class, outputs_coord, "focal"
    )
    return criterion.loss, _named(criterion.per_layer), criterion.auxiliary_outputs


def segmentation_loss(
    logits: Tensor,
    labels: Labels,
    device: torch.device,
    pred_boxes: Tensor,
    pred_masks: Tensor,
    config: ConditionalDetrConfig,
    outputs_class: Tensor | None = None,
    outputs_coord: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor], list[dict[str, Tensor]] | None]:
    """Computes the loss of a segmentation model: `detection_loss`, and masks of the last layer.

    transformers matches by the softmax of the logits here although they are trained with the focal
    loss; so does `compat="transformers"`.

    Args:
        logits: As in `detection_loss`; so are the arguments not listed here.
        labels: Also hold `masks` `[T, H, W]`, nonzero = object; `compat="transformers"` takes their
            values for probabilities.
        device: Device to compute on.
        pred_boxes: `[B, Q, 4]`.
        pred_masks: Mask logits `[B, Q, h, w]`.
        config: Holds the weights.
        outputs_class: `[L, B, Q, K]`.
        outputs_coord: `[L, B, Q, 4]`.

    Returns:
        As `detection_loss`.
    """
    classification = "focal" if config.compat == "paper" else "softmax"
    criterion = _criterion(
        logits, labels, device, pred_boxes, config, outputs_class, outputs_coord, classification
    )
    _check_masks(labels)
    mask_losses = _mask_losses(
        pred_masks,
        [
            label["masks"] if config.compat == "transformers" else label["masks"] != 0
            for label in labels
        ],
        criterion.last_matches,
        criterion.num_boxes,
    )
    loss = (
        criterion.loss
        + config.mask_loss_coefficient * mask_losses["loss_mask"]
        + config.dice_loss_coefficient * mask_losses["loss_dice"]
    )
    return loss, _named(criterion.per_layer, mask_losses), criterion.auxiliary_outputs


class _Criterion(NamedTuple):
    """Weighted loss, losses `[L]` by name (the last layer last), and what mask losses need."""

    loss: Tensor
    per_layer: dict[str, Tensor]
    auxiliary_outputs: list[dict[str, Tensor]] | None
    last_matches: Tensor
    num_boxes: Tensor


def _criterion(
    logits: Tensor,
    labels: Labels,
    device: torch.device,
    pred_boxes: Tensor,
    config: ConditionalDetrConfig,
    outputs_class: Tensor | None,
    outputs_coord: Tensor | None,
    classification: str,
) -> _Criterion:
    auxiliary = None
    layer_logits, layer_boxes = logits[None], pred_boxes[None]
    if config.auxiliary_loss:
        if outputs_class is None or outputs_coord is None:
            missing = "outputs_class" if outputs_class is None else "outputs_coord"
            raise ValueError(f"{missing}: expected [L, B, Q, ...] with auxiliary_loss, got None")
        auxiliary = [
            {"logits": a, "pred_boxes": b}
            for a, b in zip(outputs_class[:-1], outputs_coord[:-1], strict=True)
        ]
        # transformers norms the last state twice, so its last layer is not the last auxiliary one.
        layer_logits = torch.cat([outputs_class[:-1], layer_logits])
        layer_boxes = torch.cat([outputs_coord[:-1], layer_boxes])

    targets = _pad_targets(labels, device, logits.shape[0])
    with torch.no_grad():
        matches = match(layer_logits, layer_boxes, targets, config, classification)
    num_boxes = _average_num_boxes(sum(targets.sizes), logits.device, config.compat)
    per_layer = set_loss(
        layer_logits,
        layer_boxes,
        targets.labels,
        targets.boxes_cxcywh,
        targets.counts,
        matches,
        num_boxes,
        alpha=config.focal_alpha,
    )

    weights = {
        "loss_ce": config.cls_loss_coefficient if config.compat == "paper" else 1,
        "loss_bbox": config.bbox_loss_coefficient,
        "loss_giou": config.giou_loss_coefficient,
    }
    loss = sum(weight * per_layer[name].sum() for name, weight in weights.items())
    # Every layer has the same number of pairs: min(Q, T) in each image.
    last_matches = matches[1:].unflatten(1, (len(layer_logits), -1))[:, -1]
    return _Criterion(loss, per_layer, auxiliary, last_matches, num_boxes)


def _named(
    per_layer: dict[str, Tensor], of_last_layer: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Losses by transformers' names and in its order: the last layer's, then `_i` for layer i."""
    last = len(per_layer["loss_ce"]) - 1
    names = {name: values[last] for name, values in per_layer.items()} | (of_last_layer or {})
    for i in range(last):
        names |= {f"{name}_{i}": values[i] for name, values in per_layer.items()}
    return names


def match(
    layer_logits: Tensor,
    layer_boxes_cxcywh: Tensor,
    targets: Targets,
    config: ConditionalDetrConfig,
    classification: str = "focal",
) -> Tensor:
    """Assigns predictions to targets, one to one and at least cost, in every layer and image.

    The costs of all layers and images go to the host in one transfer, together with what tells that
    labels are out of range and predictions not finite: the only synchronisation of a training step.

    Args:
        layer_logits: `[L, B, Q, K]`.
        layer_boxes_cxcywh: `[L, B, Q, 4]`, relative.
        targets: The padded labels.
        config: Holds the cost weights.
        classification: "focal" or "softmax" class cost.

    Returns:
        int64 `[4, M]`: layer, image, query and target of each pair, layer by layer.

    Raises:
        ValueError: A class label is not in [0, K), or a box is inverted or (but for
            `compat="transformers"`) outside [0, 1].

    Source: Kuhn, "The Hungarian method"; solved by `scipy.optimize.linear_sum_assignment`.
    """
    layers, batch, queries, classes = layer_logits.shape
    most = targets.labels.shape[1]
    cost = matching_cost(
        layer_logits,
        layer_boxes_cxcywh,
        targets.labels.clamp(0, classes - 1),
        targets.boxes_cxcywh,
        targets.counts,
        class_weight=config.class_cost,
        bbox_weight=config.bbox_cost,
        giou_weight=config.giou_cost,
        classification=classification,
    )
    boxes = targets.boxes_cxcywh
    tolerance = _BOX_TOLERANCE[config.compat]
    outside = ((boxes < -tolerance) | (boxes > 1 + tolerance)).any(-1)
    bad_boxes = outside | (boxes[..., 2:] < 0).any(-1) | ~boxes.isfinite().all(-1)
    flags = (
        (targets.labels < 0) | (targets.labels >= classes),  # [B, T]
        bad_boxes,  # [B, T]
        ~_sum_is_finite(layer_logits),  # [L, B]
        ~_sum_is_finite(layer_boxes_cxcywh),  # [L, B]
    )
    packed = torch.cat([cost.flatten(), *(flag.flatten().to(cost.dtype) for flag in flags)])
    sizes = [cost.numel(), *(flag.numel() for flag in flags)]
    host = np.split(packed.cpu().numpy(), np.cumsum(sizes)[:-1])
    _raise_for_bad_labels(
        host[1].reshape(batch, most), host[2].reshape(batch, most), targets, classes
    )
    _report_non_finite("logits", host[3].reshape(layers, batch))
    _report_non_finite("pred_boxes", host[4].reshape(layers, batch))

    costs = host[0].reshape(layers, batch, queries, most)
    # Pairs without a valid cost are taken only when nothing else is left.
    costs = np.nan_to_num(
        costs, nan=(worst := np.finfo(costs.dtype).max), posinf=worst, neginf=worst
    )
    from scipy.optimize import linear_sum_assignment  # 0.2 s, and it changes warnings.filters

    pairs = []
    for layer in range(layers):
        for image, count in enumerate(targets.sizes):
            query, target = linear_sum_assignment(costs[layer, image, :, :count])
            where = np.full_like(query, layer), np.full_like(query, image)
            pairs.append(np.stack([*where, query, target]))
    matches = torch.from_numpy(np.concatenate(pairs, axis=1))
    return matches.to(layer_logits.device, non_blocking=True)


def _sum_is_finite(x: Tensor) -> Tensor:
    """Whether `[L, B, ...]` is finite in each layer and image, in one pass (`isfinite` takes four).

    Finite values of a size whose sum overflows count as not finite; no logit comes near.
    """
    return x.flatten(2).sum(-1, dtype=torch.promote_types(x.dtype, torch.float32)).isfinite()


def _pad_targets(labels: Labels, device: torch.device, batch: int) -> Targets:
    if not isinstance(labels, (list, tuple)):
        raise TypeError(f"labels: expected a list of dictionaries, got {type(labels).__name__}")
    if len(labels) != batch:
        raise ValueError(f"labels: expected {batch} dictionaries, one an image, got {len(labels)}")
    for i, label in enumerate(labels):
        if not isinstance(label, Mapping):
            raise TypeError(f"labels[{i}]: expected a dictionary, got {type(label).__name__}")
        for name in ("class_labels", "boxes"):
            if name not in label:
                raise ValueError(f"labels[{i}]: expected the key {name!r}, got {sorted(label)}")
            if not isinstance(label[name], Tensor):
                got = type(label[name]).__name__
                raise TypeError(f"labels[{i}][{name!r}]: expected a tensor, got {got}")
        classes, boxes = label["class_labels"], label["boxes"]
        if classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
            raise TypeError(f"labels[{i}]['class_labels']: expected integers, got {classes.dtype}")
        if not boxes.is_floating_point():
            raise TypeError(f"labels[{i}]['boxes']: expected floating point, got {boxes.dtype}")
        if classes.ndim != 1:
            shape = list(classes.shape)
            raise ValueError(f"labels[{i}]['class_labels']: expected [T], got {shape}")
        if tuple(boxes.shape) != (len(classes), 4):
            expected, shape = [len(classes), 4], list(boxes.shape)
            raise ValueError(f"labels[{i}]['boxes']: expected {expected}, got {shape}")
    sizes = [len(label["class_labels"]) for label in labels]
    box_dtype = reduce(torch.promote_types, (label["boxes"].dtype for label in labels))
    return Targets(
        labels=pad_sequence([x["class_labels"].to(device).long() for x in labels], True),
        boxes_cxcywh=pad_sequence([x["boxes"].to(device, box_dtype) for x in labels], True),
        counts=torch.tensor(sizes, dtype=torch.int64).to(device, non_blocking=True),
        sizes=sizes,
    )


def _check_masks(labels: Labels) -> None:
    for i, label in enumerate(labels):
        if "masks" not in label:
            raise ValueError(f"labels[{i}]: expected the key 'masks', got {sorted(label)}")
        masks, count = label["masks"], len(label["class_labels"])
        if not isinstance(masks, Tensor):
            got = type(masks).__name__
            raise TypeError(f"labels[{i}]['masks']: expected a tensor, got {got}")
        if masks.ndim != 3 or len(masks) != count or (count and 0 in masks.shape):
            shape = list(masks.shape)
            raise ValueError(f"labels[{i}]['masks']: expected [{count}, H, W], got {shape}")


def _raise_for_bad_labels(
    bad_labels: np.ndarray, bad_boxes: np.ndarray, targets: Targets, classes: int
) -> None:
    for name, bad, values, expected in (
        ("class_labels", bad_labels, targets.labels, f"values in [0, {classes})"),
        ("boxes", bad_boxes, targets.boxes_cxcywh, "centre, width, height in [0, 1]"),
    ):
        for image, count in enumerate(targets.sizes):
            if (where := np.flatnonzero(bad[image, :count])).size:
                got = values[image, where[0]].tolist()
                raise ValueError(
                    f"labels[{image}][{name!r}][{where[0]}]: expected {expected}, got {got}"
                )


def _report_non_finite(name: str, bad: np.ndarray) -> None:
    for layer, images in enumerate(bad):
        if images.any():
            logger.warning(
                "non-finite %s of decoder layer %d of %d, images %s: matched last",
                name,
                layer,
                len(bad),
                np.flatnonzero(images).tolist(),
            )


def _average_num_boxes(num_boxes: int, device: torch.device, compat: str) -> Tensor:
    """Number of target boxes, averaged over the processes, at least 1."""
    total = torch.tensor(float(num_boxes)).to(device, non_blocking=True)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # transformers averages only where Accelerate runs the processes.
        state = getattr(sys.modules.get("accelerate"), "PartialState", None)
        if compat == "paper" or (state is not None and state._shared_state):
            torch.distributed.all_reduce(total)
            total = total / torch.distributed.get_world_size()
    return total.clamp(min=1)


def _mask_losses(
    pred_masks: Tensor, target_masks: list[Tensor], matches: Tensor, num_boxes: Tensor
) -> dict[str, Tensor]:
    """Focal and dice loss of the matched masks, at the size of the (padded) target masks.

    In fp32 at least: sums over the pixels of a mask overflow fp16.
    """
    image, query, target = matches
    dtype = torch.promote_types(pred_masks.dtype, torch.float32)
    height, width = (max(masks.shape[dim] for masks in target_masks) for dim in (1, 2))
    wanted = pad_sequence(
        [
            F.pad(masks, (0, width - masks.shape[2], 0, height - masks.shape[1]))
            for masks in target_masks
        ],
        batch_first=True,
    ).to(pred_masks.device, dtype)  # [B, T, H, W]
    predicted = pred_masks[image, query].to(dtype)
    if len(image) == 0:
        zero = predicted.sum()
        return {"loss_mask": zero, "loss_dice": zero}
    predicted = F.interpolate(predicted[:, None], size=(height, width), mode="bilinear")
    predicted, wanted = predicted[:, 0].flatten(1), wanted[image, target].flatten(1)
    probability = predicted.sigmoid()
    overlap = 2 * (probability * wanted).sum(1)
    dice = 1 - (overlap + 1) / (probability.sum(1) + wanted.sum(1) + 1)
    focal = sigmoid_focal_loss(predicted, wanted, alpha=0.25, gamma=2.0).mean(1)
    return {"loss_mask": focal.sum() / num_boxes, "loss_dice": dice.sum() / num_boxes}
