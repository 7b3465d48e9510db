"""An HTML page with the simulation's results: hit rate, bytes and waiting over the cache's size."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tools import svg
from tools.option_kinds import format_size
from tools.simulate.replay import Outcome


def page(outcomes: Sequence[Outcome], title: str) -> str:
    """Return the page: hit rate and waiting time over the cache's size, a line for each policy."""
    drawings = [
        _drawing(outcomes, "hit rate", lambda one: one.hit_rate, 1.0, lambda value: f"{value:.0%}"),
        _drawing(
            outcomes,
            "bytes fetched",
            lambda one: one.fetched_bytes,
            max(one.fetched_bytes for one in outcomes),
            format_size,
        ),
        _drawing(
            outcomes,
            "readers wait, seconds in all",
            lambda one: one.wait_s,
            max(one.wait_s for one in outcomes),
            lambda value: f"{value:,.4g}",
        ),
    ]
    return svg.page(title, "".join(drawings))


def _drawing(
    outcomes: Sequence[Outcome],
    title: str,
    value_of: Callable[[Outcome], float],
    top: float,
    label: svg.Label,
) -> str:
    series: dict[str, list[tuple[float, float]]] = {one.policy: [] for one in outcomes}
    for one in sorted(outcomes, key=lambda one: one.size_bytes):
        series[one.policy].append((one.size_bytes, value_of(one)))
    return svg.lines(title, series, top, format_size, label)
