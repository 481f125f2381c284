"""Plots as inline SVG: no script, no font and no colour of their own, so that the page's style reaches them.

Classes: `s0`, `s1`, ... are series, `axis` and `grid` lines, `text` labels; a heat map's cells take their colour from
the custom property `--v`, 0 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 28, 44


@dataclass(frozen=True)
class Axis:
    """One axis of a plot.

    Attributes:
        label: its name, with the unit.
        low, high: its range.
        log: whether it is logarithmic, to base 2 in its ticks.
    """

    label: str
    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """Where a value lies, 0 to 1."""
        if self.log:
            value, low, high = (math.log(max(v, 1e-12)) for v in (value, self.low, self.high))
        else:
            low, high = self.low, self.high
        return min(1.0, max(0.0, (value - low) / ((high - low) or 1.0)))

    def ticks(self, most: int = 7) -> list[float]:
        """Round values within the range."""
        if self.log:
            first, last = math.ceil(math.log2(self.low) - 1e-9), math.floor(math.log2(self.high) + 1e-9)
            step = max(1, -(-(last - first + 1) // most))
            return [2.0**i for i in range(first, last + 1, step)]
        span = (self.high - self.low) or 1.0
        raw = span / 5
        unit = 10.0 ** math.floor(math.log10(raw))
        step_size = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw)
        first = math.ceil(self.low / step_size - 1e-9)
        return [i * step_size for i in range(first, math.floor(self.high / step_size + 1e-9) + 1)]


def span_of(values: Sequence[float], zero: bool = False) -> tuple[float, float]:
    """A range that holds the values with a little air; from zero if asked for."""
    low, high = min(values), max(values)
    air = 0.06 * ((high - low) or abs(high) or 1.0)
    return (0.0 if zero else low - air), high + air


def line_plot(
    title: str, x: Axis, y: Axis, series: Mapping[str, Sequence[tuple[float, float]]], dots: bool = False
) -> str:
    """Lines, with a legend.

    Args:
        title: read out by screen readers.
        x, y: axes.
        series: points by name.
        dots: mark the points.
    """
    parts = _frame(x, y)
    for index, (name, points) in enumerate(series.items()):
        places = [(_across(x.place(a)), _up(y.place(b))) for a, b in points]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        parts.append(
            f'<polyline class="line s{index}" points="{path}"><title>{escape(name)}</title></polyline>'
        )
        if dots:
            parts += [f'<circle class="dot s{index}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in places]
        at = _LEFT + 12 + 150 * index
        parts.append(f'<line class="line s{index}" x1="{at}" y1="10" x2="{at + 22}" y2="10"/>')
        parts.append(_text(at + 28, 14, name, "start"))
    return _svg(title, WIDTH, HEIGHT, parts)


def bar_plot(title: str, y: Axis, bars: dict[str, float]) -> str:
    """A bar per name."""
    parts = _frame(None, y)
    step = (WIDTH - _LEFT - _RIGHT) / max(1, len(bars))
    skip = -(-len(bars) // 32)
    for index, (name, value) in enumerate(bars.items()):
        left, top = _LEFT + step * index, _up(y.place(value))
        parts.append(
            f'<rect class="bar s0" x="{left + 0.15 * step:.1f}" y="{top:.1f}" width="{0.7 * step:.1f}" '
            f'height="{_up(0) - top:.1f}"><title>{escape(name)}: {value:.4g}</title></rect>'
        )
        if index % skip == 0:
            parts.append(_text(left + step / 2, _up(0) + 16, name))
    middle = _LEFT + (WIDTH - _LEFT - _RIGHT) / 2
    parts.append(_text(middle, HEIGHT - 8, "layer"))
    return _svg(title, WIDTH, HEIGHT, parts)


def heat_map(
    title: str, columns: Sequence[str], rows: Sequence[str], cells: Sequence[Sequence[float | None]]
) -> str:
    """Shares between 0 and 1, a number in every cell.

    Args:
        title: read out by screen readers.
        columns, rows: names.
        cells: row by row; None leaves a cell empty.
    """
    left, top, wide, high = 64, 8, 84, 30
    width, height = left + wide * len(columns) + 8, top + high * len(rows) + 28
    parts = []
    for r, (name, line) in enumerate(zip(rows, cells, strict=True)):
        y = top + high * r
        parts.append(_text(left - 8, y + high / 2 + 4, name, "end"))
        for c, value in enumerate(line):
            if value is None:
                continue
            x = left + wide * c
            parts.append(
                f'<rect class="heat" style="--v:{value:.3f}" x="{x + 1}" y="{y + 1}" width="{wide - 2}" '
                f'height="{high - 2}" rx="3"/>'
                + _text(x + wide / 2, y + high / 2 + 4, f"{value:.0%}", kind="number")
            )
    for c, name in enumerate(columns):
        parts.append(_text(left + wide * c + wide / 2, top + high * len(rows) + 18, name))
    return _svg(title, width, height, parts)


def _svg(title: str, width: float, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg role="img" viewBox="0 0 {width:g} {height:g}" style="max-width:{width:g}px">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str = "middle", kind: str = "text") -> str:
    return f'<text class="{kind}" text-anchor="{anchor}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _frame(x: Axis | None, y: Axis) -> list[str]:
    parts = []
    for value in y.ticks():
        at = _up(y.place(value))
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{at:.1f}" x2="{WIDTH - _RIGHT}" y2="{at:.1f}"/>')
        parts.append(_text(_LEFT - 6, at + 4, _number(value), "end"))
    if x is not None:
        for value in x.ticks():
            at = _across(x.place(value))
            parts.append(_text(at, _up(0) + 16, _number(value)))
        middle = _LEFT + (WIDTH - _LEFT - _RIGHT) / 2
        parts.append(_text(middle, HEIGHT - 8, x.label))
    parts.append(f'<g transform="translate(13 {_up(0.5)}) rotate(-90)">{_text(0, 0, y.label)}</g>')
    parts.append(f'<line class="axis" x1="{_LEFT}" y1="{_up(0)}" x2="{WIDTH - _RIGHT}" y2="{_up(0)}"/>')
    return parts


def _across(share: float) -> float:
    return _LEFT + share * (WIDTH - _LEFT - _RIGHT)


def _up(share: float) -> float:
    return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)


def _number(value: float) -> str:
    if value >= 1024 and value % 1024 == 0:
        return f"{value / 1024:g}k"
    return f"{value:g}"
