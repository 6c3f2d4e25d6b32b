"""Errors of the kernels, and of torch in the same dtype, against fp64; parity of the model.

    python -m benchmarks numerics          prints the tables
    python -m benchmarks numerics --docs   also writes them into docs/numerics.md
    python -m benchmarks numerics --only optimized --docs   one of the tables

On a GPU if there is one; otherwise kernels are measured in triton's interpreter, at smaller sizes.
The exit status is 1 if a kernel has more than twice torch's error and a rounding.
"""

import argparse
import copy
import os
import subprocess
import sys
from typing import Any

import torch

from benchmarks import results
from benchmarks.report.pages import ROOT, markdown, write_tables
from cdetr_kernels.testing import accuracy
from cdetr_kernels.testing.case import registered

PAGE = ROOT / "docs" / "numerics.md"


def kernel_rows(device: torch.device) -> list[dict[str, Any]]:
    """Return a row for the output and the worst gradient of each operator in each dtype."""
    rows = []
    for name, (make, sizes) in registered().items():
        for dtype in sizes.dtypes:
            # Of the typical sizes, the first one with several images.
            size = next((x for x in sizes.typical if x.get("batch", 0) > 1), sizes.medium)
            case = make(dtype, device, **(size if device.type == "cuda" else sizes.small))
            if "triton" not in case.backends() or not dtype.is_floating_point:
                continue
            judge = accuracy.Judge(case, bool(case.gradients))
            errors = judge.errors(judge.evaluate(case.function("triton")))
            for kind in ("output", "gradient"):
                group = [x for x in errors if x.name.startswith(kind)]
                if group:
                    worst = max(group, key=lambda x: x.error / (2 * x.torchs + x.floor))
                    rows.append(
                        {
                            "operator": name,
                            "sizes": case.label,
                            "dtype": str(dtype).removeprefix("torch."),
                            "of": worst.name,
                            "kernel": worst.error,
                            "torch": worst.torchs,
                            "allowed": 2 * worst.torchs + worst.floor,
                        }
                    )
    return rows


def model_rows() -> list[dict[str, Any]]:
    """Return the largest differences of whole models: ours, transformers', and both from fp64."""
    from benchmarks.inputs import model_pair

    rows = []
    for backbone in ("resnet18", "resnet50"):
        theirs, ours = model_pair(backbone=backbone, num_labels=91)
        generator = torch.Generator().manual_seed(0)
        pixel_values = torch.randn(2, 3, 256, 320, generator=generator)
        pixel_mask = torch.ones(2, 256, 320, dtype=torch.int64)
        pixel_mask[1, 192:] = 0
        with torch.no_grad():
            got, their = ours(pixel_values, pixel_mask), theirs(pixel_values, pixel_mask)
            exact = ours.double()(pixel_values.double(), pixel_mask)
        for name in ("logits", "pred_boxes", "last_hidden_state", "encoder_last_hidden_state"):
            a, b, c = got[name], their[name], exact[name]
            rows.append(
                {
                    "backbone": backbone,
                    "of": name,
                    "ours - transformers": (a - b).abs().max().item(),
                    "ours - fp64": (a - c).abs().max().item(),
                    "transformers - fp64": (b - c).abs().max().item(),
                }
            )
    return rows


def optimized_rows() -> list[dict[str, Any]]:
    """Return the largest differences of `optimize(model)` and of its model, from fp64."""
    import cdetr_fast
    from cdetr_fast.demo import DEMO
    from cdetr_fast.demo.scenes import draw_scene

    demo = cdetr_fast.ConditionalDetrForObjectDetection.from_pretrained(DEMO, dtype=torch.float32)
    scenes = [draw_scene(seed)[0] for seed in range(20)]
    models = {
        "the demo's checkpoint, 20 scenes": (
            demo,
            [demo.image_processor([x], return_tensors="pt")["pixel_values"] for x in scenes],
        )
    }
    for backbone in ("resnet50", "tf_efficientnet_lite0"):
        torch.manual_seed(0)
        config = cdetr_fast.ConditionalDetrConfig(
            backbone=backbone, use_timm_backbone=True, use_pretrained_backbone=False
        )
        model = cdetr_fast.ConditionalDetrForObjectDetection(config).eval()
        models[f"{backbone}, initial weights, 64x96"] = (model, [torch.randn(1, 3, 64, 96)])
    rows = []
    for name, (model, images) in models.items():
        fast, exact = cdetr_fast.optimize(model), copy.deepcopy(model).double()
        errors: dict[str, list[list[float]]] = {"logits": [], "pred_boxes": []}
        for image in images:
            with torch.no_grad():
                outputs = (exact(image.double()), model(image), fast(image))
            for field, found in errors.items():
                a, b, c = (output[field] for output in outputs)
                found.append([(x - y).abs().max().item() for x, y in ((c, b), (b, a), (c, a))])
        for field, found in errors.items():
            worst = (max(column) for column in zip(*found, strict=True))
            columns = ("optimized - model", "model - fp64", "optimized - fp64")
            rows.append({"model": name, "of": field, **dict(zip(columns, worst, strict=True))})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return rows of the same keys as a table of Markdown."""
    cells = ([f"{x:.1e}" if isinstance(x, float) else x for x in row.values()] for row in rows)
    return markdown(list(rows[0]), cells)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--docs", action="store_true", help="write docs/numerics.md")
    parser.add_argument("--only", choices=("kernels", "models", "optimized"), help="one table")
    options = parser.parse_args(arguments)
    wanted = [options.only] if options.only else ["kernels", "models", "optimized"]
    on_a_gpu = torch.cuda.is_available()
    if "kernels" in wanted and not on_a_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        # triton decides at import whether it interprets.
        given = sys.argv[1:] if arguments is None else arguments
        command = [sys.executable, "-m", "benchmarks.numerics", *given]
        return subprocess.call(command, env=os.environ | {"TRITON_INTERPRET": "1"})
    makers = {
        "kernels": lambda: kernel_rows(torch.device("cuda" if on_a_gpu else "cpu")),
        "models": model_rows,
        "optimized": optimized_rows,
    }
    rows = {name: makers[name]() for name in wanted}
    for group in rows.values():
        results.print_table(group)
    if options.docs:
        environment = results.environment(results.command_line("numerics", arguments))
        where = environment["device"] if on_a_gpu else "triton's interpreter on a CPU"
        versions = ", ".join(f"{x} {environment[x]}" for x in ("torch", "triton", "transformers"))
        notes = {
            "kernels": f"Measured in {where} with {versions} on {environment['date']}.",
            "models": "fp32 on a CPU; images of 256 x 320, the second one padded.",
            "optimized": f"fp32 on a CPU, {environment['date']}.",
        }
        write_tables(PAGE, {name: f"{notes[name]}\n\n{table(rows[name])}" for name in wanted})
        print("written to", PAGE)
    kernels = rows.get("kernels", [])
    return 1 if any(not row["kernel"] <= row["allowed"] for row in kernels) else 0


if __name__ == "__main__":
    sys.exit(main())
