"""Segmentation post-processing on a CPU: time and peak memory against transformers'.

    python -m benchmarks.post_processing --size 480 640 --kept 30

Both read the same outputs; `compat="transformers"` has to give the same maps and segments before
anything is reported. Peak memory is measured in a process for each.
"""

import argparse
import sys
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from benchmarks.measure import interleaved, peak_memory, print_table, save

TASKS = ("instance", "panoptic", "semantic")
PROVIDERS = ("transformers", "cdetr_fast, its numbers", "cdetr_fast")


def make_outputs(height: int, width: int, queries: int, classes: int, kept: int):
    """One image: blobs of random places and sizes, `kept` of them certain."""
    generator = torch.Generator().manual_seed(0)
    h, w = -(-height // 4), -(-width // 4)
    centre = torch.rand(queries, 2, 1, 1, generator=generator)
    radius = 0.05 + 0.15 * torch.rand(queries, 1, 1, generator=generator)
    y, x = torch.linspace(0, 1, h)[:, None], torch.linspace(0, 1, w)
    distance = ((y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2).sqrt()
    noise = F.interpolate(torch.randn(1, queries, 9, 9, generator=generator), (h, w))[0]
    logits = torch.randn(1, queries, classes, generator=generator) - 7
    certain = torch.randperm(queries, generator=generator)[:kept]
    label = torch.randint(classes - 1, (kept,), generator=generator)
    logits[0, certain, label] = 6.0
    return SimpleNamespace(logits=logits, pred_masks=((radius - distance) * 60 + noise)[None])


def make_call(provider: str, task: str, size: tuple[int, int], settings: tuple, threads: int):
    torch.set_num_threads(threads)
    if provider == "transformers":
        from transformers import ConditionalDetrImageProcessor as Processor

        processor = Processor()
    else:
        from cdetr_fast import ConditionalDetrImageProcessor as Processor

        processor = Processor(compat="paper" if provider == "cdetr_fast" else "transformers")
    function = getattr(processor, f"post_process_{task}_segmentation")
    extra = {} if task == "semantic" else {"overlap_mask_area_threshold": 0.3}
    outputs = make_outputs(*settings)

    def call():
        return function(outputs, target_sizes=[size], **extra)

    return call


def agree(ours, theirs) -> bool:
    if isinstance(theirs, torch.Tensor):
        return torch.equal(ours, theirs)
    same_segments = ours["segments_info"] == theirs["segments_info"]
    return same_segments and torch.equal(ours["segmentation"], theirs["segmentation"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=2, default=(480, 640), metavar=("H", "W"))
    parser.add_argument("--input", type=int, nargs=2, default=(800, 1066), metavar=("H", "W"))
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--classes", type=int, default=91)
    parser.add_argument("--kept", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", help="name of the file in benchmarks/results to write")
    options = parser.parse_args(arguments)

    settings = (*options.input, options.queries, options.classes, options.kept)
    rows = []
    for task in TASKS:
        common = (task, tuple(options.size), settings, options.threads)
        calls = {name: make_call(name, *common) for name in PROVIDERS}
        theirs, ours = (calls[name]()[0] for name in PROVIDERS[:2])
        if not agree(ours, theirs):
            print(f"{task}: the results disagree: nothing is reported", file=sys.stderr)
            return 1
        memory = {name: peak_memory(make_call, name, *common)["peak_mib"] for name in PROVIDERS}
        times = interleaved(calls, options.repeats)
        reference = times["transformers"]["ms"]
        rows += [
            {
                "task": task,
                "post-processing": name,
                **times[name],
                "speed-up": reference / times[name]["ms"],
                "peak MiB": memory[name],
                "memory ratio": memory[name] / max(1.0, memory["transformers"]),
            }
            for name in PROVIDERS
        ]
    print_table(rows)
    if options.output:
        print("written to", save(options.output, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
