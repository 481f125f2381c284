"""Plots as inline SVG: no script, no font and no colour of their own, so that the page's style reaches them.

Classes: `s0`, `s1`, ... are series, `axis` and `grid` lines, `text` labels, and layers have their kind's; a heat map's
cells take their colour from the custom property `--v`, 0 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

WIDTH, HEIGHT = 460, 260
"""Of a plot: half of the page, so that two stand side by side and one fills a phone."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 10, 30, 46


def short_number(value: float) -> str:
    """A tick's label; multiples of 1,024 in k."""
    if value >= 1024 and value % 1024 == 0:
        return f"{value / 1024:g}k"
    return f"{value:g}"


@dataclass(frozen=True)
class Axis:
    """One axis of a plot.

    Attributes:
        label: its name, with the unit; empty where the ticks say it.
        low, high: its range.
        log: whether it is logarithmic, to base 2 in its ticks.
        number: how its ticks are written.
    """

    label: str
    low: float
    high: float
    log: bool = False
    number: Callable[[float], str] = short_number

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
    title: str,
    x: Axis,
    y: Axis,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    dots: bool = False,
    first: int = 0,
) -> str:
    """Lines, with a legend.

    Args:
        title: read out by screen readers.
        x, y: axes.
        series: points by name.
        dots: mark the points.
        first: class of the first series.
    """
    parts = _frame(x, y)
    for index, (name, points) in enumerate(series.items(), first):
        places = [(_across(x.place(a)), _up(y.place(b))) for a, b in points]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        parts.append(
            f'<polyline class="line s{index}" points="{path}"><title>{escape(name)}</title></polyline>'
        )
        if dots:
            parts += [f'<circle class="dot s{index}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in places]
        at = _LEFT + 8 + 120 * (index - first)
        parts.append(f'<line class="line s{index}" x1="{at}" y1="10" x2="{at + 22}" y2="10"/>')
        parts.append(_text(at + 28, 14, name, "start"))
    return _svg(title, WIDTH, HEIGHT, parts)


def bar_plot(title: str, y: Axis, bars: Sequence[tuple[str, float | None]]) -> str:
    """A bar per layer, upwards or downwards from zero, above a strip of the layers' kinds.

    Args:
        title: read out by screen readers.
        y: its axis, zero within.
        bars: kind and value of every layer; None draws no bar.
    """
    parts = _frame(None, y)
    step = (WIDTH - _LEFT - _RIGHT) / max(1, len(bars))
    skip, zero = -(-len(bars) // 16), _up(y.place(0.0))
    for layer, (kind, value) in enumerate(bars):
        left = _LEFT + step * layer
        parts.append(_rect(kind, left + 0.06 * step, _up(0) + 4, 0.88 * step, 6, f"layer {layer}: {kind}"))
        if value is not None:
            end = _up(y.place(value))
            name = f"layer {layer}: {value:.4g}"
            parts.append(
                _rect("bar", left + 0.15 * step, min(end, zero), 0.7 * step, max(1.0, abs(zero - end)), name)
            )
        if layer % skip == 0:
            parts.append(_text(left + step / 2, _up(0) + 24, str(layer)))
    parts.append(f'<line class="axis" x1="{_LEFT}" y1="{zero:.1f}" x2="{WIDTH - _RIGHT}" y2="{zero:.1f}"/>')
    parts.append(_text(_LEFT + (WIDTH - _LEFT - _RIGHT) / 2, HEIGHT - 6, "layer"))
    return _svg(title, WIDTH, HEIGHT, parts)


def arc_map(title: str, layers: Sequence[Mapping[str, Any]]) -> str:
    """The layers in a row, with an arc from every source to the layers that read it.

    Args:
        title: read out by screen readers.
        layers: `name`, `kind` and `source` (a number as text, or empty) of each.
    """
    step = min(44.0, 960 / max(1, len(layers)))
    reach = max([i - int(x["source"]) for i, x in enumerate(layers) if _reads(x)], default=0)
    top = 10 + 17 * math.sqrt(reach) if reach else 4.0
    parts = []
    for index, layer in enumerate(layers):
        middle = step * (index + 0.5)
        if _reads(layer):
            start = step * (int(layer["source"]) + 0.5)
            peak = top - 34 * math.sqrt(index - int(layer["source"]))
            parts.append(
                f'<path class="arc" d="M{start:.1f} {top:.1f}Q{(start + middle) / 2:.1f} {peak:.1f} '
                f'{middle:.1f} {top:.1f}"/>'
            )
        source = f" from {layer['source']}" if layer["source"] else ""
        parts.append(
            _rect(
                layer["kind"], step * index + 1, top, step - 2, 26, f"layer {index}: {layer['kind']}{source}"
            )
        )
        parts.append(_text(middle, top + 17, layer["name"], kind=f"name on-{layer['kind']}"))
        parts.append(_text(middle, top + 40, str(index), kind="index"))
    return _svg(title, step * len(layers), top + 46, parts)


def _reads(layer: Mapping[str, Any]) -> bool:
    return bool(layer["source"])


def heat_map(
    title: str, columns: Sequence[str], rows: Sequence[str], cells: Sequence[Sequence[float | None]]
) -> str:
    """Shares between 0 and 1, a number in every cell.

    Args:
        title: read out by screen readers.
        columns, rows: names.
        cells: row by row; None leaves a cell empty.
    """
    left, top, wide, high = 42, 4, 58, 28
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


def _rect(kind: str, x: float, y: float, width: float, height: float, name: str) -> str:
    return (
        f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="2">'
        f"<title>{escape(name)}</title></rect>"
    )


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
        parts.append(_text(_LEFT - 6, at + 4, y.number(value), "end"))
    if x is not None:
        for value in x.ticks():
            at = _across(x.place(value))
            parts.append(_text(at, _up(0) + 18, x.number(value)))
        middle = _LEFT + (WIDTH - _LEFT - _RIGHT) / 2
        parts.append(_text(middle, HEIGHT - 6, x.label))
    if y.label:
        parts.append(f'<g transform="translate(12 {_up(0.5)}) rotate(-90)">{_text(0, 0, y.label)}</g>')
    parts.append(f'<line class="axis" x1="{_LEFT}" y1="{_up(0)}" x2="{WIDTH - _RIGHT}" y2="{_up(0)}"/>')
    return parts


def _across(share: float) -> float:
    return _LEFT + share * (WIDTH - _LEFT - _RIGHT)


def _up(share: float) -> float:
    return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)
