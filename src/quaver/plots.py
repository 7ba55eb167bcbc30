"""Plots as inline SVG, drawn with the style sheet's colours so that they follow the reader's light or dark theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

import numpy as np

WIDTH, HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 14, 46
_N_BINS = 24
_FAR_LIMIT = 4

Kind = Literal["line", "bar", "histogram"]


@dataclass(frozen=True, slots=True)
class Series:
    """One named row of ``values``: heights of a line or of bars, or the sample that a histogram counts."""

    name: str
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Plot:
    """What to draw. ``labels`` name the positions of a line or of bars (their indices when empty).

    ``limit`` is drawn as a dashed line across: at a height, or for a histogram at a value; not where it is so far off
    that nothing else could be seen. Values that are not finite are left out.
    """

    kind: Kind
    title: str
    series: tuple[Series, ...]
    x_label: str = ""
    y_label: str = ""
    labels: tuple[str, ...] = ()
    limit: float | None = None


@dataclass(frozen=True, slots=True)
class _Frame:
    """The data rectangle and where it lies on the page."""

    x_low: float
    x_high: float
    y_ticks: tuple[float, ...]

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)


def svg(plot: Plot) -> str:
    """``plot`` as an ``<svg>`` element: the same bytes for the same plot."""
    if not any(math.isfinite(value) for series in plot.series for value in series.values):
        return '<p class="empty">no finite values to plot</p>'
    draw = {"line": _line, "bar": _bar, "histogram": _histogram}[plot.kind]
    frame, marks = draw(plot)
    middle = f'x="{(WIDTH + _LEFT) / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle"'
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(plot.title)}">',
        *_y_axis(frame, plot.y_label),
        *marks,
        *_limit(plot, frame),
        f'<text class="axis" {middle}>{escape(plot.x_label)}</text>',
        "</svg>",
    ]
    return "".join(parts)


def legend(plot: Plot) -> str:
    """The names of ``plot``'s series beside their colours; empty for a single unnamed one."""
    if len(plot.series) == 1:
        return ""
    items = (f'<span class="key k{i}">{escape(series.name)}</span>' for i, series in enumerate(plot.series))
    return f'<div class="legend">{"".join(items)}</div>'


