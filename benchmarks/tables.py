"""Writes the tables of README.md and docs/performance.md from the files in `benchmarks/results`.

python -m benchmarks.tables          # rewrites the pages
python -m benchmarks.tables --check  # fails if a page is out of date
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.ops import summary

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent
MARKS = "<!-- {}: python -m benchmarks.tables -->", "<!-- end of {} -->"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, do not write")
    arguments = parser.parse_args()
    outdated = []
    for page, parts in pages().items():
        text = (ROOT / page).read_text(encoding="utf-8")
        updated = text
        for name, table in parts.items():
            begin, end = (mark.format(name) for mark in MARKS)
            before, rest = updated.split(begin)
            updated = f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"
        if updated != text:
            outdated.append(page)
            if not arguments.check:
                (ROOT / page).write_text(updated, encoding="utf-8")
    if arguments.check and outdated:
        print(f"out of date: {', '.join(outdated)}; python -m benchmarks.tables", file=sys.stderr)
        return 1
    return 0


def pages() -> dict[str, dict[str, str]]:
    """Returns the tables of each page by their marks."""
    return {
        "README.md": {"figures": figures()},
        "docs/performance.md": {
            "steps": _table("cpu_model_resnet50_800x1066_fp32", _steps),
            "stages": _table("cpu_stages_800x1066", _stages),
            "precision": _table("cpu_precision_demo", _precision),
        },
    }


def _table(name: str, lines: Callable[[list[dict[str, Any]]], list[str]]) -> str:
    """One file's rows as a table, and what it was made with; "not measured" if it is not there."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return "Not measured yet."
    content = json.loads(path.read_text(encoding="utf-8"))
    environment = content["environment"]
    note = (
        f"{environment['processor']}, {environment['threads']} threads, torch "
        f"{environment['torch']}, {environment['date']}: `{environment['command']}` ({name}.json)."
    )
    return "\n".join([*lines(content["rows"]), "", note])


