"""Two processes under DistributedDataParallel have the gradients of one with the whole batch.

This file is also the program that each of the processes runs.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import cdetr_fast

PROCESSES = 2
# Objects in each image, half of the images for each process; in the second case one has none.
COUNTS = {"unequal": (4, 1, 0, 2), "none": (3, 2, 0, 0)}
CASES = [
    ("detection", "paper", "unequal"),
    ("detection", "paper", "none"),
    ("segmentation", "paper", "unequal"),
    ("segmentation", "paper", "none"),
    ("detection", "transformers", "none"),
]


def make_model(task, compat):
    torch.manual_seed(0)
    config = cdetr_fast.ConditionalDetrConfig(
        backbone="test_resnet",
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=6,
        num_labels=3,
        dropout=0.0,
        auxiliary_loss=True,
        compat=compat,
    )
    if task == "detection":
        return cdetr_fast.ConditionalDetrForObjectDetection(config).double()
    return cdetr_fast.ConditionalDetrForSegmentation(config).double()


def make_batch(counts):
    generator = torch.Generator().manual_seed(1)
    labels = [
        {
            "class_labels": torch.randint(0, 3, (count,), generator=generator),
            "boxes": torch.rand(count, 4, generator=generator).double() * 0.4 + 0.1,
            "masks": torch.rand(count, 64, 64, generator=generator) > 0.5,
        }
        for count in counts
    ]
    return torch.randn(len(counts), 3, 64, 64, generator=generator).double(), labels


def gradients(model, images, labels):
    model.zero_grad()
    model(images, labels=labels).loss.backward()
    module = getattr(model, "module", model)
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def run_process(rank, folder):
    """Computes all cases with this process's half of each batch; rank 0 stores the gradients."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES
    )
    results = {}
    for task, compat, counts in CASES:
        images, labels = make_batch(COUNTS[counts])
        own = slice(rank * len(labels) // PROCESSES, (rank + 1) * len(labels) // PROCESSES)
        model = DistributedDataParallel(make_model(task, compat))
        gradients(model, images[own], labels[own])  # an unused parameter shows in the next step
        results[task, compat, counts] = gradients(model, images[own], labels[own])
    assert "accelerate" not in sys.modules
    if rank == 0:
        torch.save(results, folder / "gradients.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def distributed(root, tmp_path_factory):
    """Gradients of all cases, computed by two processes."""
    folder = tmp_path_factory.mktemp("distributed")
    paths = [str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            text=True,
        )
        for rank in range(PROCESSES)
    ]
    try:
        outputs = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return torch.load(folder / "gradients.pt")


def relative_error(got, expected):
    difference = sum((got[name] - expected[name]).square().sum() for name in expected)
    return (difference / sum(x.square().sum() for x in expected.values())).sqrt().item()


@pytest.mark.parametrize(("task", "compat", "counts"), CASES[:4])
def test_gradients_are_those_of_one_process(distributed, task, compat, counts):
    expected = gradients(make_model(task, compat), *make_batch(COUNTS[counts]))
    got = distributed[task, compat, counts]
    assert set(got) == set(expected)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert relative_error(got, expected) < 1e-5


def test_transformers_counts_boxes_in_each_process(distributed):
    """Row 9 of the design's table: without Accelerate, transformers takes no average."""
    case = ("detection", "transformers", "none")
    expected = gradients(make_model(*case[:2]), *make_batch(COUNTS["none"]))
    assert relative_error(distributed[case], expected) > 0.1


if __name__ == "__main__":
    run_process(int(sys.argv[1]), Path(sys.argv[2]))
