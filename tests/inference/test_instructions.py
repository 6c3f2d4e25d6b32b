"""`optimize(model)` on a CPU with fewer instructions, which a variable of oneDNN hides."""

import json
import os
import subprocess
import sys

import pytest
import torch

PROGRAM = """
import json
import torch
from support.oracle import SMALL_MODEL, make_ours, randomise
from cdetr_fast import optimize

model = make_ours("detection", **SMALL_MODEL)
randomise(model)
model.eval()
images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    expected, fast = model(images), optimize(model)
    got = fast(images)
print(json.dumps({
    "logits": (got.logits - expected.logits).abs().max().item(),
    "boxes": (got.pred_boxes - expected.pred_boxes).abs().max().item(),
    "fallback": fast.runner.fallback_reason,
    "explained": fast.explain(),
}))
"""


@pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason="this CPU has no AVX2")
def test_a_cpu_with_avx2_alone_takes_the_fused_path(root):
    paths = [str(root), str(root / "kernels"), str(root / "tests")]
    environment = os.environ | {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "ONEDNN_VERBOSE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    runs = [line for line in lines if ",exec," in line and ",convolution," in line]
    assert runs, "oneDNN runs the convolutions"
    assert any("avx2" in line for line in runs)
    assert not any("avx512" in line for line in runs)
    found = json.loads(last)
    assert found["logits"] < 1e-4
    assert found["boxes"] < 1e-4
    assert found["fallback"] is None
    backbone = next(x for x in found["explained"].splitlines() if x.startswith("backbone"))
    assert "oneDNN" in backbone or "onednn" in backbone, backbone