def _steps(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| model | ms | times as fast | dispatches | logits within |", "|---|---|---|---|---|"]
    return lines + [
        f"| {row['model']} | {row['ms']:.0f} | {row['speed-up']:.2f} | {row['dispatches'] or '-'} "
        f"| {row['max |dlogit|']:.0e} |"
        for row in rows
    ]


def _stages(rows: list[dict[str, Any]]) -> list[str]:
    total = rows[-1]
    lines = [
        "| stage | ms | share | GFLOP | MB | roofline, ms | bound by | of the roofline |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['stage']} | {row['ms']:.1f} | {row['share']:.1%} | {row['GFLOP']:.1f} | "
        f"{row['MB']:.0f} | {row['roofline, ms']:.1f} | {row['bound by']} | "
        f"{row['of the roofline']:.2f} |"
        for row in rows
    ]
    return [
        *lines,
        "",
        f"Roofline: {total['GFLOP/s of products']:.0f} GFLOP/s of a large matrix product, "
        f"{total['GB/s of copies']:.1f} GB/s of a large copy, measured in the same run.",
    ]


def _precision(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| `optimize(model)` in | times as fast | AP | AP lost | score error, mean and largest | "
        "box error, mean and largest |",
        "|---|---|---|---|---|---|",
    ]
    return lines + [
        f"| {row['precision']} | {row['speed-up']:.2f} | {row['AP']:.1f} | {row['AP lost']:.1f} | "
        f"{row['mean score error']:.4f}, {row['max score error']:.3f} | "
        f"{row['mean box error, px']:.2f} px, {row['max box error, px']:.1f} px |"
        for row in rows
    ]


def figures() -> str:
    """One row a measurement: ours and transformers' medians of one run, with the accuracy."""
    lines = ["| work | transformers | cdetr_fast | accuracy |", "|---|---|---|---|"]
    commands = []
    for name, describe in (
        ("cpu_model_resnet50_800x1066_fp32", _model),
        ("cpu_mask_head_800x1066", _mask_head),
        ("cpu_loss_b16", _loss),
        ("cpu_training", _training),
        ("cpu_patching", _patching),
        ("cpu_topk", _detections),
        ("cpu_folder", _folder),
    ):
        path = RESULTS / f"{name}.json"
        if not path.is_file():  # not measured yet
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        lines += describe(content["rows"])
        commands.append((content["environment"], name))
    environment = commands[0][0]
    made_by = ", ".join(f"`{e['command']}` ({name}.json)" for e, name in commands)
    lines.append(
        f"\n{environment['processor']}, {environment['threads']} threads, torch "
        f"{environment['torch']}, transformers {environment['transformers']}; medians, the two in "
        f"turns in one run. {made_by}."
    )
    return "\n".join([*lines, *gpu_figures(RESULTS)])


def _detections(rows: list[dict[str, Any]]) -> list[str]:
    """The list form at the usual head and k, from batch 1 to 32."""
    rows = [
        row
        for row in rows
        if (row["form"], row["queries"], row["k"]) == ("list", 300, 100) and row["batch"] in (1, 32)
    ]
    return [
        f"| post_process_object_detection, 300x91, 100 best, batch {ours['batch']} | "
        f"{theirs['ms']:.2f} ms | {ours['ms']:.2f} ms, {ours['speed-up']:.1f} times as fast | "
        f"scores within {ours['max |dscore|']:.0e}, boxes {ours['max box error, px']:.0e} px |"
        for theirs, ours in zip(rows[::2], rows[1::2], strict=True)
    ]


def gpu_figures(folder: Path) -> list[str]:
    """Returns the lines of a table from the latest file of `benchmarks.gpu_check`, if there is one.

    A work that the file has no time for, on either side, is "not measured".
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
    lines = [
        "",
        "| on a GPU | best of the others | cdetr_fast | times as fast |",
        "|---|---|---|---|",
    ]
    cells = {
        (line["op"], line["shape"], line["dtype"], line["mode"]): line
        for line in summary(rows.get("microbenchmarks", []))
    }
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
            row["model"]: row["ms"]
            for row in rows.get(name, [])
            if row.get("work") != "matching and loss"
        }
        same = (model for model in times if model.startswith("cdetr_fast") and "paper" not in model)
        ours = [times[model] for model in same]
        their = times.get("transformers sdpa")
        lines.append(_compared(name, "transformers sdpa", their, min(ours, default=None)))
    versions = ", ".join(f"{x} {environment.get(x)}" for x in ("torch", "triton", "transformers"))
    made_by = f"`python -m benchmarks.gpu_check` ({path.name})"
    lines.append(f"\n{environment['device']}, {versions}; medians. {made_by}.")
    return lines


def _compared(work: str, other: str | None, their: float | None, our: float | None) -> str:
    if their is None or our is None:
        return f"| {work} | not measured | not measured | |"
    return f"| {work} | {their:.3g} ms ({other}) | {our:.3g} ms | {their / our:.2f} |"


def _model(rows: list[dict[str, Any]]) -> list[str]:
    of = {row["model"]: row for row in rows}
    return [
        f"| {work}, ResNet-50, 800x1066, batch 1, fp32 | {of['transformers sdpa']['ms']:.0f} ms "
        f"(sdpa) | {ours['ms']:.0f} ms, {ours['speed-up']:.2f} times as fast | logits within "
        f"{ours['max |dlogit|']:.0e}, boxes within {ours['max box error, px']:.0e} px |"
        for work, ours in (
            ("whole model, one import changed", of["cdetr_fast"]),
            ("`optimize(model)`", of["optimize(cdetr_fast)"]),
        )
    ]


def _patching(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for work, sizes, name, field in (
        ("forward", "ResNet-50, 800x1066, batch 1", "logits", "max |dlogit|"),
        ("training step", "ResNet-18, 320x416, batch 4, 20 targets an image", "gradients",
         "gradient error"),
    ):  # fmt: skip
        times = {row["patch"]: row for row in rows if row["work"] == work}
        theirs, ours = times["transformers"], times["cdetr_fast, all"]
        lines.append(
            f"| `patch_transformers()`: {work}, {sizes}, fp32 | {theirs['ms']:.0f} ms (sdpa) | "
            f"{ours['ms']:.0f} ms, {ours['speed-up']:.2f} times as fast | {name} within "
            f"{ours[field]:.0e} |"
        )
    return lines


def _folder(rows: list[dict[str, Any]]) -> list[str]:
    of = {row["way"]: row for row in rows}
    theirs = of["transformers"]
    return [
        f"| {work}, {theirs['images']} JPEG files of 640x480 to boxes, ResNet-50 at 800x1066 | "
        f"{theirs['images/s']:.2f} images/s | {ours['images/s']:.2f} images/s, "
        f"{ours['speed-up']:.2f} times as fast | {_boxes(ours)} |"
        for work, ours in (
            ("`predict`", of["cdetr_fast"]),
            ("`optimize(model).predict`", of["cdetr_fast, optimize(model)"]),
        )
    ]


def _boxes(row: dict[str, Any]) -> str:
    if not row["detections"]:
        return "no detections to compare"
    return f"boxes within {row['max box error, px']:.0e} px"


def _training(rows: list[dict[str, Any]]) -> list[str]:
    of = {(row["work"], row["model"]): row for row in rows}
    lines = []
    for work, name, what in (
        ("whole step", "cdetr_fast", "training step"),
        (
            "whole step",
            "cdetr_fast, paper",
            "the same of a new model (stem and first stage frozen)",
        ),
        ("matching and loss", "cdetr_fast", "its matching and loss"),
    ):
        theirs, ours = of[work, "transformers sdpa"], of[work, name]
        error, count = ours["gradient error"], ours["threads"]
        accuracy = "other weights" if error is None else f"gradients within {error:.0e}"
        lines.append(
            f"| {what}, ResNet-18, 256x256, batch 8, 20 targets an image, threads: {count} | "
            f"{theirs['ms']:.0f} ms (sdpa) | {ours['ms']:.0f} ms, {ours['speed-up']:.2f} times as "
            f"fast | {accuracy} |"
        )
    return lines


def _mask_head(rows: list[dict[str, Any]]) -> list[str]:
    theirs, ours = rows
    return [
        f"| mask head, 800x1066, {ours['queries']} queries | {theirs['ms'] / 1e3:.1f} s, "
        f"{theirs['peak MiB'] / 1024:.1f} GiB | {ours['ms'] / 1e3:.1f} s, "
        f"{ours['peak MiB'] / 1024:.1f} GiB: {ours['time ratio']:.2f} of the time, "
        f"{ours['memory ratio']:.3f} of the memory | masks within {ours['max |dmask|']:.0e} |"
    ]


def _loss(rows: list[dict[str, Any]]) -> list[str]:
    return [
        f"| matching and loss, 6 layers, batch 16, {ours['targets']} targets an image, forward and "
        f"backward | {theirs['ms']:.0f} ms | {ours['ms']:.0f} ms, {ours['speed-up']:.1f} times as "
        f"fast | loss within {ours['loss error']:.0e}, gradients {ours['gradient error']:.0e} |"
        for theirs, ours in zip(rows[::2], rows[1::2], strict=True)
    ]


if __name__ == "__main__":
    sys.exit(main())
