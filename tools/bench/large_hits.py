"""One large cached object, read in order and at random places, against the same file on ext4.

Once in the page cache, which passthrough shares with the cache's own file, and once with the page
cache dropped before each round: then both come from the disk.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cache.model import GIB, KIB, MIB
from tools.bench import lakes, readers
from tools.bench.figures import Figure, Target, alternate, progress
from tools.bench.settings import Settings, drop_page_cache

NAME = "large-hits"
OBJECT_BYTES = GIB
KEY = "large.bin"


@dataclass(frozen=True, slots=True)
class Work:
    """*reads* reads of *read_bytes* at random places; 0: all of the file, in order."""

    name: str
    read_bytes: int
    reads: int
    dropped: bool
    target: Target

    @property
    def what(self) -> str:
        how = f"{self.reads:,} random reads of {self.read_bytes // KIB} KiB" if self.reads else "in order"
        return f"a cached large file, {how}, page cache {'dropped' if self.dropped else 'warm'}"


WORKS = (
    Work("large-sequential", MIB, 0, False, Target(at_least=0.9)),
    Work("large-random-4k", 4 * KIB, 200_000, False, Target(at_least=0.9)),
    Work("large-random-128k", 128 * KIB, 20_000, False, Target(at_least=0.9)),
    Work("large-sequential-dropped", MIB, 0, True, Target(at_least=0.9)),
    Work("large-random-4k-dropped", 4 * KIB, 8000, True, Target(at_least=0.8)),
    Work("large-random-128k-dropped", 128 * KIB, 4000, True, Target(at_least=0.9)),
)


def measure(settings: Settings) -> list[Figure]:
    size_bytes = settings.scaled(OBJECT_BYTES, least=16 * MIB)
    with settings.directory(NAME) as path, lakes.seaweed(path / "server") as endpoint:
        progress(f"{NAME}: making an object of {size_bytes / MIB:,.0f} MiB, twice")
        lakes.fill(endpoint, {KEY: size_bytes})
        lakes.write_tree(path / "plain", {KEY: size_bytes})
        with settings.mounted(endpoint, ["--dram=0"]) as mount:
            sides = mount.directory / KEY, path / "plain" / KEY
            for side in sides:
                readers.timed(readers.prepare_files, [[str(side)]], size_bytes)
            chosen = {name: mount.status()["features"][name]["on"] for name in ("no_open", "passthrough")}
            return [_figure(settings, work, sides, size_bytes, chosen) for work in WORKS]


def _figure(
    settings: Settings, work: Work, sides: tuple[Path, Path], size_bytes: int, chosen: dict[str, bool]
) -> Figure:
    reads = settings.scaled(work.reads) if work.reads else 0

    def rate(side: Path, seed: int) -> float:
        """Return MiB per second."""
        if work.dropped:
            drop_page_cache()
        else:
            readers.read_file(str(side))
        if not reads:
            return size_bytes / MIB / readers.timed(readers.prepare_files, [[str(side)]], size_bytes)
        share = (str(side), size_bytes, work.read_bytes, reads, seed)
        expected_bytes = reads * work.read_bytes
        return expected_bytes / MIB / readers.timed(prepare_random, [share], expected_bytes)

    ours, baseline = alternate(
        lambda number: rate(sides[0], number),
        lambda number: rate(sides[1], number),
        settings.rounds,
        work.name,
    )
    return Figure(
        name=work.name,
        what=work.what,
        unit="MiB/s",
        ours=ours,
        target=work.target,
        baseline_name="the same file on the file system of the cache",
        baseline=baseline,
        notes={"features": chosen},
    )


def prepare_random(share: tuple[str, int, int, int, int]) -> Callable[[], int]:
    """Return what reads at random aligned places of one open file and returns the bytes."""
    path, size_bytes, read_bytes, reads, seed = share
    roll = random.Random(seed)
    places = [roll.randrange(size_bytes // read_bytes) * read_bytes for _ in range(reads)]
    buffer = bytearray(read_bytes)

    def work() -> int:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            return sum(os.preadv(fd, [buffer], place) for place in places)
        finally:
            os.close(fd)

    return work
