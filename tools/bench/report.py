"""The results for people: a table in text, the table of goals that ends it, and a page with plots."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from tools import svg
from tools.bench.figures import Figure, Target

_WORDS = {True: "met", False: "MISSED", None: ""}


def text(figures: Sequence[Figure], complaints: Sequence[str]) -> str:
    """Return all results, what could not be measured, and the goals."""
    parts = [table(figures)]
    if complaints:
        parts.append("\n".join(["not measured:", *(f"  {line}" for line in complaints)]))
    if goals := goals_table(figures):
        parts.append(goals)
    return "\n\n".join(parts)


def table(figures: Sequence[Figure]) -> str:
    """Return for each result what it is, its numbers, the peers' and what it cost."""
    lines = [f"{'':2}{'sluice':>12} {'baseline':>12} {'unit':<10} {'ratio':>7} {'target':>10}  "]
    for figure in figures:
        lines += _lines(figure)
    return "\n".join(lines)


def _lines(figure: Figure) -> list[str]:
    ours = statistics.median(figure.ours)
    baseline = f"{statistics.median(figure.baseline):,.4g}" if figure.baseline else "-"
    against = f" against {figure.baseline_name}" if figure.baseline_name else ""
    ratio, target = _ratio(figure.ratio), _target(figure.target)
    numbers = f"{ours:>12,.4g} {baseline:>12} {figure.unit:<10} {ratio:>7} {target:>10}"
    lines = [
        f"{figure.name}: {figure.what}{against}",
        f"  {numbers}  {_WORDS[figure.is_target_met]}".rstrip(),
    ]
    if len(figure.ours) > 1:
        lines.append(f"    least to most: {_spread(figure.ours)}, baseline {_spread(figure.baseline)}")
    lines += [
        f"    {peer}: {statistics.median(values):,.4g} ({_spread(values)})"
        for peer, values in figure.peers.items()
    ]
    if figure.best_peer is not None:
        verdict = _WORDS[figure.is_peer_met]
        wanted = f", target {figure.over_peer}  {verdict}" if figure.over_peer else ""
        lines.append(f"    over {figure.best_peer}, the best peer: {figure.peer_ratio:.2f}{wanted}")
    lines += [f"    daemons of {side}: {cost}" for side, cost in figure.costs.items()]
    return lines + [f"    {name}: {value}" for name, value in figure.notes.items()]


def goals_table(figures: Sequence[Figure]) -> str:
    """Return a row for each figure with a goal: its ratios, what they are to be, and whether they are."""
    rows = [goal_row(figure) for figure in figures if figure.goal]
    if not rows:
        return ""
    heads = ["work", "over native", "target", "", "over best peer", "target", ""]
    columns = [heads, *rows]
    widths = [max(len(row[place]) for row in columns) for place in range(len(heads))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in columns
    )


def goal_row(figure: Figure) -> list[str]:
    """Return the cells of a figure's row. Where no ratio is asked, ours alone stands in its place."""
    alone = _ratio(figure.ratio) if figure.baseline else f"{statistics.median(figure.ours):.3g}"
    peer = f"{figure.peer_ratio:.2f} ({figure.best_peer})" if figure.best_peer is not None else "-"
    return [
        figure.goal,
        alone,
        _target(figure.target),
        _WORDS[figure.is_target_met],
        peer if figure.over_peer else "-",
        _target(figure.over_peer),
        _WORDS[figure.is_peer_met],
    ]


def page(
    figures: Sequence[Figure],
    complaints: Sequence[str],
    machine: Mapping[str, Any],
    commands: Mapping[str, str],
) -> str:
    """Return an HTML page: the goals, a drawing of each figure, and how each side was mounted."""
    about = ", ".join(f"{name} {value}" for name, value in machine.items())
    body = [f"<p>{escape(about)}</p>", _html_goals(figures)]
    if complaints:
        body.append("<h2>Not measured</h2>" + "".join(f"<p>{escape(line)}</p>" for line in complaints))
    body += [_drawing(figure) for figure in figures]
    if commands:
        shown = "".join(
            f"<p>{escape(name)}<br><code>{escape(text)}</code></p>" for name, text in commands.items()
        )
        body.append(f"<h2>Command lines</h2>{shown}")
    return svg.page("sluice bench", "".join(body))


def _html_goals(figures: Sequence[Figure]) -> str:
    heads = ("work", "over native", "target", "", "over best peer", "target", "")
    rows = ["".join(f"<th>{head}</th>" for head in heads)]
    for figure in figures:
        if figure.goal:
            cells = "".join(f"<td>{escape(cell)}</td>" for cell in goal_row(figure))
            rows.append(cells.replace("<td>MISSED", '<td class="missed">MISSED'))
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>" if len(rows) > 1 else ""


def _drawing(figure: Figure) -> str:
    series = {"sluice": figure.ours, **({figure.baseline_name: figure.baseline} if figure.baseline else {})}
    drawn = svg.bars(
        f"{figure.name}, {figure.unit}", {**series, **figure.peers}, lambda value: f"{value:,.4g}"
    )
    costs = "".join(
        f"<br>daemons of {escape(side)}: {escape(str(cost))}" for side, cost in figure.costs.items()
    )
    return f"<p>{escape(figure.what)}{costs}</p>{drawn}"


def _ratio(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _target(target: Target | None) -> str:
    return str(target) if target else "-"


def _spread(values: Sequence[float]) -> str:
    return f"{min(values):,.4g} to {max(values):,.4g}" if values else "-"
