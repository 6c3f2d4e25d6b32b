"""This checkout against another revision: the same work in turns, one process per side.

    python -m benchmarks revision 0fa85ad --threads 2 --repeats 7

Each side runs in a process of its own that imports only that side's packages, through names that
both have. The two take turns, so that what else the machine does hits both. The results of each
work are compared before its times are printed.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WORKS = (
    "import",
    "optimized, B=1",
    "optimized, B=4 padded",
    "model, B=1",
    "training step",
    "matching and loss",
    "folder",
)
TOLERANCE = 1e-6
"""Largest difference of outputs, relative to their largest value."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare; return 1 if outputs differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("revision", help="commit to compare with")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--works", nargs="+", default=WORKS, choices=WORKS)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)

    rows, failed = [], False
    with checkout(options.revision) as before, contextlib.ExitStack() as stack:
        sides = [stack.enter_context(Side(tree, options.threads)) for tree in (before, ROOT)]
        for work in options.works:
            outputs = [side.ask(work, "check") for side in sides]
            difference = largest_difference(*outputs)
            times: tuple[list[float], list[float]] = ([], [])
            for _ in range(options.repeats):
                for side, seconds in zip(sides, times, strict=True):
                    seconds.append(side.ask(work, "time"))
            old, new = ([statistics.median(t) * 1e3, min(t) * 1e3] for t in times)
            row = {
                "work": work,
                "before ms": old[0],
                "after ms": new[0],
                "ratio of medians": new[0] / old[0],
                "ratio of fastest": new[1] / old[1],
                "difference": difference,
            }
            rows.append(row)
            failed |= difference > TOLERANCE
            print("  ".join(f"{k} {v:.3g}" if k != "work" else f"{v:<22}" for k, v in row.items()))
    if options.output:
        options.output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return int(failed)


@contextlib.contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """Check a revision out, with the native extension of this checkout beside its kernels."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", tree, revision], check=True)
        try:
            for library in (ROOT / "kernels/cdetr_kernels").glob("_native_*"):
                shutil.copy2(library, tree / "kernels/cdetr_kernels")
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", tree], check=True)


def largest_difference(before: list[float], after: list[float]) -> float:
    """Return the largest difference of two lists, relative to the largest value."""
    largest = max((abs(value) for value in before), default=0.0) or 1.0
    return max((abs(a - b) for a, b in zip(before, after, strict=True)), default=0.0) / largest


class Side:
    """A process that works with the packages of one tree."""

    def __init__(self, tree: Path, threads: int) -> None:
        paths = os.pathsep.join([str(tree), str(tree / "kernels")])
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, "--serve", str(tree)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def ask(self, work: str, what: str) -> Any:
        """Ask for the outputs ("check") or the seconds ("time") of a work."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([work, what]), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{work}: the process failed; its error is above")
        return json.loads(answer)


# In the process of one side ----------------------------------------------------------------------


def serve(tree: Path) -> None:
    """Answer the questions of `Side.ask` on standard input until it ends."""
    answers, sys.stdout = sys.stdout, sys.stderr
    import cdetr_fast

    assert Path(cdetr_fast.__file__).is_relative_to(tree), cdetr_fast.__file__
    works: dict[str, Callable[[], Any]] = {}
    for line in sys.stdin:
        work, what = json.loads(line)
        if work not in works:
            works.clear()  # one model at a time in memory
            works[work] = MAKERS[work]()
            works[work]()  # the first call prepares
        if what == "check":
            result: Any = flatten(works[work]())
        else:
            start = time.perf_counter()
            took = works[work]()
            result = took if work == "import" else time.perf_counter() - start
        print(json.dumps(result), file=answers, flush=True)


def flatten(result: Any) -> list[float]:
    """Return all numbers of nested tensors and numbers, thinned out where there are many."""
    import torch

    if isinstance(result, torch.Tensor):
        values = result.detach().double().flatten()
        return values[:: max(1, len(values) // 10_000)].tolist()
    if isinstance(result, (list, tuple)):
        return [value for item in result for value in flatten(item)]
    return []


def make_import() -> Callable[[], float]:
    code = (
        "import time, torch, timm\n"
        "start = time.perf_counter()\n"
        "import cdetr_fast\n"
        "cdetr_fast.ConditionalDetrForObjectDetection, cdetr_fast.ConditionalDetrImageProcessor\n"
        "print(time.perf_counter() - start)"
    )

    # As installed, so with bytecode: the first call, whose time nobody reads, writes it.
    bytecode = tempfile.TemporaryDirectory()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}

    def run() -> float:
        command = [sys.executable, "-P", "-X", f"pycache_prefix={bytecode.name}", "-c", code]
        finished = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        )
        return float(finished.stdout)

    return run


