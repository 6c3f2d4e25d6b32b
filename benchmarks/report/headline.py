"""The picture at the top of the README: what the demo's checkpoint finds, and how fast.

python -m benchmarks.report.headline    # writes docs/pictures/headline.png

The bars are the rows of `benchmarks/results` that the README's table quotes. Needs matplotlib (the
extra `test`).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt

from benchmarks import results
from benchmarks.report.pages import ROOT
from benchmarks.report.tables import RESULTS
from cdetr_fast import ConditionalDetrForObjectDetection
from cdetr_fast.demo import DEMO
from cdetr_fast.demo.scenes import draw_scene

FILE = "cpu_model_resnet50_800x1066_fp32"
BARS = {
    "transformers sdpa": "transformers",
    "transformers sdpa compile default": "transformers, torch.compile",
    "cdetr_fast": "cdetr_fast, one import changed",
    "optimize(cdetr_fast)": "cdetr_fast, optimize(model)",
}
"""Providers of the results file that are shown, and what the picture calls them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report.headline")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/pictures/headline.png")
    options = parser.parse_args(arguments)

    image, _ = draw_scene(seed=308, size=(192, 240), min_objects=3, max_objects=5)
    model = ConditionalDetrForObjectDetection.from_pretrained(DEMO)
    found = model.predict(image, threshold=0.5)
    assert not isinstance(found, list)  # it is one image

    file = results.load(RESULTS / f"{FILE}.json")
    ms = {row["provider"]: row["ms"] for row in file.rows}
    environment = file.environment
    mpl.rcParams["font.size"] = 10
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 3.6), width_ratios=(1, 1.5), layout="constrained"
    )
    left.imshow(found.draw(image), interpolation="lanczos")
    left.set_axis_off()
    left.set_title("model.predict(image)", family="monospace", fontsize=10)

    labels = list(BARS.values())
    times = [ms[provider] for provider in BARS]
    colours = ["#bdbdbd", "#969696", "#6baed6", "#08519c"]
    right.barh(labels, times, color=colours)
    for row, time in enumerate(times):
        right.text(time, row, f"  {time:.0f} ms", va="center")
    right.invert_yaxis()
    right.set_xlim(0, 1.2 * max(times))
    right.set_xticks([])
    right.spines[:].set_visible(False)
    right.tick_params(left=False)
    right.set_title("ResNet-50, one image of 800x1066, fp32, the same outputs", fontsize=10)
    right.set_xlabel(
        f"{results.machine(environment)}, torch {environment['torch']}, {environment['date']}; "
        "less is better",
        fontsize=8,
        color="gray",
    )
    figure.savefig(options.output, dpi=160, facecolor="white")
    plt.close(figure)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
