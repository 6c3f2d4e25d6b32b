"""Decoder in fp32 on a CPU: ours against transformers', same weights, same memory.

    python -m benchmarks decoder --threads 2
    python -m benchmarks decoder --threads 2 --backward

The general form of ours, with spatial keys for every map position, is timed beside the separable
one. Weights are random, those of layer norms too.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.conditional_detr.modeling_conditional_detr import ConditionalDetrDecoder

import cdetr_fast
from benchmarks.case import Case, Within, largest_difference
from cdetr_fast.models.decoder import ConditionalDetrDecoder as Decoder
from cdetr_fast.models.position import ConditionalDetrSinePositionEmbedding, MapPosition


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--map", type=int, nargs=2, default=(25, 34), metavar=("h", "w"),
                        help="size of the map; 25 34 is that of an image of 800x1066")  # fmt: skip
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--padded", action="store_true", help="pad all images but the first")
    parser.add_argument("--backward", action="store_true", help="time forward and backward")
    parser.set_defaults(repeats=15)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    batch, (height, width) = options.batch, options.map
    generator = torch.Generator().manual_seed(1)
    key_mask = torch.ones(batch, height, width, dtype=torch.bool)
    key_mask[1:, height * 3 // 4 :] = False
    mask = key_mask if options.padded else None
    memory = torch.randn(batch, height * width, 256, generator=generator)
    queries = torch.randn(1, 300, 256, generator=generator)
    embedding = ConditionalDetrSinePositionEmbedding(256)
    position = embedding(memory.new_empty(1, 1, height, width), mask, memory.dtype)
    mask = None if mask is None else mask.flatten(1)
    eager, ours = make_decoders("eager")
    sdpa, _ = make_decoders("sdpa")

    def theirs_of(decoder: nn.Module) -> Tensor:
        return decoder(
            inputs_embeds=memory.new_zeros(batch, *queries.shape[1:]),
            encoder_hidden_states=memory,
            encoder_attention_mask=mask,
            spatial_position_embeddings=position.expand(batch, -1, -1),
            object_queries_position_embeddings=queries.expand(batch, -1, -1),
        ).last_hidden_state

    def ours_of(position: MapPosition) -> Tensor:
        return ours(queries, memory, position, mask).last_hidden_state

    decode: dict[str, Callable[[], Tensor]] = {
        "transformers sdpa": lambda: theirs_of(sdpa),
        "transformers eager": lambda: theirs_of(eager),
        "cdetr_fast, general": lambda: ours_of(MapPosition(position)),
        "cdetr_fast": lambda: ours_of(MapPosition.separated(position, height, width)),
    }

    def call(name: str) -> Callable[[], Any]:
        def step() -> None:
            for module in (eager, sdpa, ours):
                module.zero_grad()
            decode[name]().square().mean().backward()

        return step if options.backward else torch.no_grad()(decode[name])

    yield Case(
        work="forward and backward" if options.backward else "forward",
        shape=f"B={batch} {height}x{width}{' padded' if options.padded else ''}",
        providers={name: call(name) for name in decode},
        result=lambda name: torch.no_grad()(decode[name])(),
        gate=Within(
            lambda a, b: {"max |dstate|": largest_difference(a, b)}, {"max |dstate|": 1e-3}
        ),
    )


def make_decoders(implementation: str) -> tuple[nn.Module, nn.Module]:
    """Return transformers' decoder and ours with equal weights, in eval mode."""
    make_config: Any = transformers.ConditionalDetrConfig  # its fields come by inheritance
    their_config = make_config(backbone="resnet18")
    their_config._attn_implementation = implementation
    torch.manual_seed(0)
    theirs = ConditionalDetrDecoder(their_config).eval()
    ours = Decoder(cdetr_fast.ConditionalDetrConfig(backbone="resnet18")).eval()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
            elif "norm" in name:
                nn.init.uniform_(parameter, 0.5, 1.5)
    theirs.load_state_dict(ours.state_dict())
    return theirs, ours
