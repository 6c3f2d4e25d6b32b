r"""Train the embedded demo checkpoint from scratch on procedurally drawn scenes, on a CPU.

    torchrun --nproc-per-node 2 examples/demo_checkpoint/train.py \
        --bf16 --steps 10041 --output cdetr_fast/demo/assets

Everything is learnt here, the backbone included. Four things make that possible in some 80 minutes:

- Scenes are drawn once, and then seen under new flips, turns and colours.
- Batch norm is live in training (the model itself always freezes it), and frozen again to be saved.
- A linear head on the encoder output predicts class and box at each map position (`DenseHead`). It
  teaches the backbone and the encoder from the first step on, while the decoder still looks for its
  objects. It fades out over the run and is then thrown away.
- Three groups of queries learn at once (`group_queries`); the first one is kept.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cdetr_fast import (
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    ConditionalDetrImageProcessor,
)
from cdetr_fast.demo.scenes import CLASSES, SIZE, TRAIN_SEED, coco_ground_truth, draw_scene
from cdetr_fast.models.attention import ConditionalDetrDecoderSelfAttention
from cdetr_fast.models.backbone import FrozenBatchNorm2d, FrozenBatchNormAct2d
from cdetr_fast.training.evaluation.box_scores import score_boxes

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BACKBONE, STAGE, STRIDE = "resnet10t", 3, 8
NUM_QUERIES = 30
QUERIES = "model.query_position_embeddings.weight"


def build_model(auxiliary_loss: bool, groups: int = 1) -> ConditionalDetrForObjectDetection:
    """Build a ResNet-10 dilated to stride 8 below a two-layer encoder and a four-layer decoder."""
    config = ConditionalDetrConfig(
        backbone_config={
            "model_type": "timm_backbone",
            "backbone": BACKBONE,
            "out_indices": [STAGE],
            "output_stride": STRIDE,
            "use_pretrained_backbone": False,
        },
        num_queries=groups * NUM_QUERIES,
        d_model=128,
        encoder_layers=2,
        decoder_layers=4,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=512,
        decoder_ffn_dim=512,
        dropout=0.0,
        auxiliary_loss=auxiliary_loss,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: label for label, name in enumerate(CLASSES)},
    )
    model = ConditionalDetrForObjectDetection(config)
    model.model.unfreeze_backbone()
    return model


# --- groups of queries, while training ------------------------------------------------------------


def group_queries(model: ConditionalDetrForObjectDetection, groups: int) -> None:
    """Let each group of queries detect all objects on its own, as in Group DETR.

    Self-attention and matching stay inside a group, so that the first group is the saved model. The
    backbone and the encoder, which cost the most, run once for all.
    """

    def fold(x: Tensor) -> Tensor:
        return x.unflatten(-2, (groups, NUM_QUERIES)).movedim(-3, -4).flatten(-4, -3)

    def separate(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        states, query_position, *rest = args
        query_position = query_position.expand(len(states), -1, -1)
        return (fold(states), fold(query_position), *rest)

    def join(_: nn.Module, __: Any, output: tuple[Tensor, None]) -> tuple[Tensor, None]:
        return output[0].unflatten(0, (groups, -1)).movedim(0, 1).flatten(1, 2), None

    for module in model.modules():
        if isinstance(module, ConditionalDetrDecoderSelfAttention):
            module.register_forward_pre_hook(separate)
            module.register_forward_hook(join)
    criterion = model.loss_function

    def loss(
        logits: Tensor,
        labels: list[dict[str, Tensor]],
        device: torch.device,
        boxes: Tensor,
        config: ConditionalDetrConfig,
        *by_layer: Tensor,
        **kwargs: Any,
    ) -> Any:
        logits, boxes, *layers = (fold(x) for x in (logits, boxes, *by_layer))
        return criterion(logits, labels * groups, device, boxes, config, *layers, **kwargs)

    model.loss_function = loss


# --- batch norm, live while training --------------------------------------------------------------


class LiveBatchNorm2d(nn.BatchNorm2d):
    """Trainable batch norm that replaces a frozen one: same state, same activation after it."""

    def __init__(self, frozen: FrozenBatchNorm2d) -> None:
        super().__init__(len(frozen.state_dict()["weight"]), eps=frozen.eps)
        self.load_state_dict(frozen.state_dict(), strict=False)  # it has no num_batches_tracked
        if isinstance(frozen, FrozenBatchNormAct2d):
            self.drop: nn.Module = frozen.drop
            self.act: nn.Module = frozen.act

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        if "act" not in self._modules:
            return x
        activated: Tensor = self.act(self.drop(x))
        return activated


def thaw_batch_norm(module: nn.Module) -> None:
    """Replace each frozen batch norm below `module` by a live one."""
    for name, child in module.named_children():
        if isinstance(child, FrozenBatchNorm2d):
            setattr(module, name, LiveBatchNorm2d(child))
        else:
            thaw_batch_norm(child)


def saved_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of the model with its batch norm frozen and one group of queries."""
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    return {**state, QUERIES: state[QUERIES][:NUM_QUERIES]}


