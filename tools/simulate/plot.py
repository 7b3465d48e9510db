"""An HTML page with the simulation's results as an SVG drawing: no script, nothing to load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from tools.option_kinds import format_size
from tools.simulate.replay import Outcome

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 640, 300, 70, 40, 30
_COLOURS = ("#c0392b", "#e67e22", "#8e44ad", "#2980b9", "#27ae60", "#555555")


def page(outcomes: Sequence[Outcome], title: str) -> str:
    """Return the page: hit rate and waiting time over the cache's size, a line for each policy."""
    drawings = [
        _drawing(outcomes, "hit rate", lambda one: one.hit_rate, 1.0, lambda value: f"{value:.0%}"),
        _drawing(
            outcomes,
            "bytes fetched",
            lambda one: one.fetched_bytes,
            max(one.fetched_bytes for one in outcomes),
            lambda value: format_size(int(value)),
        ),
        _drawing(
            outcomes,
            "readers wait, seconds in all",
            lambda one: one.wait_s,
            max(one.wait_s for one in outcomes),
            lambda value: f"{value:,.4g}",
        ),
    ]
    style = "body{font:14px sans-serif;margin:2em}svg{display:block;margin-bottom:2em}"
    head = f"<meta charset=utf-8><title>{escape(title)}</title><style>{style}</style>"
    body = f"<h1>{escape(title)}</h1>{''.join(drawings)}"
    return f"<!doctype html><html><head>{head}</head><body>{body}</body></html>\n"


def _drawing(
    outcomes: Sequence[Outcome],
    title: str,
    value_of: Callable[[Outcome], float],
    top: float,
    label: Callable[[float], str],
) -> str:
    sizes = sorted({one.size_bytes for one in outcomes})
    policies = list(dict.fromkeys(one.policy for one in outcomes))
    parts = [f'<text x="{_LEFT}" y="16" font-weight="bold">{escape(title)}</text>', _axes(sizes, top, label)]
    for number, policy in enumerate(policies):
        points = [
            f"{_x(one.size_bytes, sizes):.1f},{_y(value_of(one), top):.1f}"
            for one in sorted(outcomes, key=lambda one: one.size_bytes)
            if one.policy == policy
        ]
        colour = _COLOURS[number % len(_COLOURS)]
        parts.append(
            f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        parts += [
            f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in (p.split(",") for p in points)
        ]
        y = _TOP + 18 * number + 10
        parts.append(f'<text x="{_WIDTH + 20}" y="{y}" fill="{colour}">{escape(policy)}</text>')
    return f'<svg width="{_WIDTH + 130}" height="{_HEIGHT + _BOTTOM}">{"".join(parts)}</svg>'


def _axes(sizes: Sequence[int], top: float, label: Callable[[float], str]) -> str:
    parts = []
    for step in range(5):
        value = top * step / 4
        y = _y(value, top)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(label(value))}</text>')
    for size in sizes:
        x = _x(size, sizes)
        text = escape(format_size(size))
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT + 20}" text-anchor="middle">{text}</text>')
    return "".join(parts)


def _x(size_bytes: int, sizes: Sequence[int]) -> float:
    low, high = (0, sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[-1])
    return _LEFT + 20 + (size_bytes - low) / max(1, high - low) * (_WIDTH - _LEFT - 40)


def _y(value: float, top: float) -> float:
    return _HEIGHT - value / (top or 1.0) * (_HEIGHT - _TOP)
