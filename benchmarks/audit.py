"""Compiles every kernel for GPUs that need not be there, and holds it to its budgets.

    python -m benchmarks.audit                      all architectures, all entries of the table
    python -m benchmarks.audit --quick sm_90        heads of 32 only, one architecture
    python -m benchmarks.audit --brief              each kernel once, as in the test-suite

What is compiled is what a launcher would launch: its arguments are made from meta tensors. Of the
machine code it counts registers, spills, shared memory, tensor-core instructions, and loads and
stores of 16 bytes.
The exit status is 1 if a kernel spills, exceeds a budget of its entry in
`cdetr_kernels.gpu.configurations`, or lacks an instruction that it is supposed to use. Where an
architecture runs with the entries of another one, that one's budgets do not count, but everything
has to fit.
"""

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
import unittest.mock
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cdetr_kernels.gpu import configurations, launching
from cdetr_kernels.gpu.launching import Launch
from cdetr_kernels.ops.conditional_attention import triton as conditional_attention
from cdetr_kernels.ops.conditional_attention.kernels import merge_kernel
from cdetr_kernels.ops.conditional_attention_separable import triton as separable_attention
from cdetr_kernels.ops.conditional_attention_separable.kernels import backward_codes_kernel
from cdetr_kernels.ops.matching_cost import triton as matching_cost
from cdetr_kernels.ops.normalize_and_pad import triton as normalize_and_pad
from cdetr_kernels.ops.residual_layer_norm import triton as residual_layer_norm
from cdetr_kernels.ops.set_loss import triton as set_loss
from cdetr_kernels.ops.sine_position_2d import triton as sine_position_2d
from cdetr_kernels.ops.sine_query import triton as sine_query

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# What the table of the documentation shows; the others run with the tiles of one of these.
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
POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32",
            torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1",
            torch.uint8: "*u8"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """One kind of call: what a launcher decides on, and the options that change the code."""

    size: int
    precision: str
    spatial: bool = True
    dropout_p: float = 0.0

    def __str__(self) -> str:
        kind = "" if self.spatial else " plain"
        return f"{self.precision} {self.size}{kind}{' dropout' if self.dropout_p else ''}"


@dataclasses.dataclass(frozen=True)
class SineCase:
    """One kind of call of both position codes."""

    precision: str  # "half" or "single"
    coordinates: int = 2
    size: int = 32  # of a head, of which there are 8

    def __str__(self) -> str:
        return f"sine {self.precision} {self.coordinates}"


@dataclasses.dataclass(frozen=True)
class LossCase:
    """One kind of call of matching and loss."""

    precision: str  # "half" or "single"
    targets: int = 100
    classification: str = "focal"
    size: int = 32  # of a head: unused

    def __str__(self) -> str:
        return f"{self.classification} {self.precision} {self.targets}"


@dataclasses.dataclass(frozen=True)
class ImageCase:
    """One kind of call of preprocessing."""

    precision: str = "half"  # of the model that follows; pixels are bytes, and values fp32
    size: int = 32  # of a head: unused

    def __str__(self) -> str:
        return "image"


@dataclasses.dataclass(frozen=True)
class NormCase:
    """One kind of call of the layer norm."""

    precision: str  # "half" or "single"
    channels: int = 256
    size: int = 32  # of a head: unused

    def __str__(self) -> str:
        return f"norm {self.precision} {self.channels}"


# Dropout, as in training, needs the most registers.
CASES = (
    Case(32, "half"),
    Case(32, "half", spatial=False),
    *(
        Case(size, precision, dropout_p=0.1)
        for precision in ("half", "tf32", "ieee")
        for size in configurations.WIDTHS
    ),
    *(SineCase(precision, n) for precision in ("half", "single") for n in (2, 4)),
    *(LossCase(precision, n) for precision in ("half", "single") for n in (7, 100)),
    LossCase("single", classification="softmax"),
    ImageCase(),
    *(NormCase(precision) for precision in ("half", "single")),
    NormCase("single", 4096),
)


AnyCase = Case | SineCase | LossCase | ImageCase | NormCase


