"""The first epoch over shards, read from start to end in a new order by few loaders that think in between.

Each loader reads a shard as webdataset does, 1 MiB at a time, and thinks after each: so there is time to
fetch the next shard, if somebody cares to. Compared are the seconds that loaders waited for bytes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

from cache.model import MIB
from tools.bench import lakes, readers
from tools.bench.figures import Figure, Target, alternate, progress
from tools.bench.settings import Settings
from tools.mounted import Mounted

NAME = "shards"
SHARDS = 64
SHARD_BYTES = 32 * MIB
LOADERS = 2
LATENCY_S = 0.020
THINK_S = 0.015  # After each MiB: 67 MB/s a loader.


def measure(settings: Settings) -> list[Figure]:
    keys = [f"train/shard-{number:06d}.tar" for number in range(settings.scaled(SHARDS, least=8))]
    states: list[str] = []
    with settings.directory(NAME) as path, lakes.seaweed(path / "server") as direct:
        progress(f"{NAME}: making {len(keys):,} shards of {SHARD_BYTES // MIB} MiB")
        lakes.fill(direct, dict.fromkeys(keys, SHARD_BYTES))
        with lakes.slowed(direct, LATENCY_S) as (endpoint, proxy):

            def waited_s(mode: str, seed: int) -> float:
                with settings.mounted(endpoint, [f"--read-ahead={mode}"]) as mount:
                    paths = lakes.paths_below(mount.directory, keys)
                    shares = readers.shuffled_shares(paths, LOADERS, seed)
                    work_s = readers.timed(prepare_shards, shares, len(keys) * SHARD_BYTES)
                    if mode == "set":
                        states.append(_state(mount))
                thinking_s = max(map(len, shares)) * SHARD_BYTES / MIB * THINK_S
                return max(0.001, work_s - thinking_s)

            waits = alternate(
                lambda number: waited_s("set", number),
                lambda number: waited_s("file", number),
                settings.rounds,
                NAME,
            )
    return [
        Figure(
            name=NAME,
            what=f"seconds that loaders waited in a first epoch over {len(keys)} shards of"
            f" {SHARD_BYTES // MIB} MiB, shuffled, {LOADERS} loaders, {LATENCY_S * 1000:.0f} ms latency",
            unit="s",
            ours=waits[0],
            target=Target(at_most=0.8),
            baseline_name="the same with --read-ahead file",
            baseline=waits[1],
            notes={"MiB read ahead, used and wasted, each round": states, "latency from": proxy},
        )
    ]


def prepare_shards(paths: Sequence[str]) -> Callable[[], int]:
    """Return what reads each of *paths* from start to end, thinking, and returns the bytes."""
    return lambda: sum(map(_read_shard, paths))


def _read_shard(path: str) -> int:
    fd = os.open(path, os.O_RDONLY)
    try:
        size_bytes = 0
        while piece := os.read(fd, MIB):
            size_bytes += len(piece)
            time.sleep(THINK_S)
        return size_bytes
    finally:
        os.close(fd)


def _state(mount: Mounted) -> str:
    """Return how much of what was read ahead was used, in MiB."""
    shown = mount.status()["sets"]
    if not shown:
        return "no set was recognised"
    names = ("fetched_ahead_bytes", "used_ahead_bytes", "wasted_bytes")
    return " ".join(str(sum(one[name] for one in shown) // MIB) for name in names)
