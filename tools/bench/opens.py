"""Shuffled small files, all cached: with no request for an open, and with opens, by readers and workers.

`warm-epochs` has two readers and the mount's own choice; here both ways of opening are measured, each
with one reader and with four, against the same files on ext4; and two workers against one.
"""

from __future__ import annotations

from pathlib import Path

from tools.bench import lakes, readers
from tools.bench.figures import Figure, Target, alternate, progress
from tools.bench.settings import Settings, drop_page_cache
from tools.mounted import Mounted

NAME = "opens"
FILES = 10_000
FILE_BYTES = 110_000
FOLDER_FILES = 1000
NO_OPEN, WITH_OPENS = "--profile=dataset", "--profile=checkpoint"


def measure(settings: Settings) -> list[Figure]:
    keys = lakes.keys_in_folders(settings.scaled(FILES, least=4), FOLDER_FILES)
    objects = dict.fromkeys(keys, FILE_BYTES)
    with settings.directory(NAME) as path, lakes.seaweed(path / "server") as endpoint:
        progress(f"{NAME}: making {len(keys):,} files of {FILE_BYTES:,} bytes, twice")
        lakes.fill(endpoint, objects)
        lakes.write_tree(path / "plain", objects)
        plain, figures = path / "plain", []
        with settings.mounted(endpoint, ["--dram=0", NO_OPEN]) as mount:
            for processes, dropped, least in ((1, False, 0.8), (4, False, 0.8), (4, True, 0.6)):
                target = Target(at_least=least)
                figures.append(
                    _over_plain(settings, mount, plain, keys, "no-open", processes, dropped, target)
                )
        with settings.mounted(endpoint, ["--dram=0", WITH_OPENS]) as mount:
            for processes, least in ((1, 0.15), (4, 0.2)):
                target = Target(at_least=least)
                figures.append(_over_plain(settings, mount, plain, keys, "opened", processes, False, target))
        options = ["--dram=0", WITH_OPENS]
        with (
            settings.mounted(endpoint, [*options, "--workers=2"]) as two,
            settings.mounted(endpoint, [*options, "--workers=1"]) as one,
        ):
            figures.append(_two_workers(settings, two, one, keys))
    return figures


def epoch(side: Path, keys: list[str], processes: int, seed: int) -> float:
    """Return files per second of one epoch, in an order of its own."""
    shares = readers.shuffled_shares(lakes.paths_below(side, keys), processes, seed)
    return len(keys) / readers.timed(readers.prepare_files, shares, len(keys) * FILE_BYTES)


def _over_plain(
    settings: Settings,
    mount: Mounted,
    plain: Path,
    keys: list[str],
    how: str,
    processes: int,
    dropped: bool,
    target: Target,
) -> Figure:
    def measured(side: Path, seed: int) -> float:
        if dropped:
            drop_page_cache()
        return epoch(side, keys, processes, seed)

    name = f"{how}-{processes}-readers" + ("-dropped" if dropped else "")
    for side in (mount.directory, plain):
        epoch(side, keys, processes, seed=-1)
    before = mount.status()["reads"]["requests"]
    ours, baseline = alternate(
        lambda number: measured(mount.directory, number),
        lambda number: measured(plain, number),
        settings.rounds,
        name,
    )
    after = mount.status()["reads"]["requests"]
    return Figure(
        name=name,
        what=f"shuffled epochs of {len(keys):,} files of {FILE_BYTES:,} bytes, {processes} processes,"
        f" {how}, page cache {'dropped' if dropped else 'warm'}",
        unit="files/s",
        ours=ours,
        target=target,
        baseline_name="the same files on the file system of the cache",
        baseline=baseline,
        notes={
            f"{kind} a file": round((after[kind] - before[kind]) / len(keys) / settings.rounds, 3)
            for kind in ("requests", "opens", "reads")
        },
    )


def _two_workers(settings: Settings, two: Mounted, one: Mounted, keys: list[str]) -> Figure:
    for mount in (two, one):
        epoch(mount.directory, keys, 4, seed=-1)
    ours, baseline = alternate(
        lambda number: epoch(two.directory, keys, 4, number),
        lambda number: epoch(one.directory, keys, 4, number),
        settings.rounds,
        "two-workers",
    )
    return Figure(
        name="two-workers",
        what=f"shuffled epochs of {len(keys):,} files with opens, 4 processes, two workers",
        unit="files/s",
        ours=ours,
        target=Target(at_least=1.4),
        baseline_name="one worker",
        baseline=baseline,
    )
