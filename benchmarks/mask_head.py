"""Mask head at inference, in fp32 on a CPU: time and peak memory against transformers'.

    python -m benchmarks.mask_head --size 800 1066 --queries 50

Each head runs in a process of its own, whose peak memory beyond weights and inputs is reported.
"""

import argparse
import sys

import torch

from benchmarks.measure import interleaved, peak_memory, print_table, save

CHANNELS = [256, 512, 1024]  # ResNet-50, strides 4, 8 and 16
HIDDEN, HEADS = 256, 8


def make_head(provider: str) -> torch.nn.Module:
    if provider == "transformers":
        from transformers.models.conditional_detr.modeling_conditional_detr import (
            ConditionalDetrMaskHeadSmallConv,
        )

        head = ConditionalDetrMaskHeadSmallConv(HIDDEN + HEADS, CHANNELS[::-1], HIDDEN)
    else:
        from cdetr_fast.models.mask_head import ConditionalDetrMaskHeadSmallConv

        head = ConditionalDetrMaskHeadSmallConv(HIDDEN, HEADS, CHANNELS[::-1], "relu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in dict(sorted(head.named_parameters())).values():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
            draw = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(draw * (2 / fan_in) ** 0.5)
    return head.eval()


def make_call(provider: str, height: int, width: int, queries: int, threads: int):
    torch.set_num_threads(threads)
    head = make_head(provider)
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    def at(stride):
        return -(-height // stride), -(-width // stride)

    features = draw(1, HIDDEN, *at(32))
    attention = draw(1, queries, HEADS, *at(32)).flatten(2).softmax(-1)
    attention = attention.view(1, queries, HEADS, *at(32))
    maps = [draw(1, c, *at(s)) for c, s in zip(CHANNELS[::-1], (16, 8, 4), strict=True)]

    @torch.no_grad()
    def call():
        return head(features, attention, maps).view(1, queries, *at(4))

    return call


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1066), metavar=("H", "W"))
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", help="name of the file in benchmarks/results to write")
    arguments = parser.parse_args()

    settings = (*arguments.size, arguments.queries, arguments.threads)
    providers = ("transformers", "cdetr_fast")
    memory = {name: peak_memory(make_call, name, *settings)["peak_mib"] for name in providers}
    calls = {name: make_call(name, *settings) for name in providers}
    masks = {name: call() for name, call in calls.items()}
    error = (masks["cdetr_fast"] - masks["transformers"]).abs().max().item()
    if error > 1e-3 * masks["transformers"].abs().max().item():
        print(f"the heads disagree by {error}: nothing is reported", file=sys.stderr)
        return 1
    times = interleaved(calls, arguments.repeats, warmup=0)
    rows = [
        {
            "head": name,
            "queries": arguments.queries,
            **times[name],
            "time ratio": times[name]["ms"] / times["transformers"]["ms"],
            "peak MiB": memory[name],
            "memory ratio": memory[name] / memory["transformers"],
            "max |dmask|": error,
        }
        for name in providers
    ]
    print_table(rows)
    if arguments.output:
        print("written to", save(arguments.output, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
