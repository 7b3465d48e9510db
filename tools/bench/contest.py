"""The same work on several mounts in turns: ours, the native file system and peers, and what it cost each."""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from tools.bench.costs import Cost, Meter
from tools.bench.figures import Figure, MeasurementFailed, SideCost, Target, progress
from tools.bench.settings import Settings

OURS, NATIVE = "sluice", "native"
FAILURES = (MeasurementFailed, OSError, subprocess.SubprocessError)


class Side(Protocol):
    """A directory where work is done, and the daemons behind it."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> Literal["ours", "native", "peer"]: ...
    @property
    def directory(self) -> Path: ...
    def pids(self) -> Sequence[int]:
        """Return the daemons' processes; none for the kernel's own file systems."""

    def cache_bytes(self) -> int:
        """Return how much of the disk its cache takes; 0 without one."""

    def forget(self) -> None:
        """Empty the cache, so that what is read next is cold. Raises one of FAILURES."""

    def settle(self) -> None:
        """Return when all that was written is in the lake. Raises one of FAILURES."""


Prepare = Callable[[Side, int], None]
Work = Callable[[Side, int], float]  # Returns seconds.


@dataclass(frozen=True, slots=True)
class Task:
    """What is done in one round. *amount* is what a rate counts, in *unit*; 0: seconds are shown."""

    name: str
    what: str
    unit: str
    amount: float
    payload_bytes: int

    def value(self, took_s: float) -> float:
        return self.amount / took_s if self.amount else took_s


@dataclass(frozen=True, slots=True)
class Outcome:
    """A value and a cost for each side and round, by the side's name."""

    task: Task
    kinds: Mapping[str, str]
    values: Mapping[str, list[float]]
    costs: Mapping[str, list[Cost]]

    def figure(
        self,
        target: Target | None = None,
        over_peer: Target | None = None,
        *,
        ours: str = OURS,
        name: str = "",
        what: str = "",
        goal: str = "",
        without: Collection[str] = (),
        notes: Mapping[str, Any] | None = None,
    ) -> Figure:
        """Return the figure of the side *ours* against the native one and the peers but *without*."""
        compared = [side for side, kind in self.kinds.items() if kind == "peer" and side not in without]
        peers = {side: list(self.values[side]) for side in compared}
        shown = [ours, *peers]
        return Figure(
            name=name or self.task.name,
            what=what or self.task.what,
            unit=self.task.unit,
            ours=self.values[ours],
            target=target,
            baseline_name="the native file system",
            baseline=self.values[NATIVE],
            notes=notes or {},
            peers=peers,
            over_peer=over_peer,
            costs={side: self._cost(side) for side in shown if self.costs[side]},
            goal=goal,
        )

    def _cost(self, side: str) -> SideCost:
        costs, gb = self.costs[side], self.task.payload_bytes / 1e9
        spent_s = statistics.median(cost.cpu_s for cost in costs)
        rss_bytes = max(cost.rss_bytes for cost in costs)
        return SideCost(
            spent_s / gb if gb else None, spent_s, rss_bytes, max(cost.pss_bytes for cost in costs)
        )


def contest(
    settings: Settings, task: Task, sides: list[Side], work: Work, prepare: Prepare | None = None
) -> Outcome:
    """Have each side do *work* in each round; who begins changes from round to round.

    *prepare* comes before and is not measured. A peer that fails leaves *sides* for good and is told to
    *settings*; ours or the native one failing raises what it raised.
    """
    values: dict[str, list[float]] = {side.name: [] for side in sides}
    costs: dict[str, list[Cost]] = {side.name: [] for side in sides}

    def attempt(number: int, side: Side) -> None:
        value, cost = _round(task, side, number, work, prepare)
        values[side.name].append(value)
        costs[side.name] += [cost] if cost is not None else []

    for number in range(settings.rounds):
        first = number % len(sides)
        order = [*sides[first:], *sides[:first]]
        for_each(settings, task.name, sides, partial(attempt, number), order)
        latest = ", ".join(f"{side.name} {values[side.name][-1]:,.4g}" for side in sides)
        progress(f"{task.name}: round {number + 1} of {settings.rounds}, {task.unit}: {latest}")
    kinds = {side.name: side.kind for side in sides}
    return Outcome(task, kinds, {name: values[name] for name in kinds}, costs)


def for_each(
    settings: Settings,
    name: str,
    sides: list[Side],
    action: Callable[[Side], Any],
    order: Sequence[Side] = (),
) -> None:
    """Call *action* with each of *sides*. A peer that fails is removed from them, and it is told why."""
    for side in order or tuple(sides):
        try:
            action(side)
        except FAILURES as error:
            if side.kind != "peer":
                raise
            settings.complain(f"{name}: {side.name} failed: {error}")
            sides.remove(side)


def _round(
    task: Task, side: Side, number: int, work: Work, prepare: Prepare | None
) -> tuple[float, Cost | None]:
    if prepare is not None:
        prepare(side, number)
    pids = side.pids()
    meter = Meter(pids)
    value = task.value(work(side, number))
    return value, meter.cost() if pids else None