def sine_launches(case: SineCase) -> dict[str, Launch]:
    """Returns what the position codes launch in a training step at 800x1066, on meta tensors."""
    dtype = torch.bfloat16 if case.precision == "half" else torch.float32
    mask = torch.empty(8, 25, 34, dtype=torch.bool, device="meta")
    key_code = torch.empty(8, 25 * 34, 8 * case.size, dtype=dtype, device="meta")
    # As in the decoder: fp32 points that the batch shares, with a gradient for each image.
    points = torch.empty(1, 300, case.coordinates, device="meta")
    dpoints = torch.empty(8, 300, case.coordinates, device="meta")
    code = torch.empty(8, 300, 8 * case.size, dtype=dtype, device="meta")
    options = (10000.0, 6.28)
    positions = sine_position_2d.position_launch(mask, 10000.0, True, 6.28, key_code)
    return {
        **({"sine_position_2d": positions} if case.coordinates == 2 else {}),
        "sine_query": sine_query.forward_launch(points, code, *options, code),
        "sine_query_backward": sine_query.backward_launch(
            code, points, code, *options, dpoints, code
        ),
    }


def loss_launches(case: LossCase) -> dict[str, Launch]:
    """Returns what matching and loss launch in a training step, on meta tensors."""
    dtype = torch.bfloat16 if case.precision == "half" else torch.float32
    logits = torch.empty(6, 8, 300, 91, dtype=dtype, device="meta")
    boxes = torch.empty(6, 8, 300, 4, device="meta")
    labels = torch.empty(8, case.targets, dtype=torch.int64, device="meta")
    targets = torch.empty(8, case.targets, 4, device="meta")
    counts = torch.empty(8, dtype=torch.int64, device="meta")
    cost = torch.empty(48, case.targets, 300, device="meta")
    inputs = (logits, boxes, labels, targets, counts)
    softmax = case.classification == "softmax"
    costs = {
        "matching_cost": matching_cost.cost_launch(*inputs, (2, 5, 2), softmax, 0.25, 2.0, cost),
    }
    if softmax:
        return costs
    matches = torch.empty(6, 8, case.targets, dtype=torch.int64, device="meta")
    saved = (torch.empty(6, 8, 300, 91, device="meta"), torch.empty(2, *boxes.shape, device="meta"))
    partial = torch.empty(48, 19, 4, device="meta")
    losses, num_boxes = torch.empty(4, 6, device="meta"), torch.empty((), device="meta")
    return costs | {
        "set_loss": set_loss.forward_launch(*inputs[:4], matches, 0.25, 2.0, *saved, partial),
        "set_loss_sum": set_loss.sum_launch(partial, counts, num_boxes, losses),
        "set_loss_backward": set_loss.backward_launch(losses, *saved, num_boxes, logits, boxes),
    }


def image_launches() -> dict[str, Launch]:
    """Returns what preprocessing launches for one image in a batch of 800x1088."""
    image = torch.empty(3, 800, 1066, dtype=torch.uint8, device="meta")
    values = torch.empty(3, 800, 1088, device="meta")
    mask = torch.empty(800, 1088, dtype=torch.int64, device="meta")
    launch = normalize_and_pad.pad_launch(image, (1.0, 2.0, 3.0), (4.0, 5.0, 6.0), values, mask)
    return {"normalize_and_pad": launch}


def norm_launches(case: NormCase) -> dict[str, Launch]:
    """Returns what the end of a decoder layer launches in inference, on meta tensors."""
    dtype = torch.bfloat16 if case.precision == "half" else torch.float32
    x = torch.empty(8, 300, case.channels, dtype=dtype, device="meta")
    affine = torch.empty(case.channels, dtype=dtype, device="meta")
    launch = residual_layer_norm.norm_launch(x, x, affine, affine, 1e-5, x)
    return {"residual_layer_norm": launch}


def separable_launches(
    queries_and_keys, value, mask, seed, options, logsumexp
) -> dict[str, Launch]:
    """Returns the same for `conditional_attention_separable`."""
    inputs = (*queries_and_keys, value, mask, seed, *options)
    query, _, key, *codes = queries_and_keys
    gradients = (query, query, key, *(code.float() for code in codes), value)
    backward = separable_attention.backward_launches(query, *inputs, query, logsumexp, gradients)
    attention = query.new_empty(*logsumexp.shape, key.shape[1])
    return {
        "separable_forward": separable_attention.forward_launch(*inputs, query, logsumexp),
        "separable_backward_queries": backward[0],
        "separable_backward_keys": backward[1],
        "separable_backward_rows": backward[2],
        "separable_backward_columns": backward[3],
        "separable_attention_map": separable_attention.map_launch(
            *queries_and_keys, mask, seed, logsumexp, *options, attention
        ),
    }


