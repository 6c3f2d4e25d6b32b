"""The device code of `detection_topk` on a CPU, under address and undefined-behaviour sanitizers.

csrc/detection_topk_cuda.h is compiled against a small host of blocks and threads (emulation/); one
process runs all cases. On a GPU the same contract is tested by test_topk.py.
"""

import math
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from support.topk_cases import KINDS, VALUES, adversarial, expected_order
from torch import Tensor

from cdetr_kernels.ops.detection_topk import reference

compiler = shutil.which("g++")
pytestmark = pytest.mark.skipif(compiler is None, reason="needs g++")

NUMBERS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
NO_SIZES, HOST_SIZES, DEVICE_SIZES = range(3)
HERE = Path(__file__).parent / "emulation"


@dataclass
class Case:
    """One call; tile 0 and 512 threads are what a GPU runs."""

    logits: Tensor
    k: int
    tile: int = 0
    threads: int = 512
    sizes: int = NO_SIZES
    boxes_dtype: torch.dtype = torch.float32
    threshold: float = 0.5

    def tensors(self) -> tuple[Tensor, Tensor]:
        batch, queries, _ = self.logits.shape
        generator = torch.Generator().manual_seed(self.k)
        boxes_cxcywh = torch.rand(batch, queries, 4, generator=generator).to(self.boxes_dtype)
        return boxes_cxcywh, torch.randint(1, 999, (batch, 2), generator=generator).double()

    def packed(self) -> bytes:
        boxes_cxcywh, sizes = self.tensors()
        types = NUMBERS[self.logits.dtype], NUMBERS[self.boxes_dtype]
        numbers = (*types, *self.logits.shape, self.k, self.sizes, self.tile, self.threads, 0)
        header = struct.pack("10id", *numbers, self.threshold)
        return header + b"".join(_bytes(x) for x in (self.logits, boxes_cxcywh, sizes))

    def check(self, output: memoryview) -> int:
        """Compares with the reference and with a stable sort; returns the bytes that were read."""
        boxes_cxcywh, sizes = self.tensors()
        expected = reference.detection_topk(
            self.logits,
            boxes_cxcywh,
            None if self.sizes == NO_SIZES else sizes,
            self.k,
            self.threshold,
        )
        start, found = 0, []
        for tensor in expected:
            size = tensor.numel() * tensor.element_size()
            numpy = np.frombuffer(output[start : start + size], str(tensor.dtype)[6:])
            found.append(torch.from_numpy(numpy.copy()).reshape(tensor.shape))
            start += size
        scores, labels, boxes_xyxy, query_index, counts = found
        order = query_index * self.logits.shape[2] + labels
        for i, logits in enumerate(self.logits):
            assert order[i].tolist() == expected_order(logits)[: self.k], self
        torch.testing.assert_close(scores, expected[0], rtol=3e-7, atol=1e-38)
        torch.testing.assert_close(boxes_xyxy, expected[2], rtol=0, atol=0)
        assert torch.equal(counts, expected[4])
        assert (scores[:, 1:] <= scores[:, :-1]).all()
        return start


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.fixture(scope="module")
def program(root, tmp_path_factory):
    """Compiles the device code for the CPU."""
    binary = tmp_path_factory.mktemp("emulation") / "topk"
    flags = "-std=c++17 -O1 -g -Wall -Wextra -Werror -Wno-unknown-pragmas -ffp-contract=off"
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    command = [compiler, *flags.split(), *sanitizers, f"-I{root / 'csrc'}", f"-I{HERE}"]
    command += [str(HERE / "topk.cpp"), "-o", str(binary)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return binary


def run(program: Path, cases: list[Case]) -> None:
    done = subprocess.run(
        [program],
        input=b"".join(c.packed() for c in cases),
        capture_output=True,
        check=False,
        timeout=300,  # without one of its barriers the selection may never end
    )
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    output = memoryview(done.stdout)
    for case in cases:
        output = output[case.check(output) :]
    assert not output


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_real_heads(program):
    run(
        program,
        [
            Case(normal(1, 300, 91), 100, sizes=DEVICE_SIZES),
            Case(normal(1, 300, 91).bfloat16(), 300, sizes=HOST_SIZES, threshold=0.99),
            Case(normal(1, 300, 91).half(), 1024, threads=64),
            Case(normal(2, 100, 80), 8000, threads=64, sizes=DEVICE_SIZES),
            Case(normal(1, 60, 91).bfloat16(), 1025, threads=64, sizes=HOST_SIZES),
        ],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_that_are_hard_to_select_among(program, dtype):
    logits = [adversarial(kind, (1, 61, 37)).to(dtype) for kind in KINDS]
    few = [Case(x, 100, threads=64) for x in logits]
    tiled = [Case(x, 150, tile=256, threads=64) for x in logits]
    run(program, few + tiled)


def test_random_shapes_ties_and_limits_of_k(program):
    random = np.random.default_rng(0)
    cases = []
    for seed in range(150):
        shape = [int(n) for n in random.integers(1, (4, 10, 42))]
        values = random.choice(VALUES, size=random.integers(1, 6))
        logits = torch.tensor(random.choice(values, size=shape), dtype=torch.float32)
        if seed % 3 == 0:
            logits = normal(*shape, seed=seed)
        most = shape[1] * shape[2]
        k = int(random.choice([1, most, random.integers(1, most + 1)]))
        cases.append(
            Case(
                logits.to([torch.float16, torch.bfloat16, torch.float32][seed % 3]),
                k,
                tile=int(random.choice([0, max(k, 32)])) if k <= 1024 else 0,
                threads=64,
                sizes=int(random.integers(0, 3)),
                boxes_dtype=[*NUMBERS][int(random.integers(0, 4))],
                threshold=float(random.choice([0.0, 0.5, 1.0, -1.0, math.inf])),
            )
        )
    run(program, cases)
