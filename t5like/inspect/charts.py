"""Charts of a page (`inspect.html`): line plots, histograms and shares, as inline SVG and HTML.

Drawn here and not by matplotlib, which draws the pictures loss.png and compare.png: its SVG of one plot has 30 to 100
kB, turns text into outlines, and can't follow the light or dark setting of a page. Series differ in dash as well as in
colour.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from t5like.inspect.html import Markup, element, number

WIDTH, HEIGHT = 480, 250  # of a chart, in units of its viewBox
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 20, 36  # margins around the plotted area
COLORS = 8  # classes s0, s1, ... of `html.STYLE`
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "12 4", "1 2", "6 2 1 2 1 2")
MOST_POINTS = 400  # of a series; more are drawn as the lowest and highest of each group


class Series(NamedTuple):
    """A line of a plot.

    Attributes:
        name: in the legend.
        xs: ascending.
        ys: as many; a value that is None or not finite leaves a gap.
        zero: the vertical axis begins at 0, for values that are not negative.
        marked: whether each point has a dot, for few points.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    marked: bool = False


# ---- Charts ----


def line_plot(
    title: str,
    series: Sequence[Series],
    *,
    x: str,
    y: str,
    log_x: bool = False,
    log_y: bool = False,
    zero: bool = False,
) -> Markup:
    """Return a figure with lines, axes, and a legend if there are several series.

    Args:
        title: caption of the figure.
        series: what is drawn; more than eight repeat their colours.
        x, y: names of the axes, with units.
        log_x, log_y: logarithmic scale; a place or a value of 0 and less leaves a gap.
    """
    kept = [_finite(each, log_x, log_y) for each in series]
    points = [point for each in kept for part in each for point in part]
    if not points:
        return _figure(title, element("p", "No values.", class_="soft"))
    xs, ys = zip(*points, strict=True)
    across = Scale(min(xs), max(xs), LEFT, WIDTH - RIGHT, log=log_x)
    up = Scale(0.0 if zero else min(ys), max(ys), HEIGHT - BOTTOM, TOP, log=log_y)
    drawn = [_axes(across, up, x, y)]
    for index, (each, parts) in enumerate(zip(series, kept, strict=True)):
        drawn += [_line(part, across, up, index, each.name) for part in parts]
        if each.marked or any(len(part) == 1 for part in parts):
            dots = [point for part in parts for point in part if each.marked or len(part) == 1]
            drawn += [
                element(
                    "circle",
                    element("title", f"{each.name}: {number(value)} at {number(place)}"),
                    cx=f"{across(place):.1f}",
                    cy=f"{up(value):.1f}",
                    r=2.6,
                    class_=f"f{index % COLORS}",
                )
                for place, value in thinned(dots)
            ]
    names = [each.name for each in series]
    return _figure(title, _svg(f"{title}: {y} by {x}", drawn), _legend(names) if len(names) > 1 else "")


def histogram(title: str, edges: Sequence[float], counts: Sequence[float], *, x: str, y: str) -> Markup:
    """Return a figure with bars. `edges` has one number more than `counts`; the bars touch, and begin at 0."""
    if not any(counts):
        return _figure(title, element("p", "No values.", class_="soft"))
    across = Scale(edges[0], edges[-1], LEFT, WIDTH - RIGHT)
    up = Scale(0, max(counts), HEIGHT - BOTTOM, TOP)
    bars = [
        element(
            "rect",
            element("title", f"{number(low)} to {number(high)}: {number(count)}"),
            x=f"{across(low):.1f}",
            y=f"{up(count):.1f}",
            width=f"{max(across(high) - across(low) - 0.6, 0.4):.1f}",
            height=f"{up(0) - up(count):.1f}",
            class_="f0",
        )
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
        if count
    ]
    return _figure(title, _svg(f"{title}: {y} by {x}", [_axes(across, up, x, y), *bars]))


def shares(title: str, parts: Mapping[str, float]) -> Markup:
    """Return a figure with one bar, divided in proportion to the values, and a legend with percentages."""
    total = math.fsum(parts.values())
    if not total > 0:
        return _figure(title, element("p", "No values.", class_="soft"))
    names = [f"{name} {value / total:.1%}" for name, value in parts.items()]
    bar = [
        element("div", "", class_=f"f{index % COLORS}", style=f"flex: {value / total:.5f}", title=name)
        for index, (name, value) in enumerate(zip(names, parts.values(), strict=True))
    ]
    return _figure(
        title,
        element("div", *bar, class_="share", role="img", aria_label=", ".join(names)),
        _legend(names, dashes=False),
    )


# ---- Scales ----


