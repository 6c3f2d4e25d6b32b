"""transformers' Conditional DETR before and after `patch_transformers()`, on a CPU, in one run.

    python -m benchmarks.patching --threads 2

A forward pass in eval mode, and a training step (forward, loss, backward), each technique by itself
and all together. Putting the patch in place and taking it back, 1 ms, is in the time of every
patched call. A row is printed only if both give the same numbers.
"""

import argparse
import contextlib
import sys

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import cdetr_fast
from benchmarks.measure import interleaved, print_table, save
from benchmarks.model import make_models
from cdetr_fast.integrations.patching import _TECHNIQUES

UNPATCHED, PATCHED = "transformers", "cdetr_fast, all"
OF_EVAL = ("attention", "position_codes", "batch_norm", "channels_last")
OF_TRAINING = (*OF_EVAL, "overflow_clamp", "losses")


class Counter(TorchDispatchMode):
    """Counts operator calls, and those among them at which the host reads a number of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.dispatches = self.scalar_reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.dispatches += 1
        self.scalar_reads += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def patched_by(name: str):
    """The context of a row."""
    if name == UNPATCHED:
        return contextlib.nullcontext()
    switches = {switch: name in (switch, PATCHED) for switch in _TECHNIQUES}
    return cdetr_fast.patch_transformers(**switches)


def make_forward(arguments: argparse.Namespace):
    """Returns a function that runs the model in eval mode, and the names of its rows."""
    model, _ = make_models(arguments.backbone, "sdpa", dilation=False)
    pixel_values = torch.randn(1, 3, *arguments.size)
    pixel_mask = torch.ones(1, *arguments.size, dtype=torch.int64)

    def run():
        with torch.no_grad():
            return model(pixel_values, pixel_mask)

    return run, OF_EVAL


def make_training_step(arguments: argparse.Namespace):
    """Returns a function that runs a training step of a padded batch, and the names of its rows."""
    torch.manual_seed(0)
    config = transformers.ConditionalDetrConfig(
        backbone=arguments.training_backbone, auxiliary_loss=True, dropout=0.0, num_labels=91
    )
    model = transformers.ConditionalDetrForObjectDetection(config).train()
    batch, targets, (height, width) = 4, 20, arguments.training_size
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    pixel_values = torch.randn(batch, 3, height, width)
    pixel_mask = torch.ones(batch, height, width, dtype=torch.int64)
    pixel_mask[1:, height * 3 // 4 :] = 0
    labels = [
        {
            "class_labels": torch.randint(0, 91, (targets,)),
            "boxes": torch.rand(targets, 4) * 0.4 + 0.2,
        }
        for _ in range(batch)
    ]

    def run():
        model.zero_grad()
        output = model(pixel_values, pixel_mask, labels=labels)
        output.loss.backward()
        output.gradient = torch.cat(
            [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        )
        return output

    return run, OF_TRAINING


def measure(work: str, run, techniques: tuple[str, ...], size: int, repeats: int) -> list[dict]:
    """Rows of one work: time, counts, and how far the numbers are from those of transformers."""
    names = (UNPATCHED, *techniques, PATCHED)
    outputs, counters = {}, {}
    for name in names:
        with patched_by(name), Counter() as counters[name]:
            outputs[name] = run()

    def call(name):
        with patched_by(name):
            run()

    times = interleaved({name: lambda n=name: call(n) for name in names}, repeats, warmup=1)
    reference, rows = outputs[UNPATCHED], []
    for name in names:
        output = outputs[name]
        boxes = (output.pred_boxes - reference.pred_boxes).abs().max().item()
        errors = {
            "max |dlogit|": (output.logits - reference.logits).abs().max().item(),
            "max box error, px": boxes * size,
            "loss error": 0.0,
            "gradient error": 0.0,
        }
        if output.loss is not None:
            errors["loss error"] = abs(output.loss / reference.loss - 1).item()
            difference = (output.gradient - reference.gradient).norm()
            errors["gradient error"] = (difference / reference.gradient.norm()).item()
        rows.append(
            {
                "work": work,
                "patch": name,
                **times[name],
                "speed-up": times[UNPATCHED]["ms"] / times[name]["ms"],
                "dispatches": counters[name].dispatches,
                "scalar reads": counters[name].scalar_reads,
                **errors,
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1066), metavar=("H", "W"))
    parser.add_argument("--training-backbone", default="resnet18")
    parser.add_argument(
        "--training-size", type=int, nargs=2, default=(320, 416), metavar=("H", "W")
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", help="name of the file in benchmarks/results to write")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    rows = []
    for work, make, size in (
        ("forward", make_forward, arguments.size),
        ("training step", make_training_step, arguments.training_size),
    ):
        run, techniques = make(arguments)
        rows += measure(work, run, techniques, max(size), arguments.repeats)
    print_table(rows)
    limits = {
        "max |dlogit|": 1e-3,
        "max box error, px": 0.1,
        "loss error": 1e-4,
        "gradient error": 1e-3,
    }
    if any(row[name] > limit for row in rows for name, limit in limits.items()):
        print("the numbers disagree: no speed-up is reported", file=sys.stderr)
        return 1
    if arguments.output:
        print("written to", save(arguments.output, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
