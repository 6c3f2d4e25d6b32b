"""Charts as SVG that follows the page's colours, light and dark, with their values as tooltips."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

_WIDTH, _HEIGHT = 480, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 20, 12, 44
_MOST_MARKERS = 60
_MOST_POINTS = 600
_SMALLEST_RANGE = 1e-300  # of an axis: less has no fifth, and no power of ten below it
COLOURS = 12
"""Number of colours of lines in the style sheet."""


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: For the legend.
        points: x and y; a y that is None or not finite interrupts the line.
        style: Class of the style sheet; "" takes the next colour.
    """

    name: str
    points: Sequence[tuple[float, float | None]]
    style: str = ""


def line_chart(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    log: bool = False,
) -> Markup:
    """Draw lines over common axes, with a legend below.

    Args:
        lines: At least one; those without a point are left out.
        x_label: Below the axis.
        y_label: Beside the axis.
        x_range: Ends of the axis; None fits the points.
        y_range: Likewise.
        log: Whether y is logarithmic; what is not above 0 interrupts a line.

    Returns:
        A figure; a note if there is nothing to draw.
    """
    drawn: list[tuple[Line, list[list[tuple[float, float]]]]] = []
    for line in lines:
        if parts := _parts(line.points, log):
            drawn.append((line, parts))
    if not drawn:
        return Markup('<p class="none">Nothing to draw yet.</p>')
    xs = [x for _, parts in drawn for part in parts for x, _ in part]
    ys = [y for _, parts in drawn for part in parts for _, y in part]
    x_ticks, (x0, x1) = _axis(x_range or (min(xs), max(xs)), x_range is not None)
    if log:
        y_ticks, (y0, y1) = _log_axis(min(ys), max(ys))
    else:
        y_ticks, (y0, y1) = _axis(y_range or (min(0.0, *ys), max(ys)), y_range is not None)

    def place(x: float, y: float) -> tuple[float, float]:
        y, low, high = (math.log10(v) for v in (y, y0, y1)) if log else (y, y0, y1)
        return (
            _LEFT + (x - x0) / (x1 - x0) * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - (y - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM),
        )

    shapes = [_frame(x_label, y_label)]
    for tick in x_ticks:
        x, _ = place(tick, y0)
        shapes.append(_tick(x, _HEIGHT - _BOTTOM, f"{tick:g}", vertical=True))
    for tick in y_ticks:
        _, y = place(x0, tick)
        shapes.append(_tick(_LEFT, y, f"{tick:g}", vertical=False))
    legend = []
    for i, (line, parts) in enumerate(drawn):
        style = line.style or f"s{i % COLOURS}"
        legend.append(Markup('<li class="{}"><i></i>{}</li>').format(style, line.name))
        markers = sum(map(len, parts)) <= _MOST_MARKERS
        path = ""
        for part in parts:
            places = [place(x, y) for x, y in part]
            path += "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
            for (x, y), (left, top) in zip(part, places, strict=True):
                if markers:
                    dot = '<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="2.5"><title>{}</title>'
                    title = f"{line.name}: {y:.4g} at {x:g}"
                    shapes.append(Markup(dot + "</circle>").format(style, left, top, title))
        stroke = '<path class="{}" d="{}"><title>{}</title></path>'
        shapes.append(Markup(stroke).format(style, path, line.name))
    key = Markup('<ul class="legend">{}</ul>').format(Markup("").join(legend))
    return Markup("{}{}").format(_svg(shapes, f"{y_label} over {x_label}"), key)


def bar_chart(bars: Sequence[tuple[str, float]], x_label: str, y_label: str) -> Markup:
    """Draw a bar for each name and value (a histogram).

    Args:
        bars: Up to twenty, with values from 0.
        x_label: Below the axis.
        y_label: Beside the axis.
    """
    highest = max((value for _, value in bars), default=0)
    if highest <= 0:
        return Markup('<p class="none">Nothing to draw yet.</p>')
    ticks, (_, top) = _axis((0, highest), exact=False)
    area = _HEIGHT - _TOP - _BOTTOM
    step = (_WIDTH - _LEFT - _RIGHT) / len(bars)
    shapes = [_frame(x_label, y_label)]
    for tick in ticks:
        shapes.append(_tick(_LEFT, _HEIGHT - _BOTTOM - tick / top * area, f"{tick:g}", False))
    for i, (name, value) in enumerate(bars):
        height = value / top * area
        left = _LEFT + i * step
        bar = '<rect class="bar" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}">'
        sizes = (left + 1, _HEIGHT - _BOTTOM - height, step - 2, height)
        title = f"{name}: {value:g}"
        shapes.append(Markup(bar + "<title>{}</title></rect>").format(*sizes, title))
        shapes.append(_text(left + step / 2, _HEIGHT - _BOTTOM + 15, name, "middle"))
    return _svg(shapes, f"{y_label} by {x_label}")


def _parts(
    points: Sequence[tuple[float, float | None]], log: bool
) -> list[list[tuple[float, float]]]:
    """Return the uninterrupted parts of a line, thinned out to what a screen can show."""
    stride = -(-len(points) // _MOST_POINTS)
    parts: list[list[tuple[float, float]]] = [[]]
    for i, (x, y) in enumerate(points):
        if y is None or not math.isfinite(y) or (log and y <= 0):
            if parts[-1]:
                parts.append([])
        elif i % stride == 0 or i == len(points) - 1:
            parts[-1].append((float(x), float(y)))
    return [part for part in parts if part]


def _axis(
    ends: tuple[float, float], exact: bool, wanted: int = 5
) -> tuple[list[float], tuple[float, float]]:
    """Return round ticks, and the ends of the axis: at ticks unless they are exact."""
    low, high = ends
    if high - low < _SMALLEST_RANGE:
        high = low + (abs(low) if abs(low) >= _SMALLEST_RANGE else 1.0)
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    if not exact:
        low, high = math.floor(low / step) * step, math.ceil(high / step - 1e-9) * step
    first = math.ceil(low / step - 1e-9)
    ticks = [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]
    return ticks, (low, high)


def _log_axis(low: float, high: float) -> tuple[list[float], tuple[float, float]]:
    """Return ticks at 1, 2 and 5 times powers of ten (powers alone over many decades)."""
    if high <= low:
        low, high = low / 2, high * 2
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(decades) <= 4 else (1,)
    marks = [float(f"{m}e{decade}") for decade in decades for m in factors]
    low = max((mark for mark in marks if mark <= low), default=low)
    high = min((mark for mark in marks if mark >= high), default=high)
    return [mark for mark in marks if low <= mark <= high], (low, high)


def _svg(shapes: Sequence[Markup], label: str) -> Markup:
    head = '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>'
    return Markup(head).format(_WIDTH, _HEIGHT, label, Markup("").join(shapes))


def _frame(x_label: str, y_label: str) -> Markup:
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    turned = '<text class="label" text-anchor="middle" transform="translate(13 {}) rotate(-90)">'
    return Markup('{}<text class="label" text-anchor="middle" x="{}" y="{}">{}</text>').format(
        Markup(turned + "{}</text>").format(middle, y_label),
        (_LEFT + _WIDTH - _RIGHT) / 2,
        _HEIGHT - 8,
        x_label,
    )


def _tick(x: float, y: float, text: str, vertical: bool) -> Markup:
    grid = '<line class="grid" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>{}'
    if vertical:
        return Markup(grid).format(x, _TOP, x, y, _text(x, y + 15, text, "middle"))
    return Markup(grid).format(x, y, _WIDTH - _RIGHT, y, _text(x - 6, y + 4, text, "end"))


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        x, y, anchor, text
    )
