"""Decoder in fp32 on a CPU: ours against transformers', same weights, same memory, one run.

    python -m benchmarks.decoder --threads 2
    python -m benchmarks.decoder --threads 2 --backward

The general form of ours, with spatial keys for every map position, is timed beside the separable
one. Weights are random (layer norms too). Rows are printed only if all agree.
"""

import argparse
import sys

import torch
import transformers
from transformers.models.conditional_detr.modeling_conditional_detr import ConditionalDetrDecoder

import cdetr_fast
from benchmarks.measure import interleaved, print_table, save
from cdetr_fast.models.decoder import ConditionalDetrDecoder as Decoder
from cdetr_fast.models.position import ConditionalDetrSinePositionEmbedding


def make_decoders(implementation: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Returns transformers' decoder and ours with equal weights, in eval mode."""
    their_config = transformers.ConditionalDetrConfig(backbone="resnet18")
    their_config._attn_implementation = implementation
    torch.manual_seed(0)
    theirs = ConditionalDetrDecoder(their_config).eval()
    ours = Decoder(cdetr_fast.ConditionalDetrConfig(backbone="resnet18")).eval()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if parameter.dim() > 1:
                torch.nn.init.xavier_uniform_(parameter)
            elif "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    theirs.load_state_dict(ours.state_dict())
    return theirs, ours


def make_inputs(batch: int, height: int, width: int, padded: bool) -> dict[str, torch.Tensor]:
    """Returns memory, mask, both forms of the position code, and the queries."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(batch, height, width, dtype=torch.bool)
    if padded:
        mask[1:, height * 3 // 4 :] = False
    memory = torch.randn(batch, height * width, 256, generator=generator)
    position = ConditionalDetrSinePositionEmbedding(256)(
        memory.new_empty(1, 1, height, width), mask if padded else None, memory.dtype
    )
    return {
        "query_position": torch.randn(1, 300, 256, generator=generator),
        "memory": memory,
        "position": position,
        "mask": mask.flatten(1) if padded else None,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--map", type=int, nargs=2, default=(25, 34), metavar=("h", "w"),
                        help="size of the map; 25 34 is that of an image of 800x1066")  # fmt: skip
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--padded", action="store_true", help="pad all images but the first")
    parser.add_argument("--backward", action="store_true", help="time forward and backward")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", help="name of the file in benchmarks/results to write")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    height, width = arguments.map
    inputs = make_inputs(arguments.batch, height, width, arguments.padded)
    query_position, memory, position, mask = inputs.values()
    batch = arguments.batch
    eager, ours = make_decoders("eager")
    sdpa, _ = make_decoders("sdpa")

    def of_transformers(decoder):
        return decoder(
            inputs_embeds=memory.new_zeros(batch, *query_position.shape[1:]),
            encoder_hidden_states=memory,
            encoder_attention_mask=mask,
            spatial_position_embeddings=position.expand(batch, -1, -1),
            object_queries_position_embeddings=query_position.expand(batch, -1, -1),
        )

    def of_ours(map_size):
        return ours(query_position, memory, position, mask, map_size=map_size)

    decoders = {
        "transformers eager": lambda: of_transformers(eager),
        "transformers sdpa": lambda: of_transformers(sdpa),
        "cdetr_fast, general": lambda: of_ours(None),
        "cdetr_fast": lambda: of_ours((height, width)),
    }
    modules = (eager, sdpa, ours)

    def step(decode):
        for module in modules:
            module.zero_grad()
        decode().last_hidden_state.square().mean().backward()

    with torch.no_grad():
        states = {name: decode().last_hidden_state for name, decode in decoders.items()}
    with torch.set_grad_enabled(arguments.backward):
        calls = decoders
        if arguments.backward:
            calls = {name: lambda d=decode: step(d) for name, decode in decoders.items()}
        times = interleaved(calls, arguments.repeats)
    reference = states["transformers sdpa"]
    rows = [
        {
            "decoder": name,
            "mode": "forward and backward" if arguments.backward else "forward",
            **timing,
            "speed-up": times["transformers sdpa"]["ms"] / timing["ms"],
            "max |dstate|": (states[name] - reference).abs().max().item(),
        }
        for name, timing in times.items()
    ]
    print_table(rows)
    if any(row["max |dstate|"] > 1e-3 for row in rows):
        print("the decoders disagree: no speed-up is reported", file=sys.stderr)
        return 1
    if arguments.output:
        print("written to", save(arguments.output, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