# --- data -----------------------------------------------------------------------------------------


def _draw(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    image, annotation = draw_scene(seed)
    boxes_xyxy = annotation["boxes_xyxy"] / np.array([*SIZE[::-1], *SIZE[::-1]], dtype=np.float32)
    return np.asarray(image), boxes_xyxy, annotation["labels"]


class Scenes:
    """Scenes drawn once, returned in shuffled batches under random symmetries."""

    def __init__(self, count: int, seed: int, processes: int) -> None:
        self.images = torch.empty((count, *SIZE, 3), dtype=torch.uint8)
        self.boxes_xyxy, self.labels = [], []
        seeds = range(TRAIN_SEED + seed * count, TRAIN_SEED + (seed + 1) * count)
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            for i, (image, boxes_xyxy, labels) in enumerate(pool.map(_draw, seeds, chunksize=64)):
                self.images[i] = torch.from_numpy(image.copy())
                self.boxes_xyxy.append(torch.from_numpy(boxes_xyxy))
                self.labels.append(torch.from_numpy(labels))

    def batch(
        self, step: int, size: int, seed: int, rank: int, world: int
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Return the batch of a step: a function of the arguments alone, so resuming repeats it."""
        per_epoch = len(self.labels) // size
        epoch, position = divmod(step, per_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(len(self.labels))
        rng = np.random.default_rng((seed, epoch, position, rank))
        images, labels = [], []
        for i in order[position * size : (position + 1) * size][rank::world]:
            image, boxes = self.images[i], self.boxes_xyxy[i]
            if rng.random() < 0.5:
                image, boxes = image.flip(1), _mirrored(boxes, 0)
            if rng.random() < 0.5:
                image, boxes = image.flip(0), _mirrored(boxes, 1)
            if SIZE[0] == SIZE[1] and rng.random() < 0.5:
                image, boxes = image.transpose(0, 1), boxes[:, [1, 0, 3, 2]]
            images.append(image[..., torch.from_numpy(rng.permutation(3))])
            centre, extent = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
            labels.append({"class_labels": self.labels[i], "boxes": torch.cat([centre, extent], 1)})
        return normalised(torch.stack(images)), labels


def _mirrored(boxes_xyxy: Tensor, axis: int) -> Tensor:
    boxes_xyxy = boxes_xyxy.clone()
    boxes_xyxy[:, axis::2] = 1 - boxes_xyxy[:, axis::2].flip(1)
    return boxes_xyxy


def normalised(images: Tensor) -> Tensor:
    """Convert uint8 [B, H, W, 3] to float [B, 3, H, W], as the image processor does."""
    pixels = (images.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    return pixels.permute(0, 3, 1, 2)  # channels-last in memory


# --- the dense head -------------------------------------------------------------------------------


class DenseHead(nn.Module):
    """Class and box of the object at each position of the encoder output; only for training."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.classes = nn.Linear(width, classes)
        self.boxes = nn.Linear(width, 4)
        nn.init.constant_(self.classes.bias, -math.log(99))

    def forward(
        self, memory: Tensor, labels: list[dict[str, Tensor]], grid: tuple[int, ...]
    ) -> Tensor:
        """Return the focal and L1 loss of `memory` [B, h*w, C] against the objects, per object."""
        h, w = grid
        y, x = (torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w
        points = torch.cartesian_prod(y, x).flip(1)
        target = torch.zeros(*memory.shape[:2], self.classes.out_features)
        cell_lists, box_lists = [], []
        for b, label in enumerate(labels):
            offset = (points[:, None] - label["boxes"][None, :, :2]).abs()
            # The middle of the box, at least one cell; where objects overlap, the smallest.
            near = torch.maximum(0.2 * label["boxes"][:, 2:], torch.tensor([0.5 / w, 0.5 / h]))
            extent = label["boxes"][:, 2:].prod(-1)
            cost = torch.where((offset <= near).all(-1), extent, torch.inf)
            smallest, index = cost.min(1)
            cells = smallest.isfinite().nonzero()[:, 0]
            target[b, cells, label["class_labels"][index[cells]]] = 1
            cell_lists.append(cells + b * memory.shape[1])
            box_lists.append(label["boxes"][index[cells]])
        where, boxes_cxcywh = torch.cat(cell_lists), torch.cat(box_lists)

        logits = self.classes(memory)
        p = logits.sigmoid()
        wrong = torch.where(target > 0, 1 - p, p)
        weight = torch.where(target > 0, 0.25, 0.75) * wrong**2
        bce = nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
        start = points.repeat(len(labels), 1)[where]
        guess = self.boxes(memory.flatten(0, 1)[where])
        guess = torch.cat([start + guess[:, :2], guess[:, 2:].sigmoid()], 1)
        l1 = nn.functional.l1_loss(guess, boxes_cxcywh, reduction="sum")
        return (2 * (weight * bce).sum() + 5 * l1) / max(len(where), 1)


# --- evaluation -----------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    model: nn.Module, processor: ConditionalDetrImageProcessor, count: int
) -> dict[str, Any]:
    """Measure the frozen model's AP on unseen scenes, one image at a time, as a user would."""
    annotations, detections, seconds = [], [], []
    for image_id in range(count):
        image, annotation = draw_scene(seed=image_id)  # training seeds start at TRAIN_SEED
        annotations.append(annotation)
        start = time.perf_counter()
        inputs = processor(image, return_tensors="pt")
        outputs = model(**inputs)
        results = processor.post_process_object_detection(
            outputs, threshold=0.0, target_sizes=[annotation["size"]]
        )
        assert isinstance(results, list)
        result = results[0]
        seconds.append(time.perf_counter() - start)
        columns = (result[key].tolist() for key in ("scores", "labels", "boxes"))
        for score, label, (x0, y0, x1, y1) in zip(*columns, strict=True):
            detections.append(
                {
                    "image_id": image_id,
                    "category_id": label,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "score": score,
                }
            )
    scores = score_boxes(coco_ground_truth(annotations), detections)
    ap50 = scores.precision[0].mean(0)
    return {
        **{name: scores.stats[name] for name in ("AP", "AP50", "AP75", "AP_small")},
        "AP50_by_class": dict(zip(CLASSES, ap50.round(3).tolist(), strict=True)),
        "ms_per_image": 1e3 * float(np.median(seconds)),
    }


# --- training -------------------------------------------------------------------------------------


def schedule(step: int, fraction: float) -> tuple[float, float]:
    """Return the factor of the learning rate (warm-up, then cosine) and the dense head's weight."""
    warm_up = min(1.0, (step + 1) / 300)
    cosine = 0.5 * (1 + math.cos(math.pi * fraction))
    return warm_up * (0.01 + 0.99 * cosine), 1 - fraction


def average_over_ranks(parameters: list[nn.Parameter], elapsed: float) -> float:
    """Average the gradients in place; return the mean time, so that all ranks stop together."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    message = torch.cat([*(g.reshape(-1) for g in gradients), torch.tensor([elapsed])])
    dist.all_reduce(message)
    message /= dist.get_world_size()
    parts = message[:-1].split([g.numel() for g in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
    return message[-1].item()


def train(args: argparse.Namespace) -> dict[str, Tensor]:
    """Train until the step or time budget is spent; return the averaged weights."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(args.seed)
    model = build_model(True, args.groups)
    group_queries(model, args.groups)
    thaw_batch_norm(model)
    model.to(memory_format=torch.channels_last).train()
    dense = DenseHead(model.config.d_model, len(CLASSES))
    parameters = [*model.parameters(), *dense.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=1e-4)
    average = {key: value.clone() for key, value in model.state_dict().items()}
    step, elapsed = 0, 0.0
    if args.resume:
        state = torch.load(args.state, weights_only=True)
        model.load_state_dict(state["model"])
        dense.load_state_dict(state["dense"])
        optimizer.load_state_dict(state["optimizer"])
        average, step, elapsed = state["average"], state["step"], state["elapsed"]

    def save() -> None:
        if rank > 0:
            return
        state = {
            "model": model.state_dict(),
            "dense": dense.state_dict(),
            "optimizer": optimizer.state_dict(),
            "average": average,
            "step": step,
            "elapsed": elapsed,
        }
        partial = args.state.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, args.state)  # a stop while writing leaves the old state

    def report(line: str) -> None:
        if rank == 0:
            print(line, flush=True)

    def progress() -> float:
        return max(step / args.steps, elapsed / (60 * args.minutes))

    if progress() < 1:
        clock = time.perf_counter()
        scenes = Scenes(args.scenes, args.seed, args.threads)
        report(f"{args.scenes} scenes drawn in {time.perf_counter() - clock:.0f} s")
    grid = tuple(-(-side // STRIDE) for side in SIZE)
    clock, recent = time.perf_counter() - elapsed, []
    while (fraction := progress()) < 1:
        factor, dense_weight = schedule(step, fraction)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * factor
        pixels, labels = scenes.batch(step, args.batch_size, args.seed, rank, world)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            outputs = model(pixels, labels=labels)
        dense_loss = dense(outputs.encoder_last_hidden_state.float(), labels, grid)
        optimizer.zero_grad(set_to_none=True)
        (outputs.loss + dense_weight * dense_loss).backward()
        elapsed = time.perf_counter() - clock
        if world > 1:
            elapsed = average_over_ranks(parameters, elapsed)
        norm = nn.utils.clip_grad_norm_(parameters, args.clip)
        if not norm.isfinite():
            raise RuntimeError(f"gradient norm {norm} at step {step}: training has diverged")
        optimizer.step()

        decay = min(0.9985, (step + 1) / (step + 10))
        with torch.no_grad():
            for key, value in model.state_dict().items():
                if value.is_floating_point():
                    average[key].lerp_(value, 1 - decay)
        recent.append((outputs.loss.item(), dense_loss.item(), norm.item()))
        step += 1
        if step % 100 == 0:
            loss, dense_mean, norm_mean = np.mean(recent, axis=0)
            recent.clear()
            report(
                f"step {step:6d}  {100 * fraction:5.1f} %  {elapsed / 60:5.1f} min  "
                f"loss {loss:.3f}  dense {dense_mean:.3f}  gradient {norm_mean:.1f}"
            )
        if step % 500 == 0:
            save()
    save()
    report(f"{step} steps, {step * args.batch_size} images, {elapsed / 60:.1f} min")
    return average


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--minutes", type=float, default=math.inf, help="budget of time")
    parser.add_argument("--steps", type=int, default=1_000_000, help="budget of steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="per process")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--groups", type=int, default=3, help="of queries, while training")
    parser.add_argument("--scenes", type=int, default=20_000, help="different training scenes")
    parser.add_argument("--held-out", type=int, default=200, help="unseen scenes to measure AP on")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--clip", type=float, default=0.1, help="largest norm of the gradient")
    parser.add_argument("--bf16", action="store_true", help="autocast (twice as fast if native)")
    parser.add_argument("--state", type=Path, default=Path("demo_checkpoint_state.pt"))
    parser.add_argument("--resume", action="store_true", help="continue from --state")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")

    average = train(args)
    if dist.is_initialized():
        dist.destroy_process_group()
        if os.environ["RANK"] != "0":
            return
    # Only training needs auxiliary outputs; without them transformers computes what the paper says.
    model = build_model(auxiliary_loss=False)
    model.load_state_dict(saved_state(average))
    model.half().save_pretrained(args.output)
    size = {"shortest_edge": min(SIZE), "longest_edge": max(SIZE)}
    processor = ConditionalDetrImageProcessor(size=size, image_mean=list(MEAN), image_std=list(STD))
    processor.save_pretrained(args.output)

    # Measure the saved files, not the model in memory.
    torch.set_num_threads(1)
    model = ConditionalDetrForObjectDetection.from_pretrained(args.output, dtype=torch.float32)
    processor = ConditionalDetrImageProcessor.from_pretrained(args.output)
    print(json.dumps(evaluate(model.eval(), processor, args.held_out), indent=2))


if __name__ == "__main__":
    main()
