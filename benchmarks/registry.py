"""Registry: every benchmark, and every tool that measures or checks, by its name."""

import dataclasses
import importlib
import importlib.util
from types import ModuleType


@dataclasses.dataclass(frozen=True)
class Entry:
    """One name of `python -m benchmarks NAME`.

    Args:
        name: Name on the command line.
        summary: One line for the list.
        needs: Modules without which it cannot run.
        devices: Types of devices that `--device` may name; the first one is the default.
        tool: Module of a tool, whose `main(arguments)` returns the exit status. A benchmark has
            None; it is in `benchmarks/suite`.
    """

    name: str
    summary: str
    needs: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu",)
    tool: str | None = None

    def load(self) -> ModuleType:
        """Import the module of the benchmark or tool."""
        return importlib.import_module(self.tool or f"benchmarks.suite.{self.name}")

    def missing(self) -> list[str]:
        """Return the modules that it needs and that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


THEIRS = ("transformers", "timm")
ANYWHERE = ("cpu", "cuda")

BENCHMARKS = (
    Entry("model", "whole model at inference", THEIRS, ANYWHERE),
    Entry("runtimes", "whole model in three precisions, beside other runtimes", THEIRS),
    Entry("stages", "parts of the optimised model, beside their rooflines", THEIRS, ANYWHERE),
    Entry("growth", "time and memory over sizes, batches, queries and so on", THEIRS),
    Entry("decoder", "decoder alone, forward or with backward", THEIRS),
    Entry("mask_head", "mask head at inference: time and peak memory", THEIRS),
    Entry("precision", "lower precision of optimize(): speed, AP, errors", devices=ANYWHERE),
    Entry("patching", "transformers' model before and after patch_transformers()", THEIRS),
    Entry("preprocessing", "photographs to model inputs", THEIRS),
    Entry("folder", "folder of JPEG files to boxes", THEIRS),
    Entry("serve", "requests to cdetr-fast serve: rate and latency", ("fastapi", "httpx2")),
    Entry("topk", "outputs to detections of a batch", THEIRS),
    Entry("post_processing", "outputs to maps of segmentation: time and peak memory", THEIRS),
    Entry("training", "training step, and its matching and loss", THEIRS, ANYWHERE),
    Entry("loss", "matching and loss, forward and backward", THEIRS, ANYWHERE),
    Entry("loading", "training images out of JPEG files", (*THEIRS, "accelerate")),
)
TOOLS = (
    Entry("ops", "microbenchmarks of the operators", tool="benchmarks.ops"),
    Entry("overhead", "host cost of a call", tool="benchmarks.overhead"),
    Entry("numerics", "errors of kernels and models, for docs", THEIRS, tool="benchmarks.numerics"),
    Entry("audit", "machine code of every kernel: registers, spills", tool="benchmarks.audit"),
    Entry("tune", "tiles of the attention kernels on this GPU", tool="benchmarks.tune"),
    Entry("kernels_once", "every kernel once, for sanitizers", tool="benchmarks.kernels_once"),
    Entry("revision", "this checkout against another revision", tool="benchmarks.revision"),
    Entry("gpu_check", "everything that only a GPU can show", tool="benchmarks.gpu_check"),
)
REGISTRY = {entry.name: entry for entry in (*BENCHMARKS, *TOOLS)}
