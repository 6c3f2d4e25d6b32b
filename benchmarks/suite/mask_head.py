"""Mask head at inference, in fp32 on a CPU: time and peak memory against transformers'.

    python -m benchmarks mask_head --size 800 1066 --queries 50

Peak memory, beyond weights and inputs, is that of a process for each head.
"""

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.case import Case, Within, largest_difference
from benchmarks.memory import peak_mib_of_process

CHANNELS = [1024, 512, 256]  # ResNet-50, strides 16, 8 and 4
HIDDEN, HEADS = 256, 8


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1066), metavar=("H", "W"))
    parser.add_argument("--queries", type=int, default=50)
    parser.set_defaults(repeats=3)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    height, width = options.size
    settings = (height, width, options.queries, options.threads)
    yield Case(
        work="mask head",
        shape=f"{height}x{width} Q={options.queries}",
        providers={name: make_call(name, *settings) for name in ("transformers", "cdetr_fast")},
        gate=Within(_errors, {"relative mask error": 1e-3}),
        memory=lambda name: peak_mib_of_process(make_call, name, *settings),
        columns={"queries": options.queries},
    )


def _errors(got: Tensor, expected: Tensor) -> dict[str, float]:
    error = largest_difference(got, expected)
    return {"max |dmask|": error, "relative mask error": error / expected.abs().max().item()}


def make_head(provider: str) -> nn.Module:
    """Return a head of random weights that do not depend on the provider."""
    head: nn.Module
    if provider == "transformers":
        from transformers.models.conditional_detr import modeling_conditional_detr as theirs

        head = theirs.ConditionalDetrMaskHeadSmallConv(HIDDEN + HEADS, CHANNELS, HIDDEN)
    else:
        from cdetr_fast.models.mask_head import ConditionalDetrMaskHeadSmallConv

        head = ConditionalDetrMaskHeadSmallConv(HIDDEN, HEADS, CHANNELS, "relu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in dict(sorted(head.named_parameters())).values():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
            numbers = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(numbers * (2 / fan_in) ** 0.5)
    return head.eval()


def make_call(
    provider: str, height: int, width: int, queries: int, threads: int
) -> Callable[[], Tensor]:
    """Return a call of a head on the maps of one image."""
    torch.set_num_threads(threads)
    head = make_head(provider)
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def at(stride: int) -> tuple[int, int]:
        return -(-height // stride), -(-width // stride)

    features = normal(1, HIDDEN, *at(32))
    attention = normal(1, queries, HEADS, *at(32)).flatten(2).softmax(-1)
    attention = attention.view(1, queries, HEADS, *at(32))
    maps = [normal(1, c, *at(stride)) for c, stride in zip(CHANNELS, (16, 8, 4), strict=True)]

    @torch.no_grad()
    def call() -> Tensor:
        return head(features, attention, maps).view(1, queries, *at(4))

    return call
