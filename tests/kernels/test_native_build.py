"""The extension: how it is built, what a wheel holds, what the GPU part's machine code uses."""

import itertools
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from cdetr_kernels import build, native

NO_NVCC = {"CUDA_HOME": "/nonexistent"}
# Registers of a thread and shared bytes of a block. 512 threads with 64 registers leave two blocks
# on a multiprocessor (65,536 registers), and shared memory would leave six.
BUDGETS = {"topk_kernel": (64, 16 * 1024 + 512), "encode_kernel": (48, 0), "write_kernel": (48, 0)}
NO_CUDA_PART = native.UNAVAILABLE["cuda"]


@pytest.mark.skipif(NO_CUDA_PART is not None, reason=str(NO_CUDA_PART))
def test_machine_code_of_every_architecture_is_within_its_budget():
    text = (native.FOLDER / "_native_cuda.txt").read_text()
    entries = re.findall(
        r"Compiling entry function '(\w+)' for '(sm_\w+)'.*?(\d+) bytes stack frame, (\d+) bytes "
        r"spill stores, (\d+) bytes spill loads.*?Used (\d+) registers(.*?)\n",
        text,
        flags=re.DOTALL,
    )
    architectures = {code.split("code=")[1] for code in build.architectures()}
    found = set()
    for name, architecture, *spills, registers, rest in entries:
        kernel = next(kernel for kernel in BUDGETS if kernel in name)
        dtype = next(d for d in ("BFloat16", "Float16", "Float32") if d in name)
        found.add((kernel, dtype, architecture))
        shared = re.search(r"(\d+) bytes smem", rest)
        used = int(registers), int(shared[1]) if shared else 0
        assert [int(n) for n in spills] == [0, 0, 0], (name, architecture)
        assert all(u <= b for u, b in zip(used, BUDGETS[kernel], strict=True)), (name, used)
    machine_code = {name for name in architectures if name.startswith("sm_")}
    assert len(found) == 3 * len(BUDGETS) * len(machine_code)
    assert {architecture for *_, architecture in found} == machine_code


