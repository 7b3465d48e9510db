"""What watching sample sets costs: warm epochs with `--read-ahead set` over the same with `none`.

Once as a training reads, out of the page cache where that has the files, and once past it, so that each
read reaches us and is told to the mover. Out of the page cache no daemon of ours is asked anything, so a
second mount without read-ahead is measured, too: what it differs from the first one is noise. The mounts
take turns epoch by epoch, and are made anew each round, in another order, for the same reason.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import ExitStack

from tools.bench import lakes, readers
from tools.bench.epoch_bytes import prepare_past_page_cache
from tools.bench.figures import Figure, Target, progress
from tools.bench.readers import Prepare
from tools.bench.settings import Settings
from tools.mounted import Mounted

NAME = "watching"
FILES = 5000
FILE_BYTES = 110_000
FOLDER_FILES = 500
PROCESSES = 2
PASSES = 8  # Epochs of a round: one of fewer is over before it can be timed,
PAST_PASSES = 2  # and past the page cache each takes longer.
SHARE_MIN = 0.97
SET, NONE, CONTROL = "set", "none", "none again"


def measure(settings: Settings) -> list[Figure]:
    keys = lakes.keys_in_folders(settings.scaled(FILES, least=100), FOLDER_FILES)
    kept, past = _Rates(NAME), _Rates(f"{NAME}-past-page-cache")
    with settings.directory(NAME) as path, lakes.seaweed(path / "server") as endpoint:
        progress(f"{NAME}: making {len(keys):,} objects of {FILE_BYTES:,} bytes")
        lakes.fill(endpoint, dict.fromkeys(keys, FILE_BYTES))
        for number in range(settings.rounds):
            with ExitStack() as stack:
                mounts = {
                    side: stack.enter_context(settings.mounted(endpoint, [f"--read-ahead={side.split()[0]}"]))
                    for side in _in_turn(number)
                }
                for mount in mounts.values():
                    _epoch(mount, keys, readers.prepare_files, -1)
                kept.add(_round(mounts, keys, readers.prepare_files, PASSES))
                past.add(_round(mounts, keys, prepare_past_page_cache, PAST_PASSES))
                kept.epochs = past.epochs = mounts[SET].status()["sets"][0]["epoch"]
    return [
        _figure(kept, keys, "out of the page cache"),
        _figure(past, keys, "past the page cache"),
    ]


def _in_turn(number: int) -> list[str]:
    """Return the sides, another one first in each round: who fills its caches first reads slower later."""
    sides = [SET, NONE, CONTROL]
    return sides[number % 3 :] + sides[: number % 3]


class _Rates:
    """Files a second of each side, by rounds. *epochs*: which the set has seen in the last one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.epochs = 0
        self.of: dict[str, list[float]] = {SET: [], NONE: [], CONTROL: []}

    def add(self, rates: dict[str, float]) -> None:
        for side, rate in rates.items():
            self.of[side].append(rate)
        shown = ", ".join(f"{side} {rate:,.4g}" for side, rate in rates.items())
        progress(f"{self.name}: round {len(self.of[SET])}: {shown}")


def _figure(rates: _Rates, keys: Sequence[str], where: str) -> Figure:
    control = statistics.median(a / b for a, b in zip(rates.of[CONTROL], rates.of[NONE], strict=True))
    return Figure(
        name=rates.name,
        what=f"warm shuffled epochs of {len(keys):,} files of {FILE_BYTES:,} bytes,"
        f" {PROCESSES} processes, {where}",
        unit="files/s",
        ours=rates.of[SET],
        target=Target(at_least=SHARE_MIN),
        baseline_name="the same with --read-ahead none",
        baseline=rates.of[NONE],
        notes={"epochs seen": rates.epochs, "another mount with none, over the first": f"{control:.2f}"},
    )


def _round(
    mounts: dict[str, Mounted], keys: Sequence[str], prepare: Prepare, passes: int
) -> dict[str, float]:
    """Return the files a second of each mount, over *passes* epochs; which one comes first changes."""
    took_s = dict.fromkeys(mounts, 0.0)
    for seed in range(passes):
        sides = list(mounts) if seed % 2 == 0 else list(mounts)[::-1]
        for side in sides:
            took_s[side] += _epoch(mounts[side], keys, prepare, seed)
    return {side: len(keys) * passes / seconds for side, seconds in took_s.items()}


def _epoch(mount: Mounted, keys: Sequence[str], prepare: Prepare, seed: int) -> float:
    """Return the seconds of one epoch, in an order of its own."""
    shares = readers.shuffled_shares(lakes.paths_below(mount.directory, keys), PROCESSES, seed)
    return readers.timed(prepare, shares, len(keys) * FILE_BYTES)