def make_model(backbone: str = "resnet50", **fields: Any) -> Any:
    """Return a model whose norms are not at their initial weights."""
    import torch

    import cdetr_fast

    torch.manual_seed(0)
    config = cdetr_fast.ConditionalDetrConfig(
        backbone=backbone, use_pretrained_backbone=False, num_labels=91, **fields
    )
    model = cdetr_fast.ConditionalDetrForObjectDetection(config)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
    return model


def make_forward(batch: int, size: tuple[int, int], optimize: bool) -> Callable[[], Any]:
    import torch

    import cdetr_fast

    model = make_model().eval()
    if optimize:
        model = cdetr_fast.optimize(model)
    images = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))
    mask = None
    if batch > 1:
        mask = torch.ones(batch, *size, dtype=torch.int64)
        mask[1:, size[0] * 3 // 4 :] = 0

    def run() -> Any:
        with torch.no_grad():
            output = model(images, pixel_mask=mask)
        return output.logits, output.pred_boxes

    return run


def make_labels(batch: int, count: int) -> list[dict[str, Any]]:
    import torch

    generator = torch.Generator().manual_seed(2)
    return [
        {
            "class_labels": torch.randint(0, 91, (count,), generator=generator),
            "boxes": torch.rand(count, 4, generator=generator) * 0.5 + 0.2,
        }
        for _ in range(batch)
    ]


def make_training_step() -> Callable[[], Any]:
    import torch

    model = make_model("resnet18", auxiliary_loss=True, dropout=0.0).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True)
    images = torch.randn(8, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    labels = make_labels(8, 7)

    def run() -> Any:
        loss = model(images, labels=labels).loss
        loss.backward()
        gradients = [parameter.grad.norm() for parameter in parameters]
        torch.nn.utils.clip_grad_norm_(parameters, 0.1)
        optimizer.step()
        optimizer.zero_grad()
        return loss, gradients

    return run


def make_matching_and_loss() -> Callable[[], Any]:
    import torch

    import cdetr_fast

    try:
        from cdetr_fast.loss.criterion import detection_loss
    except ImportError:  # before the modules moved
        from cdetr_fast.losses import (  # type: ignore[import-not-found,no-redef]  # old name
            detection_loss,
        )

    config = cdetr_fast.ConditionalDetrConfig(num_labels=91, auxiliary_loss=True)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 16, 300, 91, generator=generator).requires_grad_()
    boxes = (torch.rand(6, 16, 300, 4, generator=generator) * 0.5 + 0.2).requires_grad_()
    labels = make_labels(16, 100)

    def run() -> Any:
        loss, _, _ = detection_loss(
            logits[-1], labels, logits.device, boxes[-1], config, logits, boxes
        )
        return loss, torch.autograd.grad(loss, (logits, boxes))

    return run


def make_folder() -> Callable[[], Any]:
    import torch

    import cdetr_fast

    try:
        from cdetr_fast.demo import DEMO
        from cdetr_fast.demo.scenes import draw_scene
    except ImportError:  # before the modules moved
        from cdetr_fast.assets import DEMO  # type: ignore[import-not-found,no-redef]  # old name
        from cdetr_fast.scenes import (  # type: ignore[import-not-found,no-redef]  # old name
            draw_scene,
        )

    folder = tempfile.TemporaryDirectory()
    files = [Path(folder.name, f"{i}.jpg") for i in range(100)]
    for seed, file in enumerate(files):
        draw_scene(seed)[0].resize((640, 480)).save(file, quality=95)
    model = cdetr_fast.ConditionalDetrForObjectDetection.from_pretrained(DEMO, dtype=torch.float32)
    model = cdetr_fast.optimize(model.eval())

    def run(keep: Any = folder) -> Any:
        results: Any = model.predict(files, threshold=0.3)
        return [(result.scores, result.boxes_xyxy) for result in results]

    return run


MAKERS: dict[str, Callable[[], Callable[[], Any]]] = {
    "import": make_import,
    "optimized, B=1": lambda: make_forward(1, (800, 1066), optimize=True),
    "optimized, B=4 padded": lambda: make_forward(4, (480, 640), optimize=True),
    "model, B=1": lambda: make_forward(1, (800, 1066), optimize=False),
    "training step": make_training_step,
    "matching and loss": make_matching_and_loss,
    "folder": make_folder,
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(Path(sys.argv[2]))
    else:
        sys.exit(main())
