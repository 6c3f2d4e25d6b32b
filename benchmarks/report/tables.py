"""Tables of README.md and docs/performance.md, from the files in `benchmarks/results`.

python -m benchmarks.report          # writes the pages
python -m benchmarks.report --check  # fails if a page is out of date
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.ops import summary
from benchmarks.report import growth
from benchmarks.report.pages import ROOT, filled, markdown
from benchmarks.results import Results, Row

RESULTS = Path(__file__).parents[1] / "results"
MARKS = "<!-- {}: python -m benchmarks.report -->", "<!-- end of {} -->"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pages; with --check return 1 if one is out of date."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, do not write")
    options = parser.parse_args(arguments)
    outdated = []
    for page, tables in pages().items():
        text = (ROOT / page).read_text(encoding="utf-8")
        updated = filled(text, tables, MARKS)
        if updated != text:
            outdated.append(page)
            if not options.check:
                (ROOT / page).write_text(updated, encoding="utf-8")
    if options.check and outdated:
        print(f"out of date: {', '.join(outdated)}; python -m benchmarks.report", file=sys.stderr)
        return 1
    return 0


def pages() -> dict[str, dict[str, str]]:
    """Return the tables of each page by their marks."""
    return {
        "README.md": {"highlights": highlights(), "figures": headline()},
        "docs/performance.md": {
            "figures": figures(),
            "steps": _with_note("cpu_model_resnet50_800x1066_fp32", _steps),
            "runtimes": _with_note("cpu_runtimes_800x1066", _runtimes),
            "runtimes of a padded batch": _with_note("cpu_runtimes_480x640_b4_padded", _runtimes),
            "stages": _with_note("cpu_stages_800x1066", _stages),
            "precision": _with_note("cpu_precision_demo", _precision),
            "precision of blood cells": _with_note("cpu_precision_bccd", _precision),
            "serve": _served("cpu_serve_demo"),
            "training in bf16": _with_note("cpu_training_bf16", _training_steps),
            **{f"growth: {axis}": _grown(f"cpu_growth_{axis}") for axis in growth.UNITS},
        },
        "docs/guides/serve.md": {"serve": _served("cpu_serve_demo")},
    }


# ------------------------------------------------------------------------- docs/performance.md


def _with_note(name: str, table: Callable[[list[Row]], str]) -> str:
    """Return the table of a file and what it was made with."""
    found = _load(name)
    if found is None:
        return "Not measured yet."
    environment = found.environment
    note = (
        f"{results.machine(environment)}, torch "
        f"{environment['torch']}, {environment['date']}: `{environment['command']}` ({name}.json)."
    )
    return f"{table(found.rows)}\n\n{note}"


def _load(name: str) -> Results | None:
    path = RESULTS / f"{name}.json"
    return results.load(path) if path.is_file() else None


def _steps(rows: list[Row]) -> str:
    return markdown(
        ["model", "ms", "times as fast", "dispatches", "logits within"],
        (
            (row["provider"], f"{row['ms']:.0f}", f"{row['speed-up']:.2f}",
             row["dispatches"] or "-", f"{row['accuracy']['max |dlogit|']:.0e}")
            for row in rows
        ),
    )  # fmt: skip


def _runtimes(rows: list[Row]) -> str:
    def line(row: Row) -> tuple[str, ...]:
        if "not measured" in row:
            return row["provider"], row["not measured"], "", "", "", ""
        error = row["accuracy"]
        return (
            row["provider"], f"{row['ms']:.0f}", f"{row['min_ms']:.0f}", f"{row['speed-up']:.2f}",
            f"{error['max |dlogit|']:.0e}", f"{error['max box error, px']:.1g} px",
        )  # fmt: skip

    header = ["model", "ms", "fastest", "times as fast", "logits within", "boxes within"]
    return f"{rows[0]['shape']}\n\n{markdown(header, map(line, rows))}"


def _stages(rows: list[Row]) -> str:
    table = markdown(
        ["stage", "ms", "share", "GFLOP", "MB", "roofline, ms", "bound by", "of the roofline"],
        (
            (row["stage"], f"{row['ms']:.1f}", f"{row['share']:.1%}", f"{row['GFLOP']:.1f}",
             f"{row['MB']:.0f}", f"{row['roofline, ms']:.1f}", row.get("bound by", ""),
             f"{row['of the roofline']:.2f}")
            for row in rows
        ),
    )  # fmt: skip
    total = rows[-1]
    return (
        f"{table}\n\nRoofline: {total['GFLOP/s of products']:.0f} GFLOP/s of a large matrix "
        f"product, {total['GB/s of copies']:.1f} GB/s of a large copy, measured in the same run."
    )


def _precision(rows: list[Row]) -> str:
    def line(row: Row) -> tuple[str, ...]:
        if "not measured" in row:
            return row["provider"], row["not measured"], "", "", "", ""
        error = row["accuracy"]
        return (
            row["provider"], f"{row['speed-up']:.2f}", f"{row['AP']:.1f}", f"{row['AP lost']:.1f}",
            f"{error['mean score error']:.4f}, {error['max score error']:.3f}",
            f"{error['mean box error, px']:.2f} px, {error['max box error, px']:.1f} px",
        )  # fmt: skip

    header = ["`optimize(model)` in", "times as fast", "AP", "AP lost",
              "score error, mean and largest", "box error, mean and largest"]  # fmt: skip
    return markdown(header, map(line, rows))


def _training_steps(rows: list[Row]) -> str:
    def line(row: Row) -> tuple[str, ...]:
        error = row.get("accuracy", {}).get("gradient error")
        within = "-" if error is None else f"{error:.0e}"  # other parts of the backbone train
        return row["provider"], f"{row['ms']:.0f}", f"{row['speed-up']:.2f}", within

    steps = [row for row in rows if row["work"] == "whole step"]
    header = ["model", "ms", "times as fast", "gradients within"]
    return f"{steps[0]['shape']}\n\n{markdown(header, map(line, steps))}"


def _grown(name: str) -> str:
    """Return the table of an axis, and its picture if it has been drawn."""
    table = _with_note(name, growth.table)
    picture = f"pictures/{name}.png"
    if not (ROOT / "docs" / picture).is_file():
        return table
    return f"{table}\n\n![Time and memory of each model]({picture})"


def _served(*names: str) -> str:
    return "\n\n".join(_with_note(name, _rates) for name in names)


def _rates(rows: list[Row]) -> str:
    header = ["", "requests/s", "latency, p50", "latency, p95", "lost", "boxes within"]
    header[0] = f"{rows[0]['shape']}; at most {rows[0]['most in a batch']} in a batch"
    return markdown(
        header,
        (
            (row["provider"], f"{row['requests/s']:.1f}", f"{row['p50 latency, ms']:.0f} ms",
             f"{row['p95 latency, ms']:.0f} ms", f"{row['accuracy']['answers lost']:.0f}",
             f"{row['accuracy']['max box error, px']:.0e} px")
            for row in rows
        ),
    )  # fmt: skip


# ------------------------------------------------------------------------------------ README.md


def highlights() -> str:
    """Return three figures for the top of the README, and their machine."""
    model, masks, loss = map(
        _load, ("cpu_model_resnet50_800x1066_fp32", "cpu_mask_head_800x1066", "cpu_loss_b16")
    )
    if model is None or masks is None or loss is None:
        return "Not measured yet."
    _, fast = next(_pairs(model.rows, "transformers sdpa", "optimize(cdetr_fast)"))
    slow_masks, fast_masks = next(_pairs(masks.rows, "transformers", "cdetr_fast"))
    *_, (_, fast_loss) = _pairs(loss.rows, "transformers", "cdetr_fast")
    return (
        f"**{fast['speed-up']:.1f} times** the speed of transformers for a whole image, "
        f"**{slow_masks['ms'] / fast_masks['ms']:.0f} times** in "
        f"{fast_masks['peak MiB'] / slow_masks['peak MiB']:.0%} of the memory for the mask head, "
        f"**{fast_loss['speed-up']:.0f} times** for matching and loss "
        f"({fast_loss['targets']} targets per image): fp32, "
        f"{model.environment['threads']} threads of an {model.environment['processor']}, "
        f"logits within {fast['accuracy']['max |dlogit|']:.0e}, masks within "
        f"{fast_masks['accuracy']['max |dmask|']:.0e}, loss within "
        f"{fast_loss['accuracy']['loss error']:.0e}."
    )


def headline() -> str:
    """Return the five rows that the README shows, and the machine."""
    file = _load("cpu_model_resnet50_800x1066_fp32")
    if file is None:
        return "Not measured yet."
    lines = list(_model(file.rows))
    for name, describe, row in (
        ("cpu_mask_head_800x1066", _mask_head, 0),
        ("cpu_loss_b16", _loss, -1),
        ("cpu_folder", _folder, -1),
    ):
        if found := _load(name):
            lines.append(list(describe(found.rows))[row])
    table = markdown(["work", "transformers", "cdetr_fast", "accuracy"], lines)
    environment = file.environment
    return (
        f"{table}\n\n{results.machine(environment)}, torch "
        f"{environment['torch']}, transformers {environment['transformers']}; medians, the two in "
        "turns in one run."
    )


# ------------------------------------------------------------------------- docs/performance.md


def figures() -> str:
    """Return a line for each work: medians of transformers and ours in one run, and accuracy."""
    lines, found = [], []
    for name, describe in (
        ("cpu_model_resnet50_800x1066_fp32", _model),
        ("cpu_mask_head_800x1066", _mask_head),
        ("cpu_loss_b16", _loss),
        ("cpu_training", _training),
        ("cpu_patching", _patching),
        ("cpu_topk", _detections),
        ("cpu_folder", _folder),
    ):
        if file := _load(name):
            lines += list(describe(file.rows))
            found.append(file)
    environment = found[0].environment
    made_by = "\n".join(f"- {file.name}.json: `{file.environment['command']}`" for file in found)
    note = (
        f"{results.machine(environment)}, torch "
        f"{environment['torch']}, transformers {environment['transformers']}; medians, the two in "
        f"turns in one run. Made by:\n\n{made_by}"
    )
    table = markdown(["work", "transformers", "cdetr_fast", "accuracy"], lines)
    return "\n".join([table, "", note, *gpu_figures(RESULTS)])


Line = tuple[str, str, str, str]


def _pairs(rows: list[Row], theirs: str, ours: str) -> Iterator[tuple[Row, Row]]:
    """Yield the rows of two providers that did the same work."""
    works: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        works.setdefault((row["work"], row["shape"]), {})[row["provider"]] = row
    for providers in works.values():
        if theirs in providers and ours in providers:
            yield providers[theirs], providers[ours]


def _times(ours: Row, digits: int = 2, decimals: int = 0) -> str:
    return f"{ours['ms']:.{decimals}f} ms, {ours['speed-up']:.{digits}f} times as fast"


def _model(rows: list[Row]) -> Iterator[Line]:
    for work, name in (
        ("whole model, one import changed", "cdetr_fast"),
        ("`optimize(model)`", "optimize(cdetr_fast)"),
    ):
        for theirs, ours in _pairs(rows, "transformers sdpa", name):
            error = ours["accuracy"]
            yield (
                f"{work}, ResNet-50, 800x1066, batch 1, fp32",
                f"{theirs['ms']:.0f} ms (sdpa)",
                _times(ours),
                f"logits within {error['max |dlogit|']:.0e}, "
                f"boxes within {error['max box error, px']:.0e} px",
            )


def _mask_head(rows: list[Row]) -> Iterator[Line]:
    for theirs, ours in _pairs(rows, "transformers", "cdetr_fast"):
        yield (
            f"mask head, 800x1066, {ours['queries']} queries",
            f"{theirs['ms'] / 1e3:.1f} s, {theirs['peak MiB'] / 1024:.1f} GiB",
            f"{ours['ms'] / 1e3:.1f} s, {ours['peak MiB'] / 1024:.1f} GiB: "
            f"{ours['ms'] / theirs['ms']:.2f} of the time, "
            f"{ours['peak MiB'] / theirs['peak MiB']:.3f} of the memory",
            f"masks within {ours['accuracy']['max |dmask|']:.0e}",
        )


def _loss(rows: list[Row]) -> Iterator[Line]:
    for theirs, ours in _pairs(rows, "transformers", "cdetr_fast"):
        error = ours["accuracy"]
        yield (
            f"matching and loss, 6 layers, batch 16, {ours['targets']} targets per image, forward "
            "and backward",
            f"{theirs['ms']:.0f} ms",
            _times(ours, 1),
            f"loss within {error['loss error']:.0e}, gradients {error['gradient error']:.0e}",
        )


def _training(rows: list[Row]) -> Iterator[Line]:
    for work, theirs_name, name in (
        ("training step", "transformers sdpa", "cdetr_fast"),
        ("the same of a new model (stem and first stage frozen)", "transformers sdpa",
         "cdetr_fast, paper"),
        ("its matching and loss", "transformers", "cdetr_fast"),
    ):  # fmt: skip
        for theirs, ours in _pairs(rows, theirs_name, name):
            error = ours["accuracy"]["gradient error"]
            yield (
                f"{work}, ResNet-18, 256x256, batch 8, {ours['targets']} targets per image, "
                f"threads: {ours['threads']}",
                f"{theirs['ms']:.0f} ms (sdpa)",
                _times(ours),
                "other weights" if error is None else f"gradients within {error:.0e}",
            )


def _patching(rows: list[Row]) -> Iterator[Line]:
    sizes = {
        "forward": ("ResNet-50, 800x1066, batch 1", "logits", "max |dlogit|"),
        "training step": ("ResNet-18, 320x416, batch 4, 20 targets per image", "gradients",
                          "gradient error"),
    }  # fmt: skip
    for theirs, ours in _pairs(rows, "transformers", "cdetr_fast, all"):
        size, name, error = sizes[ours["work"]]
        yield (
            f"`patch_transformers()`: {ours['work']}, {size}, fp32",
            f"{theirs['ms']:.0f} ms (sdpa)",
            _times(ours),
            f"{name} within {ours['accuracy'][error]:.0e}",
        )


def _detections(rows: list[Row]) -> Iterator[Line]:
    for theirs, ours in _pairs(rows, "transformers", "cdetr_fast"):
        if (ours["queries"], ours["k"]) != (300, 100) or ours["batch"] not in (1, 32):
            continue
        error = ours["accuracy"]
        yield (
            f"post_process_object_detection, 300x91, 100 best, batch {ours['batch']}",
            f"{theirs['ms']:.2f} ms",
            _times(ours, 1, 2),
            f"scores within {error['max |dscore|']:.0e}, boxes {error['max box error, px']:.0e} px",
        )


def _folder(rows: list[Row]) -> Iterator[Line]:
    for work, name in (
        ("`predict`", "cdetr_fast"),
        ("`optimize(model).predict`", "cdetr_fast, optimize(model)"),
    ):
        for theirs, ours in _pairs(rows, "transformers", name):
            yield (
                f"{work}, {ours['images']} JPEG files of 640x480 to boxes, ResNet-50 at 800x1066",
                f"{theirs['images/s']:.2f} images/s",
                f"{ours['images/s']:.2f} images/s, {ours['speed-up']:.2f} times as fast",
                f"boxes within {ours['accuracy']['max box error, px']:.0e} px",
            )


def gpu_figures(folder: Path) -> list[str]:
    """Return the lines of a table from the latest file of `gpu_check`, if there is one.

    A work without a time on either side is "not measured".
    """
    files = {
        path: json.loads(path.read_text(encoding="utf-8"))
        for path in folder.glob("*-torch*.json")
        if not path.name.startswith("rehearsal")
    }
    if not files:
        return []
    path = max(files, key=lambda path: (files[path]["environment"]["date"], path.name))
    environment, rows = files[path]["environment"], files[path]["rows"]
    cells = {
        (line["op"], line["shape"], line["dtype"], line["mode"]): line
        for line in summary(rows.get("microbenchmarks", []))
    }
    lines = []
    for batch, keys in ((1, 1050), (8, 1050), (32, 1050), (8, 4200)):
        for mode in ("forward", "forward and backward"):
            shape = f"cross B={batch} Q=300 S={keys}"
            line = cells.get(("conditional_attention", shape, "bfloat16", mode), {})
            work = f"conditional_attention, B={batch}, S={keys}, bf16, {mode}"
            lines.append(
                _compared(work, line.get("best other"), line.get("its ms"), line.get("ms"))
            )
    for name in ("model", "model bf16", "training step"):
        times = {
            row["provider"]: row["ms"]
            for row in rows.get(name, [])
            if row.get("work") != "matching and loss" and "ms" in row
        }
        ours = [ms for key, ms in times.items() if key.startswith("cdetr") and "paper" not in key]
        reference = "transformers sdpa"
        lines.append(_compared(name, reference, times.get(reference), min(ours, default=None)))
    versions = ", ".join(f"{x} {environment.get(x)}" for x in ("torch", "triton", "transformers"))
    made_by = f"`python -m benchmarks gpu_check` ({path.name})"
    table = markdown(["on a GPU", "best of the others", "cdetr_fast", "times as fast"], lines)
    return ["", *table.splitlines(), f"\n{environment['device']}, {versions}; medians. {made_by}."]


def _compared(work: str, other: str | None, their: float | None, our: float | None) -> Line:
    if their is None or our is None:
        return work, "not measured", "not measured", ""
    return work, f"{their:.3g} ms ({other})", f"{our:.3g} ms", f"{their / our:.2f}"
