"""What watching sample sets costs: warm epochs with `--read-ahead set` over the same with `none`.

Once as a training reads, out of the page cache where that has the files, and once past it, so that each
read reaches us and is told to the mover.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from tools.bench import lakes, readers
from tools.bench.epoch_bytes import prepare_past_page_cache
from tools.bench.figures import Figure, Target, alternate, progress
from tools.bench.readers import Prepare
from tools.bench.settings import Settings
from tools.mounted import Mounted

NAME = "watching"
FILES = 5000
FILE_BYTES = 110_000
FOLDER_FILES = 500
PROCESSES = 2
PASSES = 4  # A round of fewer is over before it can be timed.
SHARE_MIN = 0.97


def measure(settings: Settings) -> list[Figure]:
    keys = lakes.keys_in_folders(settings.scaled(FILES, least=100), FOLDER_FILES)
    with settings.directory(NAME) as path, lakes.seaweed(path / "server") as endpoint, ExitStack() as stack:
        progress(f"{NAME}: making {len(keys):,} objects of {FILE_BYTES:,} bytes")
        lakes.fill(endpoint, dict.fromkeys(keys, FILE_BYTES))
        mounts = {
            mode: stack.enter_context(settings.mounted(endpoint, [f"--read-ahead={mode}"]))
            for mode in ("set", "none")
        }
        for mount in mounts.values():
            _epoch(mount, keys, readers.prepare_files, -1)
        kept = _figure(settings, mounts, keys, NAME, readers.prepare_files, PASSES)
        past = _figure(settings, mounts, keys, f"{NAME}-past-page-cache", prepare_past_page_cache, 1)
        return [kept, past]


def _figure(
    settings: Settings,
    mounts: dict[str, Mounted],
    keys: Sequence[str],
    name: str,
    prepare: Prepare,
    passes: int,
) -> Figure:
    def rate(mode: str, number: int) -> float:
        took_s = sum(_epoch(mounts[mode], keys, prepare, number * passes + each) for each in range(passes))
        return len(keys) * passes / took_s

    rates = alternate(
        lambda number: rate("set", number), lambda number: rate("none", number), settings.rounds, name
    )
    (shown,) = mounts["set"].status()["sets"]
    where = "out of the page cache" if prepare is readers.prepare_files else "past the page cache"
    return Figure(
        name=name,
        what=f"warm shuffled epochs of {len(keys):,} files of {FILE_BYTES:,} bytes,"
        f" {PROCESSES} processes, {where}",
        unit="files/s",
        ours=rates[0],
        target=Target(at_least=SHARE_MIN),
        baseline_name="the same with --read-ahead none",
        baseline=rates[1],
        notes={"epochs seen": shown["epoch"]},
    )


def _epoch(mount: Mounted, keys: Sequence[str], prepare: Prepare, seed: int) -> float:
    """Return the seconds of one epoch, in an order of its own."""
    shares = readers.shuffled_shares(lakes.paths_below(mount.directory, keys), PROCESSES, seed)
    return readers.timed(prepare, shares, len(keys) * FILE_BYTES)
