"""HTML pages with SVG drawings: no script, nothing to load. Used by `sluice simulate` and `sluice bench`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from html import escape

COLOURS = ("#c0392b", "#e67e22", "#8e44ad", "#2980b9", "#27ae60", "#555555")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 640, 300, 70, 40, 30
_BAR_HEIGHT, _BAR_STEP, _BARS_LEFT, _BARS_WIDTH = 14, 22, 220, 420
_STYLE = (
    "body{font:14px sans-serif;margin:2em;max-width:60em}svg{display:block;margin-bottom:2em}"
    "table{border-collapse:collapse}td,th{padding:2px 10px;text-align:right;border-bottom:1px solid #ddd}"
    "td:first-child,th:first-child{text-align:left}.missed{color:#c0392b}"
)

Label = Callable[[float], str]


def page(title: str, body: str) -> str:
    """Return a whole page; *body* is HTML."""
    head = f"<meta charset=utf-8><title>{escape(title)}</title><style>{_STYLE}</style>"
    return f"<!doctype html><html><head>{head}</head><body><h1>{escape(title)}</h1>{body}</body></html>\n"


def lines(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    top: float,
    label_x: Label,
    label_y: Label,
) -> str:
    """Return a drawing with a line for each of *series*, points in order of x, y from 0 to *top*."""
    places = sorted({x for points in series.values() for x, _ in points})
    parts = [
        f'<text x="{_LEFT}" y="16" font-weight="bold">{escape(title)}</text>',
        _axes(places, top, label_x, label_y),
    ]
    for number, (name, points) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        drawn = [(f"{_x(x, places):.1f}", f"{_y(y, top):.1f}") for x, y in points]
        joined = " ".join(f"{x},{y}" for x, y in drawn)
        parts.append(f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in drawn]
        y = _TOP + 18 * number + 10
        parts.append(f'<text x="{_WIDTH + 20}" y="{y}" fill="{colour}">{escape(name)}</text>')
    return f'<svg width="{_WIDTH + 130}" height="{_HEIGHT + _BOTTOM}">{"".join(parts)}</svg>'


def bars(title: str, series: Mapping[str, Sequence[float]], label: Label) -> str:
    """Return a drawing with a bar for each of *series*: the median, and a line from least to most."""
    top = max((max(values) for values in series.values()), default=0.0) or 1.0
    parts = [f'<text x="0" y="16" font-weight="bold">{escape(title)}</text>']
    for number, (name, values) in enumerate(series.items()):
        parts.append(
            _bar(name, values, top, label, _TOP + number * _BAR_STEP, COLOURS[number % len(COLOURS)])
        )
    height = _TOP + len(series) * _BAR_STEP
    return f'<svg width="{_BARS_LEFT + _BARS_WIDTH + 150}" height="{height}">{"".join(parts)}</svg>'


def _bar(name: str, values: Sequence[float], top: float, label: Label, y: int, colour: str) -> str:
    def at(value: float) -> float:
        return _BARS_LEFT + value / top * _BARS_WIDTH

    median, middle = statistics.median(values), y + _BAR_HEIGHT / 2
    least, most = at(min(values)), at(max(values))
    width = max(1.0, at(median) - _BARS_LEFT)
    return (
        f'<text x="{_BARS_LEFT - 8}" y="{y + 12}" text-anchor="end">{escape(name)}</text>'
        f'<rect x="{_BARS_LEFT}" y="{y}" width="{width:.1f}" height="{_BAR_HEIGHT}" fill="{colour}"/>'
        f'<line x1="{least:.1f}" x2="{most:.1f}" y1="{middle}" y2="{middle}" stroke="#000"/>'
        f'<text x="{most + 8:.1f}" y="{y + 12}">{escape(label(median))}</text>'
    )


def _axes(places: Sequence[float], top: float, label_x: Label, label_y: Label) -> str:
    parts = []
    for step in range(5):
        value = top * step / 4
        y = _y(value, top)
        text = escape(label_y(value))
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for place in places:
        x, text = _x(place, places), escape(label_x(place))
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT + 20}" text-anchor="middle">{text}</text>')
    return "".join(parts)


def _x(place: float, places: Sequence[float]) -> float:
    low, high = (0, places[0]) if len(places) == 1 else (places[0], places[-1])
    return _LEFT + 20 + (place - low) / max(1, high - low) * (_WIDTH - _LEFT - 40)


def _y(value: float, top: float) -> float:
    return _HEIGHT - value / (top or 1.0) * (_HEIGHT - _TOP)
