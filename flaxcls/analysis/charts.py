"""Charts as SVG for pages: colours are the page's own (`page.css`), in light and in dark.

Text is 13 px in a drawing of 400 px, so that it can be read where a phone shows it at 343 px.
What is pointed at is named by the `<title>` of its mark.
"""

import io
import itertools
import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 400, 262
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 24, 12, 46

# Of the page in light; in dark it makes them brighter.
ACCENT, WRONG = (29, 95, 174), (180, 68, 28)

# Cells of a large confusion matrix are a few pixels: single mistakes have to show.
_FAINTEST = 0.25


class Line(NamedTuple):
    """A curve, or points.

    Attributes:
      name: for the legend; none without.
      x: (N,), places that are not finite are left out.
      y: (N,).
      kind: a class of `report.css`: accent, wrong, faint.
      dashed: whether the line is.
      points: whether each value has a dot.
      joined: whether a line joins them.
      titles: of the points, shown where one is pointed at.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    kind: str = "accent"
    dashed: bool = False
    points: bool = False
    joined: bool = True
    titles: Sequence[str] = ()


class Axis(NamedTuple):
    """What stands along a side.

    Attributes:
      label: of the axis.
      low: where it begins; None: a little below the values.
      high: where it ends.
      percent: whether the values are shares.
      logarithmic: whether equal distances are equal ratios.
      whole: whether only whole numbers are written.
    """

    label: str
    low: float | None = None
    high: float | None = None
    percent: bool = False
    logarithmic: bool = False
    whole: bool = False


class Bars(NamedTuple):
    """Bars behind the curves, which stand on the lower side and fill at most a third of it.

    Attributes:
      edges: (B + 1,) on the x axis.
      values: (B,), the largest fills a third.
      titles: B.
    """

    edges: Sequence[float]
    values: Sequence[float]
    titles: Sequence[str]


def chart(lines: Sequence[Line], x: Axis, y: Axis, *, title: str, bars: Bars | None = None) -> str:
    """Returns an SVG of curves over two axes; `title` is what a screen reader says of it."""
    across = _Scale(x, _values(lines, "x"), _LEFT, WIDTH - _RIGHT)
    up = _Scale(y, _values(lines, "y"), HEIGHT - _BOTTOM, _TOP)
    parts = [*_grid(across, up, x, y)]
    if bars is not None:
        parts += _bars(bars, across)
    for line in lines:
        parts += _curve(line, across, up)
    legend = _legend([line for line in lines if line.name])
    drawing = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
        f'class="chart"><title>{escape(title)}</title>{"".join(parts)}</svg>'
    )
    return f'<div class="chart">{legend}{drawing}</div>'


def _values(lines: Sequence[Line], name: str) -> list[float]:
    return [float(v) for line in lines for v in getattr(line, name) if math.isfinite(v)]


class _Scale:
    """Turns values into pixels, and says where numbers stand."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, end: float):
        low = min(values, default=0.0) if axis.low is None else axis.low
        high = max(values, default=1.0) if axis.high is None else axis.high
        self._logarithmic = axis.logarithmic and low > 0
        if self._logarithmic:
            low, high = (low / 1.15, high * 1.15) if high < 20 * low else (low / 1.5, high * 1.5)
        else:
            room = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
            low = low - room if axis.low is None else low
            high = high + room if axis.high is None else high
        self.low, self.high, self._start, self._end = low, high, start, end
        self.ticks = (
            _logarithmic_ticks(low, high)
            if self._logarithmic
            else _ticks(low, high, 6 if end > start else 5, axis.whole)
        )

    def __call__(self, value: float) -> float:
        if self._logarithmic:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(self._start + share * (self._end - self._start), 1)


