"""Pictures of results.

    python -m benchmarks.report.plots benchmarks/results/RESULT.json --folder output/plots

RESULT.json is of `ops` or `gpu_check` (a picture for each operator, dtype and mode), of `model`
(bars of all models; of a run with `--steps` also what each technique saves) or of `growth` (time
and memory over the values of each axis). Needs matplotlib (the extra `test`).
"""

import argparse
import itertools
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from benchmarks import results
from benchmarks.ops import best_ms
from benchmarks.report import growth
from benchmarks.results import Row

REFERENCE = "transformers sdpa"
_MEASURES = {"ms": "median time of a call, ms", "peak MiB": "peak memory beyond that at rest, MiB"}
OURS = ("#08519c", "#3182bd", "#6baed6")
OTHERS = ("#d95f0e", "#fe9929", "#fec44f", "#969696", "#636363", "#252525", "#bdbdbd")


def colours(providers: list[str]) -> dict[str, str]:
    """Return blues for ours, and the same colour for a provider in all pictures."""
    ours = [name for name in providers if "cdetr_fast" in name]
    others = [name for name in providers if name not in ours]
    return {
        name: palette[i % len(palette)]
        for group, palette in ((ours, OURS), (others, OTHERS))
        for i, name in enumerate(group)
    }


def draw(rows: list[Row], palette: dict[str, str], title: str, note: str) -> Figure:
    """Draw groups of bars by shape, a bar for each provider, in milliseconds."""
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    providers = [name for name in palette if any(row["provider"] == name for row in rows)]
    height = 0.24 * sum(1 for _ in rows) + 0.45 * len(shapes) + 1.6
    figure, axes = plt.subplots(figsize=(9, max(3.0, height)), layout="constrained")
    y, ticks = 0.0, []
    for shape in shapes:
        group = {row["provider"]: row for row in rows if row["shape"] == shape}
        first = y
        for name in providers:
            if name not in group:
                continue
            row = group[name]
            ms = best_ms(row)
            axes.barh(y, ms, 0.85, color=palette[name])
            axes.text(ms, y, f" {ms:.3g}", va="center", fontsize=7)
            y += 1
        # No version can be faster: counted bytes and products at the rates that were measured.
        some = next(iter(group.values()))
        floor = best_ms(some) * some["of the roofline"]
        axes.plot([floor, floor], [first - 0.5, y - 0.5], color="black", linewidth=1.2)
        ticks.append(((first + y - 1) / 2, shape))
        y += 1
    axes.set_yticks([place for place, _ in ticks], [shape for _, shape in ticks], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(mpl.ticker.LogFormatter(minor_thresholds=(2, 0.6)))
    axes.tick_params(axis="x", which="both", labelsize=8)
    axes.set_xlabel("median time of a call, ms (log scale); black: the roofline of this device")
    axes.margins(x=0.12)
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(axis="x", alpha=0.3, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    handles = [mpl.patches.Patch(color=palette[name], label=name) for name in providers]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(note, x=0.99, ha="right", fontsize=7, color="gray")
    return figure


def draw_models(rows: list[Row], note: str) -> Figure:
    """Draw a bar for each model, from the fastest call to the 95th percentile around the median."""
    figure, axes = plt.subplots(figsize=(8, 0.42 * len(rows) + 1.3), layout="constrained")
    for y, row in enumerate(rows):
        ours = not row["provider"].startswith("transformers")
        axes.barh(y, row["ms"], 0.7, color=OURS[1] if ours else OTHERS[1])
        axes.plot([row["min_ms"], row["p95_ms"]], [y, y], color="black", linewidth=1)
        label = f"  {row['ms']:.0f} ms, {row['speed-up']:.2f}x"
        axes.text(max(row["ms"], row["p95_ms"]), y, label, va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row["provider"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(row["p95_ms"] for row in rows))
    axes.set_xlabel("median time of a call, ms; lines: fastest call to 95th percentile", fontsize=8)
    _finish(figure, axes, note)
    return figure


def draw_waterfall(rows: list[Row], note: str) -> Figure | None:
    """Draw what each technique saves over the one before; None without such rows."""
    by_name = {row["provider"]: row["ms"] for row in rows}
    steps = [name for name in by_name if name.startswith("+ ")]
    if not steps:
        return None
    names = [REFERENCE, "cdetr_fast", *steps, "optimize(cdetr_fast)"]
    labels = [REFERENCE, "one import changed", *steps, "+ linear layers packed"]
    figure, axes = plt.subplots(figsize=(8, 0.42 * (len(names) + 1) + 1.3), layout="constrained")
    before = by_name[REFERENCE]
    axes.barh(0, before, 0.7, color=OTHERS[1])
    axes.text(before, 0, f"  {before:.0f} ms", va="center", fontsize=8)
    for y, name in enumerate(names[1:], start=1):
        ms = by_name[name]
        axes.barh(y, before - ms, 0.7, left=ms, color=OURS[2] if ms <= before else OTHERS[0])
        label = f"  {ms - before:+.0f} ms"
        axes.text(max(before, ms), y, label, va="center", fontsize=8)
        axes.plot([ms, ms], [y - 0.35, y + 1.35], color="gray", linewidth=0.8)
        before = ms
    axes.barh(len(names), before, 0.7, color=OURS[0])
    share = by_name[REFERENCE] / before
    axes.text(before, len(names), f"  {before:.0f} ms, {share:.2f}x", va="center", fontsize=8)
    labels.append("optimize(model)")
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18 * max(by_name[name] for name in names))
    axes.set_xlabel("median time of a call, ms", fontsize=8)
    _finish(figure, axes, note)
    return figure


def draw_growth(rows: list[Row], palette: dict[str, str], note: str) -> Figure:
    """Draw time and memory over the values: a row for each work, both scales logarithmic."""
    axis = rows[0]["axis"]
    works = list(dict.fromkeys(row["work"] for row in rows))
    measures = {"images/s": "images per second"} if axis == "workers" else _MEASURES
    figure, grid = plt.subplots(
        len(works), len(measures), figsize=(4.8 * len(measures), 3.4 * len(works)),
        layout="constrained", squeeze=False,
    )  # fmt: skip
    panels = dict(zip(itertools.product(works, measures), grid.flat, strict=True))
    for (work, key), panel in panels.items():
        for name, provider, own in growth.series(rows):
            known = [row for row in own if "ms" in row]
            if name != work or not known:
                continue
            values, figures = [r["value"] for r in known], [r[key] for r in known]
            law = growth.fitted(values, figures) if min(figures) > 0 else None
            label = f"{provider}: {law}" if law else provider
            panel.plot(values, figures, "o-", color=palette[provider], markersize=3, label=label)
        panel.set_xscale("log")
        panel.set_yscale("log")
        low, high = panel.dataLim.intervaly
        if 0 < low <= high < float("inf"):
            panel.set_ylim(low / 2, high * 2)  # so that what does not grow looks so
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter(
            lambda tick, _: f"{tick:g}" if f"{tick:e}"[0] in "236" else ""
        )
        ticks = sorted({row["value"] for row in rows if row["work"] == work})
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
        panel.set_xticks([], minor=True)
        panel.tick_params(axis="y", which="both", labelsize=8)
        panel.set_xlabel(growth.UNITS[axis], fontsize=8)
        panel.set_title(f"{work}: {measures[key]}", loc="left", fontsize=9)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=7, frameon=False)
    figure.suptitle(note, x=0.99, ha="right", fontsize=7, color="gray")
    return figure


def _finish(figure: Figure, axes: Any, note: str) -> None:
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(note, x=0.99, ha="right", fontsize=7, color="gray")


def model_pictures(name: str, rows: list[Row], note: str) -> dict[str, Figure]:
    """Return the pictures of rows of `model`."""
    pictures = {"models": draw_models(rows, note), "waterfall": draw_waterfall(rows, note)}
    return {f"{name}_{kind}": figure for kind, figure in pictures.items() if figure}


def growth_pictures(name: str, rows: list[Row], note: str) -> dict[str, Figure]:
    """Return a picture for each axis of `growth`."""
    axes = dict.fromkeys(row["axis"] for row in rows)
    palette = colours(sorted({row["provider"] for row in rows}))
    return {
        name if len(axes) == 1 else f"{name}_{axis}": draw_growth(
            [row for row in rows if row["axis"] == axis], palette, note
        )
        for axis in axes
    }


def operator_pictures(rows: list[Row], note: str) -> dict[str, Figure]:
    """Return a picture for each operator, dtype and mode of microbenchmarks."""
    palette = colours(sorted({row["provider"] for row in rows}))
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["dtype"], row["mode"]), []).append(row)
    return {
        re.sub(r"\W+", "-", " ".join(key)): draw(group, palette, ", ".join(key), note)
        for key, group in groups.items()
    }


def main(arguments: list[str] | None = None) -> int:
    """Draw the results of a file; return 1 if it has none."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("output/plots"))
    options = parser.parse_args(arguments)
    mpl.use("Agg")
    file = results.load(options.results)
    environment, rows = file.environment, file.rows
    if isinstance(rows, dict):  # of gpu_check
        rows = rows.get("microbenchmarks", [])
    rows = [row for row in rows if "ms" in row]
    device = environment.get("device") or results.machine(environment)
    note = f"{device}, torch {environment['torch']}, {environment['date']}"
    if not rows:
        print(f"{options.results}: no times of microbenchmarks or models", file=sys.stderr)
        return 1
    benchmark = rows[0].get("benchmark")
    makers = {"model": model_pictures, "growth": growth_pictures}
    if benchmark in makers:
        pictures = makers[benchmark](file.name, rows, note)
    else:
        pictures = operator_pictures(rows, note)
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, figure in pictures.items():
        path = options.folder / f"{name}.png"
        figure.savefig(path, dpi=110 if benchmark in makers else 150)
        plt.close(figure)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
