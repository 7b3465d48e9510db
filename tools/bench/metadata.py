"""find, ls -lR and a storm of stat calls, over a hundred thousand files and over a million.

The hundred thousand are in a real server. The million are in tools/bench/list_server.py: storing them in a
real one takes ten minutes. A first pass, which lists the lake, comes before the first round.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cache.model import GIB
from tools.bench import lakes, readers
from tools.bench.contest import Side, Task, Work, contest, for_each
from tools.bench.field import Need, standing
from tools.bench.figures import Figure, MeasurementFailed, progress
from tools.bench.find import find
from tools.bench.list_server import GeneratedKeys, list_server
from tools.bench.settings import Settings

NAME = "metadata"
KEYS, FOLDER_KEYS = 100_000, 1000
KEYS_MANY = 1_000_000
STATS_SHARE = 5  # One file in so many is asked for.
STORMERS = 4
PEERS_MANY = ("juicefs", "rclone", "s3fs")  # The server of keys has no part that `weed mount` speaks to.


def measure(settings: Settings) -> list[Figure]:
    return [*_some(settings), *_many(settings)]


def _some(settings: Settings) -> list[Figure]:
    keys = lakes.keys_in_folders(settings.scaled(KEYS, least=10), FOLDER_KEYS)
    with settings.directory(NAME) as path, lakes.seaweed(path / "server") as endpoint:
        progress(f"{NAME}: making {len(keys):,} objects, and as many files")
        lakes.fill(endpoint, dict.fromkeys(keys, 0))
        touch_tree(path / "plain", keys)
        need = Need(NAME, endpoint, endpoint, path / "plain", GIB)
        with standing(settings, need) as sides:
            return _figures(settings, f"{NAME}-100k", sides, keys)


def _many(settings: Settings) -> list[Figure]:
    count = settings.scaled(KEYS_MANY, least=10)
    keys = list(GeneratedKeys(count, FOLDER_KEYS))
    with settings.directory(NAME) as path, list_server(count, FOLDER_KEYS) as endpoint:
        progress(f"{NAME}: making {count:,} files")
        touch_tree(path / "plain", keys)
        # JuiceFS keeps no chunk of an empty file, but wants a server that would store one.
        with lakes.seaweed(path / "server") as storing:
            need = Need(f"{NAME}-1m", storing, endpoint, path / "plain", GIB, peers=PEERS_MANY)
            with standing(settings, need) as sides:
                return _figures(settings, f"{NAME}-1m", sides, keys)


def touch_tree(root: Path, keys: Sequence[str]) -> None:
    """Make the same tree of empty files."""
    for folder in dict.fromkeys(os.path.dirname(key) for key in keys):
        os.makedirs(root / folder)
    for key in keys:
        os.close(os.open(f"{root}/{key}", os.O_CREAT | os.O_WRONLY))


def _figures(settings: Settings, name: str, sides: list[Side], keys: list[str]) -> list[Figure]:
    for_each(settings, f"{name}: first find", sides, lambda side: find(side.directory, len(keys)))
    stats = max(STORMERS, len(keys) // STATS_SHARE)
    works: dict[str, tuple[int, str, Work]] = {
        "find": (len(keys), "`find -type f`", lambda side, _: find(side.directory, len(keys))),
        "ls": (len(keys), "`ls -lR`", lambda side, _: list_long(side.directory, len(keys))),
        "stat": (
            stats,
            f"{stats:,} stat calls at random by {STORMERS} processes",
            lambda side, number: storm_s(side.directory, keys, stats, number),
        ),
    }
    return [
        contest(
            settings,
            Task(
                f"{name}-{verb}",
                f"{what}, {len(keys):,} files, {FOLDER_KEYS:,} a directory",
                "files/s",
                amount,
                0,
            ),
            sides,
            work,
        ).figure()
        for verb, (amount, what, work) in works.items()
    ]


def list_long(directory: Path, expected: int) -> float:
    """Return the seconds that `ls -lR` takes. Raises MeasurementFailed unless it shows *expected* files."""
    start_s, files = time.perf_counter(), 0
    with subprocess.Popen(["ls", "-lR", str(directory)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        files = sum(line.startswith(b"-") for line in process.stdout)
    if process.returncode != 0 or files != expected:
        raise MeasurementFailed(f"ls -lR ended with {process.returncode} and saw {files} of {expected} files")
    return time.perf_counter() - start_s


def storm_s(directory: Path, keys: Sequence[str], stats: int, seed: int) -> float:
    """Return the seconds that STORMERS processes take for *stats* stat calls at random."""
    shares = readers.shuffled_shares(keys, 1, seed)[0][:stats]
    paths = lakes.paths_below(directory, shares)
    return readers.timed(prepare_stats, [paths[first::STORMERS] for first in range(STORMERS)], len(paths))


def prepare_stats(paths: Sequence[str]) -> Callable[[], int]:
    """Return what asks for the attributes of each path and returns their number."""
    return lambda: sum(1 for path in paths if os.stat(path))
