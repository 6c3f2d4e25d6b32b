"""Detections from a model's outputs on a CPU: the list form, and the selection alone.

    python -m benchmarks.topk --threads 2

Against transformers' `post_process_object_detection`, and against sigmoid + torch.topk + gather.
Scores, labels and boxes have to agree before anything is reported. Logits are those of an untrained
head with some confident queries, so a few detections of each image are above the threshold.
"""

import argparse
import sys
from types import SimpleNamespace

import torch
from torch import Tensor
from transformers import ConditionalDetrImageProcessor as Theirs

from benchmarks.measure import interleaved, print_table, save
from cdetr_fast import ConditionalDetrImageProcessor as Ours
from cdetr_kernels import detection_topk

THRESHOLD = 0.5


def make_outputs(batch: int, queries: int, classes: int) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, queries, classes, generator=generator) - 4.6
    logits[:, :7, 3] += 8.0
    boxes = torch.rand(batch, queries, 4, generator=generator) * 0.5 + 0.2
    return SimpleNamespace(logits=logits, pred_boxes=boxes)


def plain(outputs: SimpleNamespace, sizes: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what transformers does, without its conversions and lists."""
    scores, index = outputs.logits.sigmoid().flatten(1).topk(k, dim=1)
    classes = outputs.logits.shape[2]
    boxes = outputs.pred_boxes.gather(1, (index // classes)[..., None].expand(-1, -1, 4))
    center, half = boxes[..., :2], 0.5 * boxes[..., 2:]
    corners = torch.cat((center - half, center + half), dim=-1)
    return scores, index % classes, corners * sizes.flip(1).repeat(1, 2)[:, None]


def compare(ours: list[dict], theirs: list[dict]) -> tuple[float, float]:
    """Return the largest difference of scores and of boxes; raise if detections differ."""
    score_error = box_error = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if not torch.equal(a["labels"], b["labels"]) or a["labels"].numel() == 0:
            raise ValueError("the detections differ")
        score_error = max(score_error, (a["scores"] - b["scores"]).abs().max().item())
        box_error = max(box_error, (a["boxes"] - b["boxes"]).abs().max().item())
    if score_error > 1e-6 or box_error > 1e-3:
        raise ValueError(f"scores differ by {score_error}, boxes by {box_error} px")
    return score_error, box_error


def measure(batch: int, queries: int, classes: int, k: int, repeats: int) -> list[dict]:
    outputs = make_outputs(batch, queries, classes)
    sizes = torch.tensor([[480 + i, 640] for i in range(batch)])
    as_list = [tuple(size) for size in sizes.tolist()]
    arguments = {"threshold": THRESHOLD, "target_sizes": as_list, "top_k": k}
    theirs, ours = Theirs(), Ours()
    list_forms = {
        "transformers": lambda: theirs.post_process_object_detection(outputs, **arguments),
        "cdetr_fast": lambda: ours.post_process_object_detection(outputs, **arguments),
    }
    selections = {
        "sigmoid, topk, gather": lambda: plain(outputs, sizes, k),
        "detection_topk": lambda: detection_topk(outputs.logits, outputs.pred_boxes, sizes, k),
        "detection_topk, torch": lambda: detection_topk(
            outputs.logits, outputs.pred_boxes, sizes, k, "torch"
        ),
    }
    errors = compare(list_forms["cdetr_fast"](), list_forms["transformers"]())
    wanted = plain(outputs, sizes, k)
    for name in ("detection_topk", "detection_topk, torch"):
        for got, expected in zip(selections[name](), wanted, strict=False):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-3)
    rows = []
    for form, providers in (("list", list_forms), ("selection", selections)):
        times = interleaved(providers, repeats, warmup=5)
        baseline = next(iter(times.values()))["ms"]
        rows += [
            {
                "batch": batch,
                "queries": queries,
                "classes": classes,
                "k": k,
                "form": form,
                "provider": name,
                **timing,
                "speed-up": baseline / timing["ms"],
                "max |dscore|": errors[0],
                "max box error, px": errors[1],
            }
            for name, timing in times.items()
        ]
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=(1, 8, 32))
    parser.add_argument("--head", nargs="+", default=("300x91", "900x365"))
    parser.add_argument("--k", type=int, nargs="+", default=(100, 300))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--output", help="name of the file in benchmarks/results to write")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    rows = []
    with torch.inference_mode():
        for head in options.head:
            queries, classes = (int(n) for n in head.split("x"))
            for k in options.k:
                for batch in options.batch:
                    try:
                        rows += measure(batch, queries, classes, k, options.repeats)
                    except (AssertionError, ValueError) as error:
                        print(f"{head}, k={k}, batch {batch}: {error}", file=sys.stderr)
                        return 1
    print_table(rows)
    if options.output:
        print("written to", save(options.output, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
