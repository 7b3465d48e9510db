"""Reading what is in no cache: small files, and one large file, of a lake that is 20 ms away.

Each connection to the lake is capped, as those to object stores are. Every round begins with a new
mount, an empty cache and a listing, which are not counted; ext4 begins with its page cache dropped.
"""

from __future__ import annotations

import os

from cache.model import GIB, MIB
from tools.bench import lakes, readers
from tools.bench.contest import Side, Task, Work, contest
from tools.bench.field import Need, standing
from tools.bench.figures import Figure, progress
from tools.bench.settings import Settings

NAME = "cold"
FILES = 2000
FILE_BYTES = 110_000
FOLDER_FILES = 200
LOADERS = 4
OBJECT_BYTES = GIB
KEY = "large.bin"
LATENCY_S = 0.020
CONNECTION_BYTES_PER_S = 85_000_000


def measure(settings: Settings) -> list[Figure]:
    keys = lakes.keys_in_folders(settings.scaled(FILES, least=LOADERS), FOLDER_FILES)
    small = dict.fromkeys(keys, FILE_BYTES)
    large = {KEY: settings.scaled(OBJECT_BYTES, least=16 * MIB)}
    return [_measure(settings, f"{NAME}-small", small), _measure(settings, f"{NAME}-large", large)]


def _measure(settings: Settings, name: str, objects: dict[str, int]) -> Figure:
    total_bytes = sum(objects.values())
    with settings.directory(name) as path, lakes.seaweed(path / "server") as direct:
        progress(f"{name}: making {len(objects):,} objects of {total_bytes / MIB:,.0f} MiB in all, twice")
        lakes.fill(direct, objects)
        lakes.write_tree(path / "plain", objects)
        with lakes.slowed(direct, LATENCY_S, CONNECTION_BYTES_PER_S) as (slow, proxy):
            need = Need(name, direct, slow, path / "plain", 2 * total_bytes + 256 * MIB)
            with standing(settings, need) as sides:
                outcome = contest(settings, _task(name, objects), sides, _reading(objects), _make_cold)
    return outcome.figure(notes={"the lake": proxy})


def _task(name: str, objects: dict[str, int]) -> Task:
    total_bytes, count = sum(objects.values()), len(objects)
    where = f"cold, {LATENCY_S * 1000:.0f} ms to first byte"
    if count == 1:
        return Task(
            name, f"a file of {total_bytes / MIB:,.0f} MiB, {where}", "MiB/s", total_bytes / MIB, total_bytes
        )
    what = f"{count:,} files of {FILE_BYTES:,} bytes, shuffled, {LOADERS} processes, {where}"
    return Task(name, what, "files/s", count, total_bytes)


def _reading(objects: dict[str, int]) -> Work:
    def read_s(side: Side, number: int) -> float:
        files = lakes.paths_below(side.directory, list(objects))
        shares = readers.shuffled_shares(files, min(LOADERS, len(files)), number)
        return readers.timed(readers.prepare_files, shares, sum(objects.values()))

    return read_s


def _make_cold(side: Side, _: int) -> None:
    side.forget()
    for _directory, _names, _files in os.walk(side.directory):
        pass
