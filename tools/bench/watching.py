"""What watching sample sets costs: warm epochs with `--read-ahead set` over the same with `none`.

Once as a training reads, out of the page cache where that has the files, and once past it, so that each
read reaches us and is told to the mover. Out of the page cache no daemon of ours is asked anything, so a
second mount without read-ahead is measured, too: what it differs from the first one is noise. The mounts
take turns epoch by epoch, for the same reason.
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
    with settings.directory(NAME) as path, lakes.seaweed(path / "server") as endpoint, ExitStack() as stack:
        progress(f"{NAME}: making {len(keys):,} objects of {FILE_BYTES:,} bytes")
        lakes.fill(endpoint, dict.fromkeys(keys, FILE_BYTES))
        mounts = {
            name: stack.enter_context(settings.mounted(endpoint, [f"--read-ahead={name.split()[0]}"]))
            for name in (SET, NONE, CONTROL)
        }
        for mount in mounts.values():
            _epoch(mount, keys, readers.prepare_files, -1)
        kept = _figure(settings, mounts, keys, NAME, readers.prepare_files, PASSES)
        name = f"{NAME}-past-page-cache"
        return [kept, _figure(settings, mounts, keys, name, prepare_past_page_cache, PAST_PASSES)]


def _figure(
    settings: Settings,
    mounts: dict[str, Mounted],
    keys: Sequence[str],
    name: str,
    prepare: Prepare,
    passes: int,
) -> Figure:
    rates: dict[str, list[float]] = {side: [] for side in mounts}
    for number in range(settings.rounds):
        took_s = _round(mounts, keys, prepare, range(number * passes, (number + 1) * passes))
        for side in mounts:
            rates[side].append(len(keys) * passes / took_s[side])
        shown_rates = ", ".join(f"{side} {values[-1]:,.4g}" for side, values in rates.items())
        progress(f"{name}: round {number + 1} of {settings.rounds}: {shown_rates}")
    control = statistics.median(a / b for a, b in zip(rates[CONTROL], rates[NONE], strict=True))
    (shown,) = mounts[SET].status()["sets"]
    where = "out of the page cache" if prepare is readers.prepare_files else "past the page cache"
    return Figure(
        name=name,
        what=f"warm shuffled epochs of {len(keys):,} files of {FILE_BYTES:,} bytes,"
        f" {PROCESSES} processes, {where}",
        unit="files/s",
        ours=rates[SET],
        target=Target(at_least=SHARE_MIN),
        baseline_name="the same with --read-ahead none",
        baseline=rates[NONE],
        notes={"epochs seen": shown["epoch"], "another mount with none, over the first": f"{control:.2f}"},
    )


def _round(
    mounts: dict[str, Mounted], keys: Sequence[str], prepare: Prepare, seeds: range
) -> dict[str, float]:
    """Return the seconds that each mount's epochs took in all; which one comes first changes."""
    took_s = dict.fromkeys(mounts, 0.0)
    for seed in seeds:
        sides = list(mounts) if seed % 2 == 0 else list(mounts)[::-1]
        for side in sides:
            took_s[side] += _epoch(mounts[side], keys, prepare, seed)
    return took_s


def _epoch(mount: Mounted, keys: Sequence[str], prepare: Prepare, seed: int) -> float:
    """Return the seconds of one epoch, in an order of its own."""
    shares = readers.shuffled_shares(lakes.paths_below(mount.directory, keys), PROCESSES, seed)
    return readers.timed(prepare, shares, len(keys) * FILE_BYTES)
