"""One large cached object, read in order and at random places, against the same file on ext4 and in peers.

Once in the page cache, which passthrough shares with the cache's own file, and once with the page
cache dropped before each round: then both come from the disk.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass

from cache.model import GIB, KIB, MIB
from tools.bench import lakes, readers
from tools.bench.contest import Side, Task, contest, for_each
from tools.bench.field import Need, SluiceSide, standing
from tools.bench.figures import Figure, Target, progress
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
    over_peer: Target | None
    goal: str

    def what(self, reads: int) -> str:
        how = f"{reads:,} random reads of {self.read_bytes // KIB} KiB" if reads else "in order"
        return f"a cached large file, {how}, page cache {'dropped' if self.dropped else 'warm'}"


def _least(ratio: float) -> Target:
    return Target(at_least=ratio)


_DROPPED = "page cache dropped, from the NVMe tier"
_WARM = "in the page cache"
WORKS = (
    Work("sequential", MIB, 0, False, _least(0.9), _least(1.2), "warm sequential 1 GiB"),
    Work("random-4k", 4 * KIB, 200_000, False, _least(0.9), _least(1), f"random 4 KB, {_WARM}"),
    Work("random-128k", 128 * KIB, 20_000, False, _least(0.9), _least(1), f"random 128 KB, {_WARM}"),
    Work("sequential-dropped", MIB, 0, True, _least(0.9), None, ""),
    Work(
        "random-128k-dropped", 128 * KIB, 4000, True, _least(0.9), _least(1.2), f"random 128 KB, {_DROPPED}"
    ),
    Work("random-4k-dropped", 4 * KIB, 8000, True, _least(0.8), _least(1.5), f"random 4 KB, {_DROPPED}"),
)


def measure(settings: Settings) -> list[Figure]:
    size_bytes = settings.scaled(OBJECT_BYTES, least=16 * MIB)
    with settings.directory(NAME) as path, lakes.seaweed(path / "server") as endpoint:
        progress(f"{NAME}: making an object of {size_bytes / MIB:,.0f} MiB, twice")
        lakes.fill(endpoint, {KEY: size_bytes})
        lakes.write_tree(path / "plain", {KEY: size_bytes})
        need = Need(NAME, endpoint, endpoint, path / "plain", 2 * size_bytes + 256 * MIB)
        with standing(settings, need) as sides:
            for_each(
                settings,
                f"{NAME}: first read",
                sides,
                lambda side: readers.timed(readers.prepare_files, [[str(side.directory / KEY)]], size_bytes),
            )
            ours = sides[0]
            assert isinstance(ours, SluiceSide)
            shown = ours.mounted.status()["features"]
            chosen = {name: shown[name]["on"] for name in ("no_open", "passthrough")}
            return [_figure(settings, work, sides, size_bytes, chosen) for work in WORKS]


def _figure(
    settings: Settings, work: Work, sides: list[Side], size_bytes: int, chosen: dict[str, bool]
) -> Figure:
    reads = settings.scaled(work.reads) if work.reads else 0
    payload_bytes = reads * work.read_bytes or size_bytes

    def prepare(side: Side, _: int) -> None:
        readers.read_file(str(side.directory / KEY))
        if work.dropped:
            drop_page_cache()

    def read_s(side: Side, number: int) -> float:
        file = str(side.directory / KEY)
        if not reads:
            return readers.timed(readers.prepare_files, [[file]], size_bytes)
        share = (file, size_bytes, work.read_bytes, reads, number)
        return readers.timed(prepare_random, [share], payload_bytes)

    task = Task(f"large-{work.name}", work.what(reads), "MiB/s", payload_bytes / MIB, payload_bytes)
    outcome = contest(settings, task, sides, read_s, prepare)
    return outcome.figure(work.target, work.over_peer, goal=work.goal, notes={"features": chosen})


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
