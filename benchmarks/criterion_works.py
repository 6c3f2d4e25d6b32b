"""What the microbenchmarks measure of matching, loss and post-processing; see `works`."""

from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor

import cdetr_kernels
from benchmarks.works import CLASSES, LAYERS, Work, _bytes, _compiled, _draw, _own


def _predictions_and_targets(dtype, device, batch, queries, targets, layers=LAYERS):
    normal, uniform = _draw(device)
    predictions: dict[str, Tensor | None] = {
        "logits": normal(layers, batch, queries, CLASSES).to(dtype),
        "boxes": (uniform(layers, batch, queries, 4) * 0.5 + 0.2).to(dtype),
    }
    labels = (uniform(batch, targets) * CLASSES).long().clamp(max=CLASSES - 1)
    boxes = uniform(batch, targets, 4) * 0.5 + 0.2
    counts = torch.full((batch,), targets, device=device)
    return predictions, labels, boxes, counts


def _their_labels(labels: Tensor, boxes: Tensor) -> list[dict[str, Tensor]]:
    return [{"class_labels": one, "boxes": box} for one, box in zip(labels, boxes, strict=True)]


def matching_cost(
    dtype: torch.dtype, device: torch.device, batch: int = 8, queries: int = 300, targets: int = 20
) -> Work:
    """Costs of all layers; transformers' matcher without its solver, one layer after another."""
    predictions, labels, boxes, counts = _predictions_and_targets(
        dtype, device, batch, queries, targets
    )

    def run(logits, boxes_cxcywh, backend="torch"):
        wanted = boxes.to(torch.promote_types(logits.dtype, torch.float32))
        return cdetr_kernels.matching_cost(
            logits, boxes_cxcywh, labels, wanted, counts, backend=backend
        )

    def theirs():
        from transformers.loss import loss_deformable_detr as module

        matcher = module.DeformableDetrHungarianMatcher(class_cost=2, bbox_cost=5, giou_cost=2)
        their_labels = _their_labels(labels, boxes)
        nothing = ([], [])

        def costs(logits, boxes_cxcywh):
            found = []

            def solver(cost):
                found.append(cost)
                return nothing

            with mock.patch.object(module, "linear_sum_assignment", solver):
                for layer in zip(logits, boxes_cxcywh, strict=True):
                    matcher(dict(zip(("logits", "pred_boxes"), layer, strict=True)), their_labels)
            return torch.stack(found)

        return costs

    out = LAYERS * batch * queries * targets * 4
    inputs = {"logits": predictions["logits"], "boxes_cxcywh": predictions["boxes"]}
    # Of the logits, the columns of the targets' classes are read.
    read = out // 4 * torch.finfo(dtype).bits // 8 + _bytes(predictions["boxes"], labels, boxes)
    return Work(
        "matching_cost",
        f"L={LAYERS} B={batch} Q={queries} T={targets} K={CLASSES}",
        dtype,
        inputs,
        run,
        {
            **_own("matching_cost", predictions["logits"], run),
            "compiled eager": _compiled(run),
            "transformers, to the CPU": theirs,
        },
        (0, 0),
        (read + out,) * 2,
        uncapturable=("transformers, to the CPU",),
    )


def set_loss(
    dtype: torch.dtype, device: torch.device, batch: int = 8, queries: int = 300, targets: int = 20
) -> Work:
    """Losses of all layers, given the matching: query t for target t in layer 0, then shifted."""
    predictions, labels, boxes, counts = _predictions_and_targets(
        dtype, device, batch, queries, targets
    )
    layer, target = torch.arange(LAYERS, device=device), torch.arange(targets, device=device)
    matches = (target + layer[:, None, None]).expand(-1, batch, -1) % queries
    number = float(batch * targets)

    def run(logits, boxes_cxcywh, backend="torch"):
        wanted = boxes.to(torch.promote_types(logits.dtype, torch.float32))
        losses = cdetr_kernels.set_loss(
            logits, boxes_cxcywh, labels, wanted, counts, matches, number, backend=backend
        )
        return [losses[name] for name in ("loss_ce", "loss_bbox", "loss_giou")]

    def theirs():
        from transformers.loss.loss_deformable_detr import DeformableDetrImageLoss

        losses = ["labels", "boxes", "cardinality"]
        criterion = DeformableDetrImageLoss(lambda *_: None, CLASSES, 0.25, losses)
        their_labels = _their_labels(labels, boxes)
        order = torch.arange(targets)
        indices = [[((order + i) % queries, order)] * batch for i in range(LAYERS)]

        def compute(logits, boxes_cxcywh):
            found = []
            for i in range(LAYERS):
                outputs = {"logits": logits[i], "pred_boxes": boxes_cxcywh[i]}
                one = {}
                for loss in losses:
                    arguments = (loss, outputs, their_labels, indices[i], number)
                    one |= criterion.get_loss(*arguments)
                found.append(one)
            return [
                torch.stack([one[name] for one in found])
                for name in ("loss_ce", "loss_bbox", "loss_giou")
            ]

        return compute

    inputs = {"logits": predictions["logits"], "boxes_cxcywh": predictions["boxes"]}
    read = _bytes(*inputs.values(), labels, boxes, matches)
    return Work(
        "set_loss",
        f"L={LAYERS} B={batch} Q={queries} T={targets} K={CLASSES}",
        dtype,
        inputs,
        run,
        {
            **_own("set_loss", predictions["logits"], run),
            "compiled eager": _compiled(run),
            "transformers": theirs,
        },
        (0, 0),
        # The gradient of the logits can be made in the same pass; it is written once.
        (read, read + _bytes(*inputs.values())),
        tuple(inputs),
        uncapturable=("transformers",),
    )


def detection_topk(
    dtype: torch.dtype, device: torch.device, batch: int = 1, queries: int = 300, k: int = 100
) -> Work:
    """The best detections; transformers' post-processing, with a threshold that keeps all."""
    normal, uniform = _draw(device)
    inputs: dict[str, Tensor | None] = {
        "logits": normal(batch, queries, CLASSES).to(dtype),
        "boxes": uniform(batch, queries, 4).to(dtype),
    }
    sizes = torch.tensor([[800, 1066]], device=device).expand(batch, -1)

    def run(logits, boxes, backend="torch"):
        found = cdetr_kernels.detection_topk(logits, boxes, sizes, k=k, backend=backend)
        return [x.to(found[0].dtype) for x in found[:3]]

    def theirs():
        import transformers

        processor = transformers.ConditionalDetrImageProcessor()

        def process(logits, boxes):
            outputs = SimpleNamespace(logits=logits, pred_boxes=boxes)
            found = processor.post_process_object_detection(outputs, 0.0, sizes, top_k=k)
            return [
                torch.stack([image[name].to(logits.dtype) for image in found])
                for name in ("scores", "labels", "boxes")
            ]

        return process

    out = batch * k * (4 + 8 + 4 * 4 + 8)
    return Work(
        "detection_topk",
        f"B={batch} Q={queries} K={CLASSES} k={k}",
        dtype,
        inputs,
        run,
        {
            **_own("detection_topk", inputs["logits"], run),
            "compiled eager": _compiled(run),
            "transformers": theirs,
        },
        (0, 0),
        (_bytes(*inputs.values()) + out,) * 2,
        uncapturable=("transformers",),
    )
