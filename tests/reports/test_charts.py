"""Charts of any numbers are finite drawings inside their frame."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.html import Page

from cdetr_fast.reports.charts import Line, bar_chart, line_chart

NUMBERS = st.one_of(st.none(), st.floats(-1e6, 1e6), st.just(float("nan")), st.just(float("inf")))
POINTS = st.lists(st.tuples(st.integers(0, 10**6), NUMBERS), max_size=8)


@given(st.lists(POINTS, min_size=1, max_size=3), st.booleans())
def test_any_numbers(lines, log):
    page = Page(line_chart([Line("<b>&", points) for points in lines], "x", "y", log=log))
    for path in page.of("path"):
        places = re.findall(r"(-?[\d.]+) (-?[\d.]+)", path["d"])
        assert len(places) == len(re.findall("[ML]", path["d"])) > 0
        assert all(-1 <= float(x) <= 481 and -1 <= float(y) <= 291 for x, y in places)
    assert "nan" not in str(page.elements)
    assert "inf" not in str(page.elements)
    assert all(text == "<b>&" for text in page.texts.get("li", []))


def test_places_and_ticks():
    page = Page(line_chart([Line("a", [(0, 0.0), (5, 0.5), (10, 1.0)])], "x", "y", (0, 10), (0, 1)))
    assert page.of("path")[0]["d"] == "M66.0 246.0L263.0 129.0L460.0 12.0"
    ticks = [text for text in page.texts["text"] if re.fullmatch(r"[\d.]+", text)]
    assert ticks == ["0", "2", "4", "6", "8", "10", "0", "0.2", "0.4", "0.6", "0.8", "1"]
    log = Page(line_chart([Line("a", [(0, 0.3), (1, 40.0)])], "x", "y", log=True))
    assert {"0.2", "0.5", "1", "10", "50"} <= set(log.texts["text"])


def test_a_gap_interrupts_a_line():
    points = [(0, 1.0), (1, None), (2, 2.0), (3, 3.0), (4, float("nan"))]
    (path,) = Page(line_chart([Line("a", points)], "x", "y")).of("path")
    assert re.sub("[^ML]", "", path["d"]) == "MML"


def test_long_lines_are_thinned_out():
    (path,) = Page(line_chart([Line("a", [(i, i) for i in range(10**5)])], "x", "y")).of("path")
    assert 300 < len(re.findall("[ML]", path["d"])) <= 602
    assert path["d"].endswith("460.0 12.0")  # the last point stays


@pytest.mark.parametrize("bars", [[], [("a", 0.0)]])
def test_nothing_to_draw(bars):
    assert "svg" not in Page(bar_chart(bars, "x", "y")).tags
    assert "svg" not in Page(line_chart([Line("a", [])], "x", "y")).tags


@given(st.lists(st.floats(0, 1e7), min_size=1, max_size=20))
@example([5e-324])
def test_bars_are_as_high_as_their_values(values):
    page = Page(bar_chart([(str(i), v) for i, v in enumerate(values)], "x", "y"))
    heights = [float(bar["height"]) for bar in page.of("rect")]
    if max(values) > 0:
        assert max(heights) <= 234.01
        for height, value in zip(heights, values, strict=True):
            assert height == pytest.approx(value / max(values) * max(heights), abs=0.2)
