"""What a benchmark gives back, how rounds alternate, and how results are shown."""

from __future__ import annotations

import math
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
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
class SideCost:
    """What one side's daemons took: processor time as a median, memory as the most of any round."""

    cpu_s_per_gb: float | None  # None where no bytes are read or written.
    cpu_s: float
    rss_bytes: int
    pss_bytes: int

    def __str__(self) -> str:
        per_gb = "" if self.cpu_s_per_gb is None else f"{self.cpu_s_per_gb:.2f} CPU s/GB, "
        memory = f"RSS {self.rss_bytes / 1e6:,.0f} MB, PSS {self.pss_bytes / 1e6:,.0f} MB"
        return f"{per_gb}{self.cpu_s:.2f} CPU s, {memory}"


@dataclass(frozen=True, slots=True)
class Figure:
    """One result. *ours*, *baseline* and each of *peers* hold a value for each round, in *unit*.

    Without a baseline the target is for the median of *ours*, else for `ratio`. *over_peer* is for the ratio
    to the best of *peers*. With a *goal*, it has a row in the table that ends the report.
    """

    name: str
    what: str
    unit: str
    ours: Sequence[float]
    target: Target | None
    baseline_name: str = ""
    baseline: Sequence[float] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)
    peers: Mapping[str, Sequence[float]] = field(default_factory=dict)
    over_peer: Target | None = None
    costs: Mapping[str, SideCost] = field(default_factory=dict)
    goal: str = ""

    def __post_init__(self) -> None:
        assert self.ours, self.name
        for values in (self.baseline, *self.peers.values()):
            assert not values or len(self.ours) == len(values), self.name

    @property
    def ratio(self) -> float:
        """Return the median over the rounds of ours to the baseline of the same round; NaN without one."""
        return self._ratio_to(self.baseline)

    @property
    def best_peer(self) -> str | None:
        """Return the peer with the best median: the highest of rates, the lowest of anything else."""
        pick = max if self.unit.endswith("/s") else min
        return pick(self.peers, key=lambda name: statistics.median(self.peers[name]), default=None)

    @property
    def peer_ratio(self) -> float:
        """Return the median over the rounds of ours to the best peer of the same round; NaN without one."""
        return self._ratio_to(self.peers[self.best_peer]) if self.best_peer is not None else math.nan

    def _ratio_to(self, others: Sequence[float]) -> float:
        if not others:
            return math.nan
        return statistics.median(a / b if b else math.inf for a, b in zip(self.ours, others, strict=True))

    @property
    def is_target_met(self) -> bool | None:
        """Return whether what is asked over the baseline, or of ours alone, is so; None: nothing is."""
        if self.target is None:
            return None
        return self.target.is_met(self.ratio if self.baseline else statistics.median(self.ours))

    @property
    def is_peer_met(self) -> bool | None:
        """Return whether what is asked over the best peer is so; None: nothing is, or none was measured."""
        if self.over_peer is None or self.best_peer is None:
            return None
        return self.over_peer.is_met(self.peer_ratio)

    @property
    def is_met(self) -> bool:
        return self.is_target_met is not False and self.is_peer_met is not False

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
            "target": str(self.target) if self.target else None,
            "peers": {name: list(values) for name, values in self.peers.items()},
            "best_peer": self.best_peer,
            "peer_ratio": self.peer_ratio if self.peers else None,
            "over_peer": str(self.over_peer) if self.over_peer else None,
            "met": self.is_met,
            "costs": {name: asdict(cost) for name, cost in self.costs.items()},
            "goal": self.goal or None,
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


def machine(work: Path) -> dict[str, Any]:
    """Return what the results depend on besides the code; *work* is where the files are."""
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
        "file_system": file_system(work),
    }


def file_system(path: Path) -> str:
    """Return the type of the file system that *path* is on, from /proc/self/mounts (proc(5))."""
    rows = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    holding = [(len(where), kind) for where, kind in rows if path.is_relative_to(where)]
    return max(holding)[1] if holding else "unknown"
