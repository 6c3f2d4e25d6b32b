"""Ahead-of-time compilation of kernels for GPUs that need not be present, and their budgets.

What is compiled is what a launcher would launch: its arguments are made from meta tensors.
"""

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cdetr_kernels.gpu import configurations, launching
from cdetr_kernels.gpu.launching import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Documented architectures; the others run with the tiles of one of these.
DOCUMENTED = ("sm_80", "sm_90", "sm_100", "gfx942")
# Per multiprocessor: KiB of shared memory that programs can have (one of them 1 less), and threads.
CAPACITY = {
    "sm_80": (164, 2048),
    "sm_86": (100, 1536),
    "sm_89": (100, 1536),
    "sm_90": (228, 2048),
    "sm_100": (228, 2048),
    "sm_120": (100, 1536),
    "gfx942": (64, 2048),
}
# Instructions of the tensor cores: for tiles of 64 rows and more, and for smaller ones.
TENSOR_CORE = {
    **dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_120"), (r"\bHMMA\.", r"\bHMMA\.")),
    "sm_90": (r"\bHGMMA\.", r"\bHMMA\."),
    "sm_100": (r"\bUTC[A-Z]*MMA", r"\bHMMA\."),
    "gfx942": (r"\bv_mfma_", r"\bv_mfma_"),
}
# What PTX calls them, and copies of 16 bytes: the assembler translates each of these into one.
PTX_TENSOR_CORE = r"\b(wgmma|tcgen05)\.mma|\bmma\.sync"
PTX_LOAD16 = r"\bld\.global\S*\.(v4\.[bfu]32|v2\.[bfu]64)|\bcp\.async\.c[ga]\S* [^;]*, (0x10|16)\b"
PTX_STORE16 = r"\bst\.global\S*\.(v4\.[bfu]32|v2\.[bfu]64)"
POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32",
            torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1",
            torch.uint8: "*u8"}  # fmt: skip


class Audited(NamedTuple):
    """A launch, and the instructions that its machine code must have.

    Attributes:
        launch: The kernel with its arguments.
        instructions: Of "tensor" (tensor cores), "load16" and "store16" (16 bytes at once).
    """

    launch: Launch
    instructions: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Audit:
    """One kind of call whose kernels are compiled and held to their budgets.

    Args:
        label: Its options, for the reader.
        kernels: Makes the launches by name, from meta tensors.
        precision: "half", "tf32" or "ieee": how attention multiplies.
        brief: Whether it is one of the few that the test-suite compiles.
        documented: Whether it is in the table of docs/kernels.md; the others are variants of those.
    """

    label: str
    kernels: Callable[[], dict[str, Audited]]
    precision: str = "half"
    brief: bool = True
    documented: bool = True

    def audited(self, architecture: str) -> dict[str, Audited]:
        """Return what is launched on an architecture, by name."""
        with compiling_for(architecture, self.precision):
            return self.kernels()


@contextlib.contextmanager
def compiling_for(architecture: str, precision: str) -> Iterator[None]:
    """Make launchers choose tiles and precision as on a GPU of an architecture."""
    precision = "tf32" if precision == "tf32" else "ieee"
    with (
        mock.patch.object(launching, "architecture", return_value=architecture),
        mock.patch.object(launching, "dot_precision", return_value=precision),
    ):
        yield