@pytest.mark.skipif(NO_CUDA_PART is not None, reason=str(NO_CUDA_PART))
def test_host_side_of_the_cuda_part():
    """Linked and loaded, its own checks run: here with tensors of the CPU, which it refuses."""
    from cdetr_kernels.ops.detection_topk import native as _registered  # noqa: F401

    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

    def call(*arguments):
        return torch.ops.cdetr_fast.detection_topk.default.redispatch(keys, *arguments)

    logits, boxes = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    for arguments, message in (
        ((logits, boxes, None, 3, 0.5), "logits: expected them on a CUDA device"),
        ((logits.double(), boxes, None, 3, 0.5), "logits: expected float16, bfloat16 or float32"),
        ((logits[0], boxes, None, 3, 0.5), r"logits: expected \[B, Q, K\]"),
        ((logits, boxes[1:], None, 3, 0.5), r"boxes_cxcywh: expected \[B, Q, 4\]"),
        ((logits, boxes, torch.ones(3, 2), 3, 0.5), r"sizes_hw: expected \[B, 2\]"),
        ((logits, boxes, None, 13, 0.5), r"k: expected 1 to Q\*K"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(*arguments)


@pytest.mark.skipif(not os.environ.get("CI"), reason="continuous integration builds what it can")
def test_continuous_integration_has_built_what_there_are_compilers_for():
    if os.environ.get("CDETR_FAST_NATIVE") == "0":
        assert all("build-native" in str(reason) for reason in native.UNAVAILABLE.values())
        return
    assert native.UNAVAILABLE["cpu"] is None
    if shutil.which("nvcc") and torch.version.cuda:
        assert native.UNAVAILABLE["cuda"] is None


def test_mode(monkeypatch, tmp_path):
    monkeypatch.setenv("CDETR_FAST_NATIVE", "0")
    assert build.build(tmp_path) == []
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("CDETR_FAST_NATIVE", "yes")
    with pytest.raises(build.BuildError, match="expected auto, 0 or 1, got 'yes'"):
        build.build(tmp_path)


def test_without_a_compiler_it_says_so_once(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CDETR_FAST_NATIVE", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    said = []
    assert build.build(tmp_path, said.append) == []
    assert len(said) == 1
    assert "no C++ compiler" in said[0]
    monkeypatch.setenv("CDETR_FAST_NATIVE", "1")
    with pytest.raises(build.BuildError, match="no C"):
        build.build(tmp_path)


def test_a_compiler_that_fails_leaves_what_was_there(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "false")
    before = tmp_path / "_native_cpu.so"
    before.write_bytes(b"old")
    with pytest.raises(build.BuildError, match=r"false .* failed"):
        build.build_part("cpu", tmp_path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


def test_two_builds_at_once(monkeypatch, tmp_path):
    processes = itertools.count(1)
    monkeypatch.setattr(build.os, "getpid", lambda: next(processes))
    monkeypatch.setattr(build, "command", lambda part: [part])
    commands = []

    def compiled(command):
        Path(command[-1]).write_text("new")
        commands.append(command)
        if len(commands) == 1:
            build.build_part("cpu", tmp_path)
        return ""

    monkeypatch.setattr(build, "_run", compiled)
    build.build_part("cpu", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["_native_cpu.so"]


def test_architectures(monkeypatch):
    def codes():
        return [code.split("code=")[1] for code in build.architectures()]

    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a 12.0+PTX")
    assert codes() == ["sm_80", "sm_90a", "sm_120", "compute_120"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Ampere")
    with pytest.raises(build.BuildError, match=r'expected the form "8.0;9.0\+PTX", got \'Ampere\''):
        build.architectures()
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    monkeypatch.setattr(build, "nvcc", lambda: ["echo", "compute_75 compute_80 compute_90"])
    assert codes() == ["sm_80", "sm_90", "compute_90"]


USE_THE_EXTENSION = """
import torch, cdetr_kernels
from cdetr_kernels import native
assert {folder!r} in native.__file__, native.__file__
logits, boxes = torch.randn(2, 30, 9), torch.rand(2, 30, 4)
backends = ("torch", "native") if {built} else ("torch", "auto")
results = [cdetr_kernels.detection_topk(logits, boxes, k=20, backend=b)[1:] for b in backends]
torch.testing.assert_close(*results)
if {built}:
    assert native.UNAVAILABLE["cpu"] is None
    assert "not built" in native.UNAVAILABLE["cuda"]
else:
    assert "not built" in native.UNAVAILABLE["cpu"]
"""


@pytest.mark.parametrize("mode", ["0", "1"])
def test_a_wheel(mode, root, tmp_path):
    """Without the extension, and with its C++ part as on a machine without nvcc."""
    if mode == "1" and shutil.which("g++") is None:
        pytest.skip("needs g++")
    source, wheels, installed = (tmp_path / name for name in ("source", "wheels", "installed"))
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "csrc", "kernels"):
        copy = shutil.copytree if (root / name).is_dir() else shutil.copy
        copy(root / name, source / name)
    shutil.copytree(root / "cdetr_fast", source / "cdetr_fast")
    command = "-m pip wheel --no-build-isolation --no-deps --no-index --quiet --wheel-dir"
    done = subprocess.run(
        [sys.executable, *command.split(), str(wheels), str(source)],
        env=os.environ | NO_NVCC | {"CDETR_FAST_NATIVE": mode},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (wheel,) = wheels.iterdir()
    assert wheel.name.endswith("-py3-none-any.whl") == (mode == "0")
    with zipfile.ZipFile(wheel) as file:
        libraries = [name for name in file.namelist() if name.endswith(".so")]
        assert libraries == (["cdetr_kernels/_native_cpu.so"] if mode == "1" else [])
        assert "cdetr_kernels/csrc/detection_topk.cu" in file.namelist()  # to build it later
        file.extractall(installed)
    done = subprocess.run(
        [sys.executable, "-c", USE_THE_EXTENSION.format(folder=str(installed), built=mode == "1")],
        env=os.environ | {"PYTHONPATH": str(installed)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
