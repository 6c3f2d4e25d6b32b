"""Curves of `benchmarks.convergence`, and its table in docs/convergence.md.

python -m benchmarks.convergence.plot benchmarks/results/cpu_convergence_scenes.json --docs
python -m benchmarks.convergence.plot benchmarks/results/cpu_convergence_bccd.json --docs
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import results
from benchmarks.report.pages import ROOT, markdown, write_tables

DOCS = ROOT / "docs"
TITLES = {
    "attention": "cross-attention",
    "start": "initial weights and class prior",
    "head": "a new class head on a checkpoint",
}
COLOURS = ("#08519c", "#d95f0e", "#969696")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw AP over epochs, a panel for each comparison."""
    comparisons = list(dict.fromkeys(row["comparison"] for row in rows))
    figure = Figure(figsize=(4.6 * len(comparisons), 3.6), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(comparisons), squeeze=False)[0]
    for axes, comparison in zip(panels, comparisons, strict=True):
        arms = [row for row in rows if row["comparison"] == comparison]
        for row, colour in zip(arms, COLOURS, strict=False):
            points = [(0, 0.0)] if comparison != "head" else []
            points += [(one["epoch"], one["AP"] or 0.0) for one in row["curve"]]
            marks = {"marker": "o", "markersize": 3, "color": colour}
            axes.plot(*zip(*points, strict=True), label=row["arm"], **marks)
        axes.set(title=TITLES[comparison], xlabel="epoch", ylabel="AP")
        axes.set_ylim(0, max(0.05, 1.1 * max(one["AP"] or 0 for r in arms for one in r["curve"])))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def table(rows: list[dict[str, Any]]) -> str:
    """Return epochs and minutes to each AP, in Markdown."""
    levels = [key.removeprefix("epochs to ") for key in rows[0] if key.startswith("epochs to ")]

    def line(row: dict[str, Any]) -> list[str]:
        cells = [f"{TITLES[row['comparison']]}: {row['arm']}", f"{row['ms']:.0f} ms"]
        cells.append(f"{row['first class loss']:.2f}")
        for level in levels:
            epoch, minutes = row[f"epochs to {level}"], row[f"minutes to {level}"]
            never = f"not within {row['epochs']} epochs"
            cells.append(never if epoch is None else f"epoch {epoch}, {minutes:.1f} min")
        return [*cells, f"{row['AP']:.3f} (epoch {row['epochs']})"]

    header = ["", "a step", "first class loss", *(f"AP {level}" for level in levels)]
    return markdown([*header, "AP at the end"], map(line, rows))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--picture", type=Path, help="PNG file; beside the results if not given")
    parser.add_argument("--docs", action="store_true", help="write into docs/convergence.md")
    options = parser.parse_args(arguments)
    file = results.load(options.results)
    picture = options.picture or options.results.with_suffix(".png")
    if options.docs:
        mark = options.results.stem.removeprefix("cpu_").removesuffix("_scenes")
        picture = DOCS / f"{mark}.png"
        environment = file.environment
        note = (
            f"`{environment['command']}` ({options.results.name}): {environment['processor']}, "
            f"{environment['threads']} thread, torch {environment['torch']}, transformers "
            f"{environment['transformers']}."
        )
        write_tables(DOCS / "convergence.md", {mark: f"{table(file.rows)}\n\n{note}"})
    else:
        print(table(file.rows))
    draw(file.rows, picture)
    print(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
