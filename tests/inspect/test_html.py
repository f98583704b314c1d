"""Pages: all text is escaped, nothing is loaded, and charts show the values that they were given."""

import math
import re
from html.parser import HTMLParser

import pytest

from t5like.inspect import charts, html
from t5like.inspect.charts import Series


class Elements(HTMLParser):
    """The elements of a document with their attributes, the tags that are open at its end, and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.found, self.open, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self.open += [tag] * (tag not in html.VOID)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


EVIL = "</style><script>alert('x')</script>\" onload=\"x \u202e\x1b[2J"


def test_text_from_outside_is_text_wherever_it_stands():
    plot = charts.line_plot(EVIL, [Series(EVIL, [1, 2], [1, 2], True), Series("b", [1], [1])], x=EVIL, y=EVIL)
    bars = [charts.histogram(EVIL, [0, 1], [3], x=EVIL, y=EVIL), charts.shares(EVIL, {EVIL: 1.0})]
    parts = [
        html.table([EVIL], [[EVIL]]),
        html.facts([(EVIL, EVIL)]),
        html.notice("bad", EVIL),
        html.preformatted(EVIL),
    ]
    page = html.page(EVIL, [(EVIL, [EVIL, plot, *bars, *parts, html.details(EVIL, EVIL)])] * 4)
    document = Elements(page)
    assert document.open == [] and page.startswith("<!doctype html>\n")
    assert {"script", "img", "link", "iframe", "object", "base"} & {tag for tag, _ in document.found} == set()
    assert {name for _, attributes in document.found for name in attributes} & {"onload", "src"} == set()
    assert "\\u202e\\u001b[2J" in document.text and "\u202e" not in page and "\x1b" not in page
    assert page.count("<style>") == page.count("</style>") == 1


def test_a_page_forbids_its_browser_to_load_anything():
    [policy] = [
        attributes["content"]
        for _, attributes in Elements(html.page("a", [])).found
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert not re.search(r"url\(|@import|https?:", html.STYLE)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1234567, "1,234,567"), (0.123456, "0.1235"), (1234.5, "1,234"), (math.nan, "nan"), (None, ""), (True, "True")],
)
def test_numbers_are_short_in_a_table(value, shown):
    assert Elements(html.table(["a"], [[value]])).text == f"a{shown}"


def points_of(figure: str) -> list[list[tuple[float, float]]]:
    lines = re.findall(r'<polyline points="([^"]*)"', figure)
    return [[tuple(map(float, point.split(","))) for point in line.split()] for line in lines]


def test_a_line_plot_maps_values_to_places_and_leaves_gaps():
    ys = [0.0, 10.0, None, math.nan, 5.0, 0.0]
    [first, second] = points_of(charts.line_plot("t", [Series("a", range(6), ys)], x="x", y="y"))
    left, right, top, bottom = charts.LEFT, charts.WIDTH - charts.RIGHT, charts.TOP, charts.HEIGHT - charts.BOTTOM
    assert first[0] == (left, bottom) and first[1][1] == top and len(first) == 2
    assert second == [(pytest.approx(left + 0.8 * (right - left), abs=0.1), (top + bottom) / 2), (right, bottom)]


def test_a_long_series_keeps_its_spike_and_its_ends():
    ys = [1.0] * 10_000
    ys[4321] = 99.0
    kept = charts.thinned(list(enumerate(ys)))
    assert len(kept) <= charts.MOST_POINTS + 2 and (4321, 99.0) in kept
    assert kept[0] == (0, 1.0) and kept[-1] == (9_999, 1.0)


def test_logarithmic_axes_leave_out_what_has_no_logarithm():
    figure = charts.line_plot("t", [Series("a", [0, 1, 10, 100], [5, 0, 1, 100])], x="x", y="y", log_x=True, log_y=True)
    [line] = points_of(figure)
    assert len(line) == 2 and line[0][0] == charts.LEFT
    assert "No values." in charts.line_plot("t", [Series("a", [0], [1])], x="x", y="y", log_x=True)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (3.02, 3.09), (-5, 700), (1e-9, 2e-9), (0, 9e12)])
def test_ticks_are_few_round_and_inside(low, high):
    ticks = charts.Scale(low, high, 0, 100).ticks
    assert 2 <= len(ticks) <= 6 and all(low - 1e-9 <= tick <= high * (1 + 1e-9) for tick in ticks)
    assert len({charts.tick_label(tick) for tick in ticks}) == len(ticks)


def test_bars_and_shares_are_in_proportion():
    figure = charts.histogram("t", [0, 1, 2, 4], [1, 0, 4], x="x", y="y")
    heights = [float(value) for value in re.findall(r'<rect[^>]* height="([\d.]+)"', figure)]
    widths = [float(value) for value in re.findall(r'<rect[^>]* width="([\d.]+)"', figure)]
    assert heights[1] == pytest.approx(4 * heights[0], abs=0.2) and widths[1] > 1.9 * widths[0]
    shares = charts.shares("t", {"a": 3.0, "b": 1.0})
    assert re.findall(r"flex: ([\d.]+)", shares) == ["0.75000", "0.25000"] and "a 75.0%" in shares