def launches(case: AnyCase, architecture: str) -> dict[str, Launch]:
    """Returns what a training step at 800x1066 launches, and the map, on meta tensors."""
    if isinstance(case, ImageCase):
        return image_launches()
    if isinstance(case, NormCase):
        return norm_launches(case)
    if isinstance(case, LossCase):
        return loss_launches(case)
    if isinstance(case, SineCase):
        return sine_launches(case)
    batch, queries, heads, keys = 8, 300, 8, 1050
    dtype = torch.bfloat16 if case.precision == "half" else torch.float32

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    query = empty(batch, queries, heads, case.size)
    key = empty(batch, keys, heads, case.size)
    shared = empty(1, keys, heads, case.size)
    value = empty(batch, keys, heads, case.size)
    spatial = (query, shared) if case.spatial else (None, None)
    logsumexp = empty(batch, heads, queries, dtype=torch.float32)
    queries_and_keys = (query, spatial[0], key, spatial[1])
    mask = empty(batch, keys, dtype=torch.bool)
    seed = empty(1, dtype=torch.int64) if case.dropout_p else None
    options = (0.1, case.dropout_p)
    precision = "tf32" if case.precision == "tf32" else "ieee"
    with (
        unittest.mock.patch.object(launching, "architecture", return_value=architecture),
        unittest.mock.patch.object(launching, "dot_precision", return_value=precision),
    ):
        inputs = (*queries_and_keys, value, mask, seed, *options)
        gradients = [x for x in (*queries_and_keys, value) if x is not None]
        backward = conditional_attention.backward_launches(
            query, *inputs, query, logsumexp, gradients
        )
        separable = {}
        if case.spatial:
            codes = (empty(1, 25, heads, case.size), empty(1, 42, heads, case.size))
            separable = separable_launches(
                (query, query, key, *codes), value, mask, seed, options, logsumexp
            )
        return {
            **separable,
            "forward": conditional_attention.forward_launch(*inputs, query, logsumexp),
            "backward_queries": backward[0],
            "backward_keys": backward[1],
            "attention_map": conditional_attention.map_launch(
                *queries_and_keys,
                mask,
                seed,
                logsumexp,
                *options,
                empty(batch, heads, queries, keys),
            ),
            "merge": conditional_attention.merge_launch(
                empty(3 * batch, queries, heads, case.size, dtype=torch.float32),
                empty(3 * batch, heads, queries, dtype=torch.float32),
                query,
                logsumexp,
            ),
        }


def source(launch: Launch) -> ASTSource:
    """Specialises a kernel on the arguments of a launch, as triton does when it is called."""
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


