"""What a benchmark gives back, how rounds alternate, and how results are shown."""

from __future__ import annotations

import math
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class MeasurementFailed(RuntimeError):
    """What was measured is not what should have been: other files, other bytes, no result."""


@dataclass(frozen=True, slots=True)
class Target:
    """What the ratio of ours to the baseline, or ours alone, is to be. One bound is given."""

    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        assert (self.at_least is None) != (self.at_most is None), self

    def is_met(self, value: float) -> bool:
        if self.at_least is not None:
            return value >= self.at_least
        assert self.at_most is not None
        return value <= self.at_most

    def __str__(self) -> str:
        return f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"


@dataclass(frozen=True, slots=True)
class Figure:
    """One result. *ours* and *baseline* hold a value for each round, in *unit*.

    Without a baseline the target is for the median of *ours*, else for `ratio`.
    """

    name: str
    what: str
    unit: str
    ours: Sequence[float]
    target: Target
    baseline_name: str = ""
    baseline: Sequence[float] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.ours, self.name
        assert not self.baseline or len(self.ours) == len(self.baseline), self.name

    @property
    def ratio(self) -> float:
        """Return the median over the rounds of ours to the baseline of the same round; NaN without one."""
        if not self.baseline:
            return math.nan
        return statistics.median(a / b for a, b in zip(self.ours, self.baseline, strict=True))

    @property
    def is_met(self) -> bool:
        return self.target.is_met(self.ratio if self.baseline else statistics.median(self.ours))

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "what": self.what,
            "unit": self.unit,
            "ours": list(self.ours),
            "ours_median": statistics.median(self.ours),
            "baseline_name": self.baseline_name or None,
            "baseline": list(self.baseline),
            "baseline_median": statistics.median(self.baseline) if self.baseline else None,
            "ratio": self.ratio if self.baseline else None,
            "target": str(self.target),
            "met": self.is_met,
            "notes": dict(self.notes),
        }


def alternate(
    ours: Callable[[int], float], baseline: Callable[[int], float], rounds: int, name: str
) -> tuple[list[float], list[float]]:
    """Call both with the round's number, *rounds* times; who begins changes. Return their values."""
    values: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        order = (0, 1) if number % 2 == 0 else (1, 0)
        for side in order:
            values[side].append((ours, baseline)[side](number))
        progress(f"{name}: round {number + 1} of {rounds}: {values[0][-1]:,.4g} to {values[1][-1]:,.4g}")
    return values


def progress(text: str) -> None:
    """Tell the person who waits. Results go to standard output, this does not."""
    print(text, file=sys.stderr, flush=True)


def table(figures: Sequence[Figure]) -> str:
    """Return the results as text, two lines each: what it is, then its numbers."""
    lines = [f"{'':2}{'sluice':>12} {'baseline':>12} {'unit':<10} {'ratio':>7} {'target':>10}  "]
    for figure in figures:
        ours = statistics.median(figure.ours)
        baseline = f"{statistics.median(figure.baseline):,.4g}" if figure.baseline else "-"
        ratio = f"{figure.ratio:.2f}" if figure.baseline else "-"
        verdict = "met" if figure.is_met else "MISSED"
        against = f" against {figure.baseline_name}" if figure.baseline_name else ""
        lines.append(f"{figure.name}: {figure.what}{against}")
        numbers = f"{ours:>12,.4g} {baseline:>12} {figure.unit:<10} {ratio:>7} {figure.target!s:>10}"
        lines.append(f"  {numbers}  {verdict}")
        lines += [f"    {name}: {value}" for name, value in figure.notes.items()]
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Return what the results depend on besides the code."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "cpu": models[0] if models else platform.machine(),
        "memory_bytes": memory_bytes,
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
