"""Training criterion: labels -> matching -> weighted losses, for all decoder layers at once.

Source: the authors' models/conditional_detr.py (SetCriterion) and models/matcher.py.
"""

import sys
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import sigmoid_focal_loss

from cdetr_fast.config.model import ConditionalDetrConfig
from cdetr_fast.loss.assignment import Matches, match
from cdetr_fast.loss.targets import Labels, Targets, pad_targets, to_device
from cdetr_kernels import set_loss


def detection_loss(
    logits: Tensor,
    labels: Labels,
    device: torch.device,
    pred_boxes: Tensor,
    config: ConditionalDetrConfig,
    outputs_class: Tensor | None = None,
    outputs_coord: Tensor | None = None,
    num_boxes: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor], list[dict[str, Tensor]] | None]:
    """Compute the loss of a detection model; the signature is that of transformers.

    Args:
        logits: Class logits of the last decoder layer `[B, Q, K]`.
        labels: For each image `class_labels` int64 `[T]` in [0, K), and `boxes` `[T, 4]` as centre
            and size relative to the image. T may be 0. Best on the host, in any number of tensors:
            they are moved to the device in one copy.
        device: Device to compute on.
        pred_boxes: Boxes of the last decoder layer `[B, Q, 4]`, relative.
        config: Model configuration with the weights of costs and losses.
        outputs_class: Class logits of every decoder layer `[L, B, Q, K]`, for the auxiliary losses.
        outputs_coord: Boxes of every decoder layer `[L, B, Q, 4]`.
        num_boxes: Number of boxes that the losses are divided by, a scalar; None for the number in
            this batch, averaged over the processes. With gradient accumulation pass the number in
            all batches of the step, divided by the number of processes.

    Returns:
        The weighted sum; each loss by name, with `_i` appended for layer i < L-1; and the outputs
        of the layers before the last, or None.

    Raises:
        TypeError: `labels` is not a list of dictionaries of tensors.
        ValueError: A label or box is out of range, or shapes do not fit.
    """
    criterion = _criterion(
        logits, labels, device, pred_boxes, config, outputs_class, outputs_coord, "focal", num_boxes
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
    num_boxes: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor], list[dict[str, Tensor]] | None]:
    """Compute the loss of a segmentation model: `detection_loss`, and masks of the last layer.

    transformers matches by the softmax of the logits here although they are trained with the focal
    loss; `compat="transformers"` does the same.

    Args:
        logits: As in `detection_loss`.
        labels: With `masks` `[T, H, W]` too, nonzero = object; `compat="transformers"` takes their
            values for probabilities.
        device: Device to compute on.
        pred_boxes: `[B, Q, 4]`.
        pred_masks: Mask logits `[B, Q, h, w]`.
        config: Model configuration.
        outputs_class: `[L, B, Q, K]`.
        outputs_coord: `[L, B, Q, 4]`.
        num_boxes: A scalar or None.

    Returns:
        As `detection_loss`.
    """
    classification = "focal" if config.compat == "paper" else "softmax"
    criterion = _criterion(
        logits,
        labels,
        device,
        pred_boxes,
        config,
        outputs_class,
        outputs_coord,
        classification,
        num_boxes,
    )
    _check_masks(labels)
    mask_losses = _mask_losses(
        pred_masks,
        [
            label["masks"] if config.compat == "transformers" else label["masks"] != 0
            for label in labels
        ],
        _pairs_of_last_layer(criterion.matches, criterion.targets),
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
    targets: Targets
    matches: Matches
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
    num_boxes: Tensor | None,
) -> _Criterion:
    auxiliary = None
    layer_logits, layer_boxes = logits[None], pred_boxes[None]
    if config.auxiliary_loss:
        if outputs_class is None or outputs_coord is None:
            missing = "outputs_class" if outputs_class is None else "outputs_coord"
            raise ValueError(f"{missing}: expected [L, B, Q, ...] with auxiliary_loss, got None")
        each_logits, each_boxes = outputs_class.unbind(0)[:-1], outputs_coord.unbind(0)[:-1]
        auxiliary = [
            {"logits": a, "pred_boxes": b} for a, b in zip(each_logits, each_boxes, strict=True)
        ]
        # transformers norms the last state twice, so its last layer is not the last auxiliary one.
        layer_logits = _with_last(outputs_class, each_logits, logits)
        layer_boxes = _with_last(outputs_coord, each_boxes, pred_boxes)

    targets = pad_targets(labels, device, len(logits), logits.shape[2], config.compat)
    with torch.no_grad():
        matches = match(layer_logits, layer_boxes, targets, config, classification)
    if num_boxes is None:
        num_boxes = _average_num_boxes(targets.counts, config.compat)
    per_layer = set_loss(
        layer_logits,
        layer_boxes,
        targets.labels,
        targets.boxes_cxcywh,
        targets.counts,
        matches.queries,
        num_boxes,
        alpha=config.focal_alpha,
    )

    weights = {
        "loss_ce": config.cls_loss_coefficient if config.compat == "paper" else 1,
        "loss_bbox": config.bbox_loss_coefficient,
        "loss_giou": config.giou_loss_coefficient,
    }
    weighted = [weight * per_layer[name].sum() for name, weight in weights.items()]
    loss = weighted[0] + weighted[1] + weighted[2]
    return _Criterion(loss, per_layer, auxiliary, targets, matches, num_boxes)


