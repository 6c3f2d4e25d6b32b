"""A training step, forward with labels and backward: ours against transformers', one run.

    python -m benchmarks.training_step --device cuda --autocast bfloat16 --batch 8

Six decoder layers with a loss each (`auxiliary_loss`), as in the paper. Both models have the same
weights, images and labels, and compute what transformers computes (`compat="transformers"`). A row
is printed only if losses and gradients agree.
"""

import argparse
import contextlib
import sys

import torch
import transformers

import cdetr_fast
from benchmarks.measure import interleaved, print_table, save
from benchmarks.model import on_kernels
from benchmarks.timing import peak_mib


def make_models(backbone: str, device: torch.device) -> dict[str, torch.nn.Module]:
    """Returns both models with equal weights, in training mode without dropout."""
    settings = {"backbone": backbone, "num_labels": 91, "auxiliary_loss": True,
                "dropout": 0.0}  # fmt: skip
    torch.manual_seed(0)
    ours = cdetr_fast.ConditionalDetrForObjectDetection(
        cdetr_fast.ConditionalDetrConfig(**settings, compat="transformers")
    )
    their_config = transformers.ConditionalDetrConfig(**settings)
    their_config._attn_implementation = "sdpa"
    theirs = transformers.ConditionalDetrForObjectDetection(their_config)
    theirs.load_state_dict(ours.state_dict())
    models = {"transformers sdpa": theirs, "cdetr_fast": ours}
    return {name: model.to(device).train() for name, model in models.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1066), metavar=("H", "W"))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--targets", type=int, default=7, help="objects in an image")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--autocast", choices=("bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", help="name of the file in benchmarks/results to write")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    height, width = arguments.size
    pixel_values = torch.randn(arguments.batch, 3, height, width, device=device)
    pixel_mask = torch.ones(arguments.batch, height, width, dtype=torch.int64, device=device)
    pixel_mask[1:, height * 3 // 4 :] = 0
    count = arguments.targets
    labels = [
        {
            "class_labels": torch.randint(0, 91, (count,), device=device),
            "boxes": torch.rand(count, 4, device=device) * 0.5 + 0.2,
        }
        for _ in range(arguments.batch)
    ]
    models = make_models(arguments.backbone, device)
    calls = {**models, **on_kernels(models["cdetr_fast"], pixel_values)}

    def step(name):
        autocast = contextlib.nullcontext()
        if arguments.autocast:
            autocast = torch.autocast(device.type, getattr(torch, arguments.autocast))
        model = models[name.removesuffix(" triton")]
        model.zero_grad()
        with autocast:
            loss = calls[name](pixel_values, pixel_mask, labels=labels).loss
        loss.backward()
        return loss

    gradients, losses, peaks = {}, {}, {}
    for name in calls:
        step(name)  # the first one also allocates what stays
        peaks[name] = peak_mib(lambda name=name: step(name), device)
        losses[name] = step(name).item()
        model = models[name.removesuffix(" triton")]
        by_name = dict(sorted(model.named_parameters()))
        gradients[name] = torch.cat(
            [p.grad.flatten().float() for p in by_name.values() if p.grad is not None]
        )
        model.zero_grad()
    expected = gradients["transformers sdpa"]
    errors = {
        name: (
            abs(losses[name] / losses["transformers sdpa"] - 1),
            ((gradients[name] - expected).norm() / expected.norm()).item(),
        )
        for name in calls
    }
    # Under autocast a match may fall out differently, so gradients are held to their size only.
    most = (1e-4, 1e-3) if arguments.autocast is None else (5e-2, 0.5)
    if any(
        error > limit for pair in errors.values() for error, limit in zip(pair, most, strict=True)
    ):
        print(f"the models disagree, loss and gradients: {errors}", file=sys.stderr)
        return 1
    times = interleaved(
        {name: lambda name=name: step(name) for name in calls}, arguments.repeats, warmup=1
    )
    rows = [
        {
            "model": name,
            **timing,
            "speed-up": times["transformers sdpa"]["ms"] / timing["ms"],
            "peak MiB": peaks[name],
            "loss error": errors[name][0],
            "gradient error": errors[name][1],
        }
        for name, timing in times.items()
    ]
    print_table(rows)
    if arguments.output:
        print("written to", save(arguments.output, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