def examine(launch: Launch, architecture: str) -> dict:
    """Compiles a launch and returns what its machine code uses."""
    compiled = triton.compile(source(launch), target=TARGETS[architecture], options=launch.options)
    shared = compiled.metadata.shared
    if architecture.startswith("gfx"):
        code = compiled.asm["amdgcn"]

        def number(name):
            return int(re.search(rf"\.{name}: +(\d+)", code)[1])

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
            code = _output(tool, "--dump-sass", cubin)
        registers = int(re.search(r"REG:(\d+)", usage)[1])
        stack = sum(int(x) for x in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))
        spills = stack + len(re.findall(r"\b(?:LDL|STL)\b", code))
        memory, threads = CAPACITY[architecture]
        per_warp = 32 * 8 * -(-registers // 8)
        programs = min(
            65536 // (per_warp * launch.tile.warps),
            memory * 1024 // (shared + 1024),
            threads // (32 * launch.tile.warps),
            32,  # the most there are on any of them
        )
        wide = r"\b(LDG|LDGSTS)\S*\.128"
        wide_store = r"\bSTG\S*\.128"
    over_keys = {"p_dkc", "p_dcodes"} & set(launch.arguments)
    rows = launch.tile.keys if over_keys else launch.tile.queries
    return {
        "registers": registers,
        "spills": spills,
        "shared": shared,
        "programs": programs,
        "tensor": len(re.findall(TENSOR_CORE[architecture][rows < 64], code)),
        "load16": len(re.findall(wide, code)),
        "store16": len(re.findall(wide_store, code)),
        "async": len(re.findall(r"\bLDGSTS\b", code)),
    }


def _output(*command) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# Kernels that gather, or read masks, bytes, rows of 91 classes or 4 numbers: no loads of 16 bytes.
NARROW = (
    sine_position_2d.position_kernel,
    matching_cost.cost_kernel,
    set_loss.forward_kernel,
    set_loss.sum_kernel,
    normalize_and_pad.pad_kernel,
    backward_codes_kernel,
)


def complaints(used: dict, launch: Launch, case: AnyCase, architecture: str) -> list[str]:
    """Says what a kernel does that its entry does not allow."""
    found = []
    memory = CAPACITY[architecture][0] - (not architecture.startswith("gfx"))
    registers = 512 if architecture.startswith("gfx") else 255
    if architecture in DOCUMENTED or not configurations.is_borrowed(architecture, launch.tile):
        memory, registers = min(memory, launch.tile.shared), launch.tile.registers
    if used["spills"] > launch.tile.spills:
        found.append(f"{used['spills']} spills > {launch.tile.spills}")
    if used["registers"] > registers:
        found.append(f"{used['registers']} registers > {registers}")
    if used["shared"] > memory * 1024:
        found.append(f"{used['shared']} bytes shared > {memory} KiB")
    multiplies = isinstance(case, Case) and launch.kernel is not merge_kernel
    if multiplies and case.precision != "ieee" and not used["tensor"]:
        found.append("no tensor cores")
    if not used["load16"] and launch.kernel not in NARROW:
        found.append("no 16-byte loads")
    if not used["store16"] and isinstance(case, SineCase | ImageCase | NormCase):
        found.append("no 16-byte stores")
    if launch.tile.stages > 1 and not used["async"] and not architecture.startswith("gfx"):
        found.append("no asynchronous copies")
    return found


def write_table(rows: list[dict], page: Path) -> None:
    """Puts a table, a row for each kernel and case, between the marks in `page`."""
    architectures = [x for x in DOCUMENTED if any(row["architecture"] == x for row in rows)]
    cells = {(row["kernel"], row["case"], row["architecture"]): row for row in rows}
    lines = [
        "| kernel | case | " + " | ".join(architectures) + " |",
        "|---|---|" + "---|" * len(architectures),
    ]
    for kernel, case in dict.fromkeys((row["kernel"], row["case"]) for row in rows):
        texts = []
        for architecture in architectures:
            row = cells.get((kernel, case, architecture))
            texts.append("-" if row is None else _cell(row))
        lines.append(f"| {kernel} | {case} | " + " | ".join(texts) + " |")
    before, rest = page.read_text().split("<!-- audit -->\n")
    after = rest.split("<!-- /audit -->\n")[1]
    table = "\n".join(lines)
    page.write_text(f"{before}<!-- audit -->\n{table}\n<!-- /audit -->\n{after}")


def _cell(row: dict) -> str:
    spills = f", {row['spills']} spills" if row["spills"] else ""
    shared = -(-row["shared"] // 1024)
    return f"{row['tile']}: {row['registers']}, {shared}, {row['programs']}{spills}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("architectures", nargs="*", default=list(TARGETS))
    parser.add_argument("--quick", action="store_true", help="heads of 32 in half precision only")
    parser.add_argument("--brief", action="store_true", help="each kernel once")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--docs", action="store_true", help="also write docs/kernels.md's table")
    options = parser.parse_args(arguments)
    cases = [case for case in CASES if options.only in str(case)]
    if options.quick or options.brief:
        cases = [case for case in cases if case.size == 32 and case.precision == "half"]
    rows, failed = [], 0
    header = ("architecture", "case", "kernel", "tile", "registers", "spills", "shared",
              "programs", "tensor", "load16", "store16", "async")  # fmt: skip
    line = "{:>12} {:>15} {:>26} {:>12} {:>9} {:>6} {:>7} {:>8} {:>6} {:>6} {:>7} {:>5}  {}"
    print(line.format(*header, ""))
    for architecture in options.architectures:
        done = set()
        # The last case of a kind has the most options.
        for case in reversed(cases) if options.brief else cases:
            if architecture.startswith("gfx") and case.precision == "tf32":
                continue  # launchers ask for it on NVIDIA's GPUs only
            for kernel, launch in launches(case, architecture).items():
                if options.brief and kernel in done:
                    continue
                done.add(kernel)
                used = examine(launch, architecture)
                wrong = complaints(used, launch, case, architecture)
                failed += bool(wrong)
                tile = launch.tile
                shape = f"{tile.queries}x{tile.keys} {tile.warps}w{tile.stages}s"
                row = dict(zip(header, (architecture, str(case), kernel, shape), strict=False))
                rows.append({**row, **used})
                print(line.format(*rows[-1].values(), "; ".join(wrong)), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.docs:
        write_table(rows, Path(__file__).parents[1] / "docs" / "kernels.md")
    print(f"{len(rows)} kernels, {failed} outside their budgets")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
