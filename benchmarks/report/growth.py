"""Growth: power laws fitted to the rows of `python -m benchmarks growth`, and their tables."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.report.pages import markdown
from benchmarks.results import Row

UNITS = {
    "size": "side of a square image, pixels",
    "batch": "images in a batch",
    "queries": "queries",
    "targets": "targets per image",
    "threads": "threads",
    "workers": "worker processes",
}
"""Name and unit of the values of each axis."""
FEWEST = 3
"""Values that a law needs to be fitted to."""
CLOSE = 0.1
"""Largest relative distance of a figure from the law."""


class Law(NamedTuple):
    """A figure as a power of a value: figure ~ value ** exponent.

    Attributes:
        exponent: By least squares of the logarithms.
        low: Smallest value that it holds for.
        high: Largest value.
        distance: Largest relative distance of a figure from it.
    """

    exponent: float
    low: float
    high: float
    distance: float

    def __str__(self) -> str:
        return f"{self.exponent:.2f} ({self.low:g} to {self.high:g})"


def fitted(values: Sequence[float], figures: Sequence[float]) -> Law | None:
    """Fit a power law to the largest values, and to as many as it comes close to.

    What does not grow (the start of a call, the weights) hides the law at small values, so those
    are left out first, until the law comes within `CLOSE` of the rest or `FEWEST` are left.

    Returns:
        The law; None if there are fewer values.
    """
    law = None
    for start in range(len(values) - FEWEST + 1):
        x, y = np.log(values[start:]), np.log(figures[start:])
        slope, height = np.polyfit(x, y, 1)
        distance = float(np.expm1(np.abs(y - (slope * x + height)).max()))
        law = Law(float(slope), values[start], values[-1], distance)
        if distance <= CLOSE:
            break
    return law


def series(rows: list[Row]) -> Iterator[tuple[str, str, list[Row]]]:
    """Yield work, provider and rows, in the order of their first rows."""
    keys = dict.fromkeys((row["work"], row["provider"]) for row in rows)
    for work, provider in keys:
        yield work, provider, [r for r in rows if (r["work"], r["provider"]) == (work, provider)]


def table(rows: list[Row]) -> str:
    """Return a line for each work and provider: ends of the axis, and exponents."""
    if rows[0]["axis"] == "workers":
        return workers_table(rows)
    axis = rows[0]["axis"]
    lines: list[tuple[str, ...]] = []
    for work, provider, own in series(rows):
        known = [row for row in own if "ms" in row]
        if not known:
            lines.append((work, provider, own[0]["not measured"], "", "", "", ""))
            continue
        first, last = known[0], known[-1]
        ends = f"{first['value']} to {last['value']}"
        if reason := next((row["not measured"] for row in own if "not measured" in row), None):
            ends += f"; then {reason}"
        cells = []
        for key, least in (("ms", 3), ("peak MiB", 1)):
            law = fitted([r["value"] for r in known], [max(r[key], 1e-3) for r in known])
            ends_of = f"{_digits(first[key], least)} to {_digits(last[key], least)}"
            cells += [ends_of, str(law or "-")]
        lines.append((work, provider, ends, *cells))
    header = ["work", "model", axis, "ms", "its exponent", "peak MiB", "its exponent"]
    return markdown(header, lines)


def workers_table(rows: list[Row]) -> str:
    """Return a line for each service: rate, and memory of a process."""
    header = ["model", "workers", "images/s", "RSS", "PSS", "PSS without files", "of its own"]
    names = ("RSS", "PSS", "anonymous PSS", "own")

    def line(row: Row) -> tuple[Any, ...]:
        if "ms" not in row:
            return row["provider"], row["value"], row["not measured"], "", "", "", ""
        memory = (f"{row[f'{name} MiB']:.0f} MiB" for name in names)
        return row["provider"], row["value"], f"{row['images/s']:.2f}", *memory

    return f"{_without_workers(rows[0]['shape'])}\n\n{markdown(header, map(line, rows))}"


def _digits(figure: float, least: int) -> str:
    """Write a figure with that many significant digits, and all before the point."""
    places = max(0, least - 1 - math.floor(math.log10(max(figure, 1e-9))))
    return f"{figure:,.{places}f}"


def _without_workers(shape: str) -> str:
    return shape.partition(", workers")[0]