def _ticks(low: float, high: float, most: int, whole: bool) -> list[float]:
    """Round numbers from `low` to `high`, at most about `most`."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * k for k in (1, 2, 2.5, 5, 10) if power * k >= rough * 0.999)
    step = max(1.0, round(step)) if whole else step
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def _logarithmic_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
        found = [k * 10.0**d for d in decades for k in steps if low <= k * 10.0**d <= high]
        if len(found) >= 3:
            return found
    return _ticks(low, high, 4, whole=high - low > 4)


def _grid(across: _Scale, up: _Scale, x: Axis, y: Axis) -> list[str]:
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    parts = []
    for value, text in zip(up.ticks, _texts(up.ticks, y), strict=True):
        at = up(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{at + 4}" text-anchor="end">{text}</text>')
    for value, text in zip(across.ticks, _texts(across.ticks, x), strict=True):
        at = across(value)
        parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text x="{at}" y="{bottom + 18}" text-anchor="middle">{text}</text>')
    middle = (_LEFT + right) / 2
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x.label)}</text>'
    )
    return parts


def _texts(ticks: Sequence[float], axis: Axis) -> list[str]:
    """Numbers with as many decimals as tell the nearest two apart."""
    factor = 100 if axis.percent else 1
    gaps = [abs(b - a) * factor for a, b in itertools.pairwise(ticks)]
    least = min(gaps, default=1.0)
    digits = max(0, -math.floor(math.log10(least) + 1e-9)) if least > 0 else 0
    if digits and any(abs(round(t * factor, digits) - t * factor) > least / 100 for t in ticks):
        digits += 1
    if axis.logarithmic:
        return [f"{t * factor:,.10g}" + (" %" if axis.percent else "") for t in ticks]
    return [f"{t * factor:,.{digits}f}" + (" %" if axis.percent else "") for t in ticks]


def _bars(bars: Bars, across: _Scale) -> list[str]:
    bottom, most = HEIGHT - _BOTTOM, max(bars.values, default=0)
    room = (bottom - _TOP) / 3
    parts = []
    for low, high, value, title in zip(
        bars.edges[:-1], bars.edges[1:], bars.values, bars.titles, strict=True
    ):
        if value:
            left, tall = across(low), round(max(1.0, room * value / most), 1)
            parts.append(
                f'<rect class="bars" x="{left + 1}" y="{bottom - tall}" '
                f'width="{max(1.0, round(across(high) - left - 2, 1))}" height="{tall}">'
                f"<title>{escape(title)}</title></rect>"
            )
    return parts


def _curve(line: Line, across: _Scale, up: _Scale) -> list[str]:
    places: list[tuple[float, float] | None] = [
        (across(x), up(y)) if math.isfinite(x) and math.isfinite(y) else None
        for x, y in zip(line.x, line.y, strict=True)
    ]
    parts = []
    if line.joined:
        path, pen = [], "M"
        for place in places:
            if place is not None:
                path.append(f"{pen}{place[0]} {place[1]}")
            pen = "M" if place is None else "L"
        dashed = " dashed" if line.dashed else ""
        parts.append(f'<path class="line {line.kind}{dashed}" d="{"".join(path)}"/>')
    if line.points or sum(place is not None for place in places) == 1:
        titles = line.titles or [""] * len(places)
        for place, title in zip(places, titles, strict=True):
            if place is not None:
                inside = f"<title>{escape(title)}</title>" if title else ""
                parts.append(
                    f'<circle class="dot {line.kind}" cx="{place[0]}" cy="{place[1]}" r="3.5">'
                    f"{inside}</circle>"
                )
    return parts


def _legend(lines: Sequence[Line]) -> str:
    if not lines:
        return ""
    entries = "".join(
        f'<span><i class="{line.kind}{" dashed" if line.dashed else ""}"></i>'
        f"{escape(line.name)}</span>"
        for line in lines
    )
    return f'<div class="legend">{entries}</div>'


def matrix_png(confusion: np.ndarray, *, shares: bool) -> bytes:
    """Returns a confusion matrix as a PNG of a pixel a cell, transparent where nothing is.

    The diagonal is blue and mistakes are vermilion, the stronger the more, by the square root.

    Args:
      confusion: int (C, C), rows the truth.
      shares: of the row, and not counts.
    """
    strength = np.sqrt(matrix_strength(confusion, shares=shares))
    alpha = np.where(confusion > 0, _FAINTEST + (1 - _FAINTEST) * strength, 0)
    right = np.eye(len(confusion), dtype=bool)[..., None]
    pixels = np.empty((*confusion.shape, 4), np.uint8)
    pixels[..., :3] = np.where(right, ACCENT, WRONG)
    pixels[..., 3] = np.round(255 * alpha)
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def matrix_strength(confusion: np.ndarray, *, shares: bool) -> np.ndarray:
    """Returns 0..1 (C, C): the share of the row's examples, or the count over the largest one."""
    if shares:
        return confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    return confusion / max(confusion.max(), 1)