def _with_last(layers: Tensor, before: tuple[Tensor, ...], last: Tensor) -> Tensor:
    """Return `[L, ...]` with its last layer replaced, without a copy if it is `last` already."""
    base = layers if layers._base is None else layers._base
    is_view = last.grad_fn is not None and layers.requires_grad and last._base is base
    if is_view and last.shape == layers.shape[1:] and last.stride() == layers.stride()[1:]:
        offset = layers.storage_offset() + len(before) * layers.stride(0)
        if last.storage_offset() == offset:
            return layers
    return torch.stack([*before, last])


def _named(
    per_layer: dict[str, Tensor], of_last_layer: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return losses by transformers' names and in its order: last layer, then `_i` of layer i."""
    layers = {name: values.unbind(0) for name, values in per_layer.items()}
    names = {name: values[-1] for name, values in layers.items()} | (of_last_layer or {})
    for i in range(len(layers["loss_ce"]) - 1):
        names |= {f"{name}_{i}": values[i] for name, values in layers.items()}
    return names


def _pairs_of_last_layer(matches: Matches, targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
    """Return image, query and target of each pair, `[M]`; the host knows M without waiting."""
    if matches.on_host is not None:
        is_pair = matches.on_host[-1] >= 0
    else:  # the device solves only if there are at least as many queries as targets
        is_pair = np.arange(targets.labels.shape[1]) < np.array(targets.sizes)[:, None]
    image, target = to_device(np.stack(is_pair.nonzero()), targets.labels.device)
    return image, matches.queries[-1, image, target], target


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


def _average_num_boxes(counts: Tensor, compat: str) -> Tensor:
    """Return the number of target boxes, averaged over the processes, at least 1."""
    total = counts.sum(dtype=torch.float32)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # transformers averages only under Accelerate.
        state = getattr(sys.modules.get("accelerate"), "PartialState", None)
        if compat == "paper" or (state is not None and state._shared_state):
            torch.distributed.all_reduce(total)
            total = total / torch.distributed.get_world_size()
    return total.clamp(min=1)


def _mask_losses(
    pred_masks: Tensor,
    target_masks: list[Tensor],
    pairs: tuple[Tensor, Tensor, Tensor],
    num_boxes: Tensor,
) -> dict[str, Tensor]:
    """Return focal and dice loss of the matched masks, at the size of the (padded) target masks.

    Computed in fp32 at least: sums over the pixels of a mask overflow fp16.
    """
    image, query, target = pairs
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
