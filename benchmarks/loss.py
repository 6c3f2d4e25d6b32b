"""Matching and loss, forward and backward: ours against transformers', one run.

    python -m benchmarks.loss --threads 2
    python -m benchmarks.loss --device cuda

Six decoder layers, 300 queries, 91 classes. A row is printed only if both losses agree.
"""

import argparse
import sys

import torch
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss

import cdetr_fast
from benchmarks.measure import interleaved, print_table, save
from cdetr_fast.loss.criterion import detection_loss

LAYERS, QUERIES, CLASSES = 6, 300, 91


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--targets", type=int, nargs="+", default=(7, 100))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", help="name of the file in benchmarks/results to write")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    config = cdetr_fast.ConditionalDetrConfig(
        num_labels=CLASSES, auxiliary_loss=True, compat="transformers"
    )
    generator = torch.Generator().manual_seed(0)
    shape = (LAYERS, arguments.batch, QUERIES)
    device = torch.device(arguments.device)
    logits = torch.randn(*shape, CLASSES, generator=generator).to(device).requires_grad_()
    boxes = torch.rand(*shape, 4, generator=generator) * 0.5 + 0.2
    boxes = boxes.to(device).requires_grad_()

    rows = []
    for count in arguments.targets:
        labels = [
            {
                "class_labels": torch.randint(0, CLASSES, (count,), generator=generator).to(device),
                "boxes": (torch.rand(count, 4, generator=generator) * 0.5 + 0.2).to(device),
            }
            for _ in range(arguments.batch)
        ]

        def step(criterion, labels=labels):
            loss, _, _ = criterion(
                logits[-1], labels, logits.device, boxes[-1], config, logits, boxes
            )
            return loss.item(), *torch.autograd.grad(loss, (logits, boxes))

        criteria = {
            "transformers": DeformableDetrForObjectDetectionLoss,
            "cdetr_fast": detection_loss,
        }
        expected, got = (step(criterion) for criterion in criteria.values())
        loss_error = abs(got[0] - expected[0]) / expected[0]
        gradient_error = max(
            ((a - b).norm() / b.norm()).item() for a, b in zip(got[1:], expected[1:], strict=True)
        )
        if max(loss_error, gradient_error) > 1e-4:
            print(f"the losses disagree by {loss_error}, {gradient_error}", file=sys.stderr)
            return 1
        times = interleaved(
            {name: lambda c=criterion: step(c) for name, criterion in criteria.items()},
            arguments.repeats,
            warmup=1,
        )
        rows += [
            {
                "criterion": name,
                "targets": count,
                **timing,
                "speed-up": times["transformers"]["ms"] / timing["ms"],
                "loss error": loss_error,
                "gradient error": gradient_error,
            }
            for name, timing in times.items()
        ]
    print_table(rows)
    if arguments.output:
        print("written to", save(arguments.output, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
