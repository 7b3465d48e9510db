"""What each shuffled epoch fetches of a set that does not fit into the cache, over the least possible.

With a share C of the set cached at the beginning of an epoch, (1 - C) of it has to be fetched. The
page cache is passed by, so that every read comes to us. Once with orders that are found from the first
opens, though not at once (`random.Random(epoch)`, where most scripts go on with one generator), and once
with orders that nobody can know.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cache.records import charge
from tools.bench import lakes, readers
from tools.bench.figures import Figure, Target, progress
from tools.bench.lakes import Endpoint
from tools.bench.settings import Settings

NAME = "epoch-bytes"
FILES = 8000
FILE_BYTES = 110_000
FOLDER_FILES = 500
LOADERS = 4
SHARES = (0.2, 0.5, 0.8)
TIER_BYTES_MIN = 64 << 20  # See tools/options.py; with fewer files no smaller share can be had.
SEEDS = {"found": 0, "unknown": 7 << 60}  # Of the first epoch, by what becomes of the order.
_LABEL_BYTES = 4096
_EXTENTS_SHARE = 128  # Of a tier, kept back: see cache/mover.py.


def measure(settings: Settings) -> list[Figure]:
    keys = lakes.keys_in_folders(settings.scaled(FILES, least=800), FOLDER_FILES)
    with settings.directory(NAME) as path, lakes.seaweed(path / "server") as endpoint:
        progress(f"{NAME}: making {len(keys):,} objects of {FILE_BYTES:,} bytes")
        lakes.fill(endpoint, dict.fromkeys(keys, FILE_BYTES))
        return [figure for share in SHARES for figure in _figures(settings, endpoint, keys, share)]


def _figures(settings: Settings, endpoint: Endpoint, keys: Sequence[str], share: float) -> Iterator[Figure]:
    size_bytes = max(TIER_BYTES_MIN, int(share * len(keys) * charged_bytes()))
    epochs = max(2, settings.rounds)
    lru, _ = _epochs(settings, endpoint, keys, size_bytes, 2, ["--read-ahead=file", "--policy=lru"], 0)
    for order, seed in SEEDS.items():
        ours, shown = _epochs(settings, endpoint, keys, size_bytes, epochs, ["--read-ahead=set"], seed)
        yield Figure(
            name=f"{NAME}-{share:.0%}-{order}",
            what=f"bytes fetched in an epoch from the second on, {share:.0%} of {len(keys):,} files of"
            f" {FILE_BYTES:,} bytes cached, {LOADERS} loader processes, over the least possible",
            unit="times",
            ours=ours,
            target=Target(at_most=1.02),
            notes={
                "with --policy lru": [round(each, 3) for each in lru],
                "read ahead and evicted before it was used, bytes": sum(one["wasted_bytes"] for one in shown),
                "order in the end": ", ".join(one["order"] for one in shown),
            },
        )


def charged_bytes() -> int:
    return charge(FILE_BYTES) + _LABEL_BYTES


def _epochs(
    settings: Settings,
    endpoint: Endpoint,
    keys: Sequence[str],
    size_bytes: int,
    epochs: int,
    options: Sequence[str],
    seed: int,
) -> tuple[list[float], list[dict[str, Any]]]:
    """Return bytes over the optimum for each epoch but the first, and the sets as `status` has them."""
    expected_bytes = len(keys) * FILE_BYTES
    given_bytes = size_bytes + size_bytes // (_EXTENTS_SHARE - 1)
    ratios: list[float] = []
    with (
        settings.directory("tier") as tier,
        settings.mounted(
            endpoint, [f"--cache={tier}:{given_bytes}", "--dram=0", "--keep-free=0", *options]
        ) as mount,
    ):
        files = lakes.paths_below(mount.directory, keys)
        for epoch in range(epochs + 1):
            status = mount.status()
            before, held = status["lake_io"]["bytes_fetched"], status["tiers"][0]["size_bytes"]
            shares = readers.shuffled_shares(files, LOADERS, seed + epoch)
            readers.timed(prepare_past_page_cache, shares, expected_bytes)
            fetched_bytes = mount.status()["lake_io"]["bytes_fetched"] - before
            optimum_bytes = expected_bytes - held // charged_bytes() * FILE_BYTES
            if epoch:
                ratios.append(fetched_bytes / optimum_bytes)
            progress(f"{NAME}: {' '.join(options)}: epoch {epoch + 1}: {fetched_bytes / optimum_bytes:.3f}")
        return ratios, mount.status()["sets"]


def prepare_past_page_cache(paths: Sequence[str]) -> Callable[[], int]:
    """Return what reads each of *paths* once, whatever the page cache has of it."""
    return lambda: sum(map(read_past_page_cache, paths))


def read_past_page_cache(path: str) -> int:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        size_bytes = 0
        while piece := os.read(fd, readers.READ_BYTES):
            size_bytes += len(piece)
        return size_bytes
    finally:
        os.close(fd)