def ticks(low: float, high: float, count: int = 5) -> tuple[float, ...]:
    """About ``count`` round numbers that span ``low`` to ``high``."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(round(index * step, 12) for index in range(first, last + 1))


def _near_limit(plot: Plot, values: Sequence[float] | np.ndarray) -> list[float]:
    """The limit, if there is one worth drawing beside ``values``."""
    if plot.limit is None or not math.isfinite(plot.limit):
        return []
    return [plot.limit] if abs(plot.limit) <= _FAR_LIMIT * max(abs(value) for value in values) else []


def _heights(plot: Plot, *, from_zero: bool) -> tuple[float, ...]:
    """The ticks of the vertical axis."""
    values = [value for series in plot.series for value in series.values if math.isfinite(value)]
    values += _near_limit(plot, values)
    low, high = min(values), max(values)
    if from_zero or 0 <= low < 0.5 * high:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low if from_zero else low - 0.5, high + 0.5
    return ticks(low, high)


def _line(plot: Plot) -> tuple[_Frame, list[str]]:
    n_points = max(len(series.values) for series in plot.series)
    frame = _Frame(-0.3, max(n_points - 0.7, 0.7), _heights(plot, from_zero=False))
    marks = _x_labels(plot, frame, n_points)
    for index, series in enumerate(plot.series):
        points = [(frame.x(i), frame.y(v), v, i) for i, v in enumerate(series.values) if math.isfinite(v)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in points)
        marks.append(f'<polyline class="line s{index}" points="{path}"/>')
        if n_points <= 40:
            marks += [
                f'<circle class="dot f{index}" cx="{x:.1f}" cy="{y:.1f}" r="3.2">{_tip(plot, series, i, v)}</circle>'
                for x, y, v, i in points
            ]
    return frame, marks


def _bar(plot: Plot) -> tuple[_Frame, list[str]]:
    n_places, n_series = max(len(series.values) for series in plot.series), len(plot.series)
    frame = _Frame(-0.5, n_places - 0.5, _heights(plot, from_zero=True))
    width = 0.78 / n_series
    marks = _x_labels(plot, frame, n_places)
    for index, series in enumerate(plot.series):
        for i, value in enumerate(series.values):
            if math.isfinite(value):
                left = i - 0.39 + index * width
                marks.append(
                    _rectangle(frame, (left, left + width * 0.94), value, f"f{index}", _tip(plot, series, i, value))
                )
    return frame, marks


def _histogram(plot: Plot) -> tuple[_Frame, list[str]]:
    samples = [np.array([v for v in series.values if math.isfinite(v)]) for series in plot.series]
    every = np.concatenate(samples)
    every = np.append(every, _near_limit(plot, every))
    low, high = float(every.min()), float(every.max())
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    marks_x = ticks(low, high, 6)
    edges = np.linspace(marks_x[0], marks_x[-1], _N_BINS + 1)
    counts = [np.histogram(sample, edges)[0] for sample in samples]
    frame = _Frame(marks_x[0], marks_x[-1], ticks(0, max(1, *(int(count.max()) for count in counts))))
    marks = [_x_text(frame.x(mark), format_tick(mark)) for mark in marks_x]
    for index, (series, count) in enumerate(zip(plot.series, counts, strict=True)):
        for i, height in enumerate(count):
            if height:
                span = f"{format_tick(edges[i])} to {format_tick(edges[i + 1])}"
                tip = f"<title>{escape(series.name)}: {int(height)} in {span}</title>"
                marks.append(_rectangle(frame, (edges[i], edges[i + 1]), float(height), f"f{index} see", tip))
    return frame, marks


def _rectangle(frame: _Frame, span: tuple[float, float], value: float, style: str, tip: str) -> str:
    left, right = frame.x(span[0]), frame.x(span[1])
    top, bottom = sorted((frame.y(value), frame.y(0.0)))
    size = f'x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{max(bottom - top, 0.8):.1f}"'
    return f'<rect class="{style}" {size} rx="1.5">{tip}</rect>'


def _y_axis(frame: _Frame, label: str) -> list[str]:
    parts = []
    for mark in frame.y_ticks:
        y = frame.y(mark)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{format_tick(mark)}</text>')
    middle = (HEIGHT - _BOTTOM + _TOP) / 2
    turned = f'transform="translate(15 {middle:.0f}) rotate(-90)" text-anchor="middle"'
    return [*parts, f'<text class="axis" {turned}>{escape(label)}</text>']


def _x_labels(plot: Plot, frame: _Frame, n_places: int) -> list[str]:
    labels: Sequence[str] = plot.labels or [str(i) for i in range(n_places)]
    # About 7 px a letter and some air, lest labels run into each other.
    room = (WIDTH - _LEFT - _RIGHT) / (7.5 * max(len(label) for label in labels) + 10)
    step = max(1, math.ceil(n_places / room))
    return [_x_text(frame.x(i), label) for i, label in enumerate(labels[:n_places]) if i % step == 0]


def _x_text(x: float, label: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{HEIGHT - _BOTTOM + 17}" text-anchor="middle">{escape(label)}</text>'


def _limit(plot: Plot, frame: _Frame) -> list[str]:
    values = [value for series in plot.series for value in series.values if math.isfinite(value)]
    if plot.limit is None or not _near_limit(plot, values):
        return []
    tip = f"<title>limit {format_tick(plot.limit)}</title>"
    if plot.kind == "histogram":
        x = frame.x(plot.limit)
        return [f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}">{tip}</line>']
    y = frame.y(plot.limit)
    return [f'<line class="limit" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}">{tip}</line>']


def _tip(plot: Plot, series: Series, index: int, value: float) -> str:
    place = plot.labels[index] if index < len(plot.labels) else str(index)
    return f"<title>{escape(series.name)}, {escape(place)}: {value:.4g}</title>"


def format_tick(value: float) -> str:
    """A tick's number, short."""
    if value != 0 and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return scientific(value, 2)
    return f"{value:,.6g}"


def scientific(value: float, n_digits: int) -> str:
    """``value`` as a mantissa of at most ``n_digits`` digits and a power of ten: 3.2e-7."""
    mantissa, _, exponent = f"{value:.{n_digits - 1}e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