def source(launch: Launch) -> ASTSource:
    """Specialise a kernel on the arguments of a launch, as triton does when it is called."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        divisible = False
        if parameter.is_constexpr or value is None:
            kind = "constexpr"
        elif isinstance(value, torch.Tensor):
            kind, divisible = POINTERS[value.dtype], True
        elif isinstance(value, float):
            kind = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            kind = "constexpr"
        else:
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0 and not parameter.do_not_specialize
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(i,)] = value
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def examine(launch: Launch, architecture: str, disassemble: bool = True) -> dict[str, int]:
    """Compile a launch and return what its machine code uses.

    Args:
        launch: The kernel with its arguments.
        architecture: One of `TARGETS`.
        disassemble: Count instructions in NVIDIA's machine code. False counts them in PTX, which
            takes half as long; that a kernel spills shows in the memory that it asks for.
    """
    compiled = triton.compile(source(launch), target=TARGETS[architecture], options=launch.options)
    shared = compiled.metadata.shared
    if architecture.startswith("gfx"):
        code = compiled.asm["amdgcn"]

        def number(name: str) -> int:
            return _number(rf"\.{name}: +(\d+)", code)

        registers = number("vgpr_count")
        # Scalar registers spill into lanes of vector registers, which costs no memory.
        spills = number("vgpr_spill_count")
        # A compute unit has four SIMDs of 512 registers a lane, and 64 KiB of local memory.
        waves = min(8, 512 // max(registers, 1)) * 4
        programs = min(waves // launch.tile.warps, 65536 // max(shared, 1))
        wide = r"(global|buffer)_load_dwordx4"
        wide_store = r"(global|buffer)_store_dwordx4"
    else:
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            tool = triton.knobs.nvidia.cuobjdump.path
            usage = _output(tool, "--dump-resource-usage", cubin)
            stack = sum(int(x) for x in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))
            if disassemble or stack:
                code = _output(tool, "--dump-sass", cubin)
                spills = stack + len(re.findall(r"\b(?:LDL|STL)\b", code))
            else:
                code, spills = compiled.asm["ptx"], 0
        registers = _number(r"REG:(\d+)", usage)
        memory, threads = CAPACITY[architecture]
        per_warp = 32 * 8 * -(-registers // 8)
        programs = min(
            65536 // (per_warp * launch.tile.warps),
            memory * 1024 // (shared + 1024),
            threads // (32 * launch.tile.warps),
            32,  # the most there are on any of them
        )
        wide = rf"\b(LDG|LDGSTS)\S*\.128|{PTX_LOAD16}"
        wide_store = rf"\bSTG\S*\.128|{PTX_STORE16}"
    over_keys = {"p_dkc", "p_dcodes"} & set(launch.arguments)
    rows = launch.tile.keys if over_keys else launch.tile.queries
    tensor_core = rf"{TENSOR_CORE[architecture][rows < 64]}|{PTX_TENSOR_CORE}"
    return {
        "registers": registers,
        "spills": spills,
        "shared": shared,
        "programs": programs,
        "tensor": len(re.findall(tensor_core, code)),
        "load16": len(re.findall(wide, code)),
        "store16": len(re.findall(wide_store, code)),
        "async": len(re.findall(r"\bLDGSTS\b|\bcp\.async\.c[ga]\b", code)),
    }


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"{pattern}: expected it in the report of the compiler")
    return int(match[1])


def _output(*command: Any) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def complaints(
    used: dict[str, int], audited: Audited, architecture: str, budgets: bool = True
) -> list[str]:
    """Return what a kernel does that its entry does not allow, or lacks.

    Without `budgets` it has to fit the architecture alone: other releases of triton than the one
    that they were set with need more or fewer registers and spills.
    """
    launch, instructions = audited
    found = []
    memory = CAPACITY[architecture][0] - (not architecture.startswith("gfx"))
    registers = 512 if architecture.startswith("gfx") else 255
    # Where an architecture borrows the tiles of another one, that one's budgets do not count.
    borrowed = configurations.is_borrowed(architecture, launch.tile)
    if budgets and (architecture in DOCUMENTED or not borrowed):
        memory, registers = min(memory, launch.tile.shared), launch.tile.registers
    if budgets and used["spills"] > launch.tile.spills:
        found.append(f"{used['spills']} spills > {launch.tile.spills}")
    if used["registers"] > registers:
        found.append(f"{used['registers']} registers > {registers}")
    if used["shared"] > memory * 1024:
        found.append(f"{used['shared']} bytes shared > {memory} KiB")
    missing = {
        "tensor": "no tensor cores",
        "load16": "no 16-byte loads",
        "store16": "no 16-byte stores",
    }
    found += [text for name, text in missing.items() if name in instructions and not used[name]]
    if launch.tile.stages > 1 and not used["async"] and not architecture.startswith("gfx"):
        found.append("no asynchronous copies")
    return found
