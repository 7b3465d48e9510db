"""What watching sample sets costs: warm epochs with `--read-ahead set` over the same with `none`.

Once as a training reads, out of the page cache where that has the files, and once past it, so that each
read reaches us and is told to the mover. Out of the page cache no daemon of ours is asked anything, so a
second mount without read-ahead is measured, too: what it differs from the first one is noise.

Of mounts that are filled one after the other the first is read 10 to 30 % slower later, whatever its options:
it got other pages. So in each round every side is once the first, the second and the last, on mounts
made anew, and its rate is that of all three turns. The mounts take turns epoch by epoch.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import ExitStack

from tools.bench import lakes, readers
from tools.bench.costs import cpu_s
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
PASSES = 4  # Epochs of a turn: one of fewer is over before it can be timed,
PAST_PASSES = 2  # and past the page cache each takes longer.
SHARE_MIN = 0.97
SET, NONE, CONTROL = SIDES = ("set", "none", "none again")


def measure(settings: Settings) -> list[Figure]:
    keys = lakes.keys_in_folders(settings.scaled(FILES, least=100), FOLDER_FILES)
    kept, past = _Rounds(NAME), _Rounds(f"{NAME}-past-page-cache")
    with settings.directory(NAME) as path, lakes.seaweed(path / "server") as endpoint:
        progress(f"{NAME}: making {len(keys):,} objects of {FILE_BYTES:,} bytes")
        lakes.fill(endpoint, dict.fromkeys(keys, FILE_BYTES))
        for _ in range(settings.rounds):
            for first in range(len(SIDES)):
                with ExitStack() as stack:
                    mounts = {
                        side: stack.enter_context(
                            settings.mounted(endpoint, [f"--read-ahead={side.split()[0]}"])
                        )
                        for side in SIDES[first:] + SIDES[:first]
                    }
                    for mount in mounts.values():
                        _epoch(mount, keys, readers.prepare_files, -1)
                    kept.turn(mounts, keys, readers.prepare_files, PASSES)
                    past.turn(mounts, keys, prepare_past_page_cache, PAST_PASSES)
                    kept.epochs = past.epochs = mounts[SET].status()["sets"][0]["epoch"]
            kept.end_round()
            past.end_round()
    return [
        _figure(kept, keys, "out of the page cache"),
        _figure(past, keys, "past the page cache"),
    ]


class _Rounds:
    """Of each side, by rounds: files a second, and microseconds of the daemons' processor time a file.

    *epochs*: which the set has seen in the last turn.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.epochs = 0
        self.rates: dict[str, list[float]] = {side: [] for side in SIDES}
        self.cpu_us: dict[str, list[float]] = {side: [] for side in SIDES}
        self._begin_round()

    def _begin_round(self) -> None:
        self._files = 0
        self._took_s = dict.fromkeys(SIDES, 0.0)
        self._cpu_s = dict.fromkeys(SIDES, 0.0)

    def turn(self, mounts: dict[str, Mounted], keys: Sequence[str], prepare: Prepare, passes: int) -> None:
        """Read *passes* epochs through each of *mounts*; which one comes first changes."""
        daemons = {
            side: [pid for pids in mount.pids().values() for pid in pids] for side, mount in mounts.items()
        }
        for seed in range(passes):
            for side in list(mounts) if seed % 2 == 0 else list(mounts)[::-1]:
                before_s = sum(map(cpu_s, daemons[side]))
                self._took_s[side] += _epoch(mounts[side], keys, prepare, seed)
                self._cpu_s[side] += sum(map(cpu_s, daemons[side])) - before_s
        self._files += passes * len(keys)

    def end_round(self) -> None:
        for side in SIDES:
            self.rates[side].append(self._files / self._took_s[side])
            self.cpu_us[side].append(1e6 * self._cpu_s[side] / self._files)
        shown = ", ".join(f"{side} {self.rates[side][-1]:,.4g}" for side in SIDES)
        progress(f"{self.name}: round {len(self.rates[SET])}: {shown}")
        self._begin_round()


def _figure(rounds: _Rounds, keys: Sequence[str], where: str) -> Figure:
    rates = rounds.rates
    control = statistics.median(a / b for a, b in zip(rates[CONTROL], rates[NONE], strict=True))
    return Figure(
        name=rounds.name,
        what=f"warm shuffled epochs of {len(keys):,} files of {FILE_BYTES:,} bytes,"
        f" {PROCESSES} processes, {where}",
        unit="files/s",
        ours=rates[SET],
        target=Target(at_least=SHARE_MIN),
        baseline_name="the same with --read-ahead none",
        baseline=rates[NONE],
        notes={
            "epochs seen": rounds.epochs,
            "another mount with none, over the first": f"{control:.2f}",
            "the daemons' processor time, us a file": ", ".join(
                f"{side} {statistics.median(spent):.0f}" for side, spent in rounds.cpu_us.items()
            ),
        },
    )


def _epoch(mount: Mounted, keys: Sequence[str], prepare: Prepare, seed: int) -> float:
    """Return the seconds of one epoch, in an order of its own."""
    shares = readers.shuffled_shares(lakes.paths_below(mount.directory, keys), PROCESSES, seed)
    return readers.timed(prepare, shares, len(keys) * FILE_BYTES)
