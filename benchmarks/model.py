"""Whole model: ours against transformers', same weights, same inputs, one run.

    python -m benchmarks.model --threads 2
    python -m benchmarks.model --device cuda --dtype bfloat16 --batch 8

Weights are random (layer norms too), which takes the same time as trained ones. A row is printed
only if both models agree.
"""

import argparse
import sys
from collections.abc import Callable
from unittest import mock

import torch
import transformers

import cdetr_fast
from benchmarks.measure import interleaved, print_table, save
from benchmarks.works import own_backends
from cdetr_kernels import dispatch


def make_models(backbone: str, implementation: str, dilation: bool):
    """Returns transformers' model and ours with equal weights, in eval mode."""
    settings = {"backbone": backbone, "dilation": dilation, "num_labels": 91}
    their_config = transformers.ConditionalDetrConfig(**settings)
    their_config._attn_implementation = implementation
    torch.manual_seed(0)
    theirs = transformers.ConditionalDetrForObjectDetection(their_config).eval()
    ours = cdetr_fast.ConditionalDetrForObjectDetection(
        cdetr_fast.ConditionalDetrConfig(**settings)
    ).eval()
    # Initial weights of the paper: transformers' make all queries alike, which hides differences.
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            elif "bbox_predictor.layers.2" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    theirs.load_state_dict(ours.state_dict())
    return theirs, ours


def on_kernels(model: torch.nn.Module, like: torch.Tensor) -> dict[str, Callable]:
    """Returns the model on its triton kernels, which "auto" may hold back; none without a GPU."""
    if "triton" not in own_backends("conditional_attention", like):
        return {}

    def run(*arguments, **options):
        with mock.patch.object(dispatch, "PREFERRED", "triton"):
            return model(*arguments, **options)

    return {"cdetr_fast triton": run}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--dilation", action="store_true")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1066), metavar=("H", "W"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--padded", action="store_true", help="pad all images but the first")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", help="name of the file in benchmarks/results to write")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    eager, ours = make_models(arguments.backbone, "eager", arguments.dilation)
    sdpa, _ = make_models(arguments.backbone, "sdpa", arguments.dilation)
    sdpa.load_state_dict(eager.state_dict())
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    height, width = arguments.size
    pixel_values = torch.randn(arguments.batch, 3, height, width).to(device, dtype)
    pixel_mask = torch.ones(arguments.batch, height, width, dtype=torch.int64, device=device)
    if arguments.padded:
        pixel_mask[1:, height * 3 // 4 :] = 0

    models = {"transformers eager": eager, "transformers sdpa": sdpa, "cdetr_fast": ours}
    models = {name: model.to(device, dtype) for name, model in models.items()}
    models |= on_kernels(ours, pixel_values)
    with torch.no_grad():
        outputs = {name: model(pixel_values, pixel_mask) for name, model in models.items()}
        times = interleaved(
            {name: lambda m=model: m(pixel_values, pixel_mask) for name, model in models.items()},
            arguments.repeats,
        )
    reference = outputs["transformers sdpa"]
    # In half precision transformers' boxes are off by pixels: logits alone say whether they agree.
    most = {"float32": (1e-3, 0.1)}.get(arguments.dtype, (0.5, float("inf")))
    rows = []
    for name, timing in times.items():
        logits = (outputs[name].logits - reference.logits).abs().max().item()
        boxes = (outputs[name].pred_boxes - reference.pred_boxes).abs().max().item()
        rows.append(
            {
                "model": name,
                **timing,
                "speed-up": times["transformers sdpa"]["ms"] / timing["ms"],
                "max |dlogit|": logits,
                "max box error, px": boxes * max(height, width),
            }
        )
    if any(row["max |dlogit|"] > most[0] or row["max box error, px"] > most[1] for row in rows):
        print_table(rows)
        print("the models disagree: no speed-up is reported", file=sys.stderr)
        return 1
    print_table(rows)
    if arguments.output:
        print("written to", save(arguments.output, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