class Scale:
    """Maps values to positions of a chart, on a linear or logarithmic axis with ticks at round numbers."""

    def __init__(self, low: float, high: float, start: float, end: float, *, log: bool = False):
        self._map = math.log10 if log else float
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)
        self._low, self._high, self._start, self._end = self._map(low), self._map(high), start, end
        self.ticks = _decades(self._low, self._high) if log else _round_ticks(low, high)

    def __call__(self, value: float) -> float:
        """The position of a value."""
        share = (self._map(value) - self._low) / (self._high - self._low)
        return self._start + share * (self._end - self._start)


def _round_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most `most` multiples of 1, 2 or 5 times a power of ten between two values."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(digit * power for digit in (1, 2, 5, 10) if (high - low) / (digit * power) <= most)
    return [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten between two logarithms, thinned; with few, also their multiples by 2 and 5."""
    digits = (1,) if high - low > 2 else (1, 2, 5)
    found = [
        digit * 10.0**power
        for power in range(math.floor(low), math.ceil(high) + 1)
        for digit in digits
        if low - 1e-9 <= power + math.log10(digit) <= high + 1e-9
    ]
    return found[:: math.ceil(len(found) / 6)] if len(found) > 2 else _round_ticks(10.0**low, 10.0**high)


def tick_label(value: float) -> str:
    """Return a short number: ``12k``, ``3.5M``, ``0.002``, ``1e-5``, ``1e13``."""
    if 1e4 <= abs(value) < 1e9:
        return f"{value / 1e6:.4g}M" if abs(value) >= 1e6 else f"{value / 1e3:.4g}k"
    if value and not 1e-3 <= abs(value) < 1e9:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.6g}"


# ---- Parts of a chart ----


def _finite(series: Series, log_x: bool, log_y: bool) -> list[list[tuple[float, float]]]:
    """The points of a series in parts without gaps."""
    parts: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(series.xs, series.ys, strict=True):
        if y is None or not math.isfinite(y) or (log_x and x <= 0) or (log_y and y <= 0):
            parts.append([])
        else:
            parts[-1].append((x, y))
    return [part for part in parts if part]


def thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """The points, or of a long series the lowest and the highest of each group, so that spikes stay visible."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(len(points) / (MOST_POINTS // 2))
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    ends = [(min(group, key=lambda point: point[1]), max(group, key=lambda point: point[1])) for group in groups]
    return sorted({point for pair in ends for point in pair} | {points[0], points[-1]})


def _line(part: Sequence[tuple[float, float]], across: Scale, up: Scale, index: int, name: str) -> Markup:
    places = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in thinned(part))
    dash = DASHES[index % COLORS]
    return element(
        "polyline",
        element("title", name),
        points=places,
        class_=f"series s{index % COLORS}",
        **({"stroke_dasharray": dash} if dash else {}),
    )


def _axes(across: Scale, up: Scale, x: str, y: str) -> Markup:
    """Grid lines, tick labels and names of both axes."""
    bottom = HEIGHT - BOTTOM
    parts = [element("path", class_="axis", d=f"M{LEFT} {TOP}V{bottom}H{WIDTH - RIGHT}")]
    for tick in up.ticks:
        place = f"{up(tick):.1f}"
        parts.append(element("path", class_="gridline", d=f"M{LEFT} {place}H{WIDTH - RIGHT}"))
        parts.append(element("text", tick_label(tick), x=LEFT - 6, y=place, text_anchor="end", dy="0.35em"))
    for tick in across.ticks:
        place = f"{across(tick):.1f}"
        parts.append(element("path", class_="axis", d=f"M{place} {bottom}v4"))
        # A label at the right edge ends there, so that it is not cut off.
        anchor = "end" if across(tick) > WIDTH - RIGHT - 14 else "middle"
        parts.append(element("text", tick_label(tick), x=place, y=bottom + 17, text_anchor=anchor))
    parts.append(element("text", y, x=4, y=11))
    parts.append(element("text", x, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 4, text_anchor="middle"))
    return Markup("".join(parts))


def _svg(label: str, content: object) -> Markup:
    return element("svg", content, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label)


def _figure(title: str, *content: object) -> Markup:
    return element("figure", element("figcaption", title), *content)


def _legend(names: Sequence[str], *, dashes: bool = True) -> Markup:
    items = []
    for index, name in enumerate(names):
        dash = DASHES[index % COLORS] if dashes else ""
        line = element(
            "path", class_=f"series s{index % COLORS}", d="M0 5H26", **({"stroke_dasharray": dash} if dash else {})
        )
        square = element("rect", class_=f"f{index % COLORS}", x=8, y=0, width=10, height=10)
        sign = element("svg", line if dashes else square, viewBox="0 0 26 10", aria_hidden="true")
        items.append(element("span", sign, name))
    return element("div", *items, class_="legend")
