"""Records read at random out of one large file, four times as large as the cache: what is fetched for it.

Each record is read once an epoch, in a new order each epoch, as from an HDF5 file whose samples lie
one behind the other. Read are only the records' bytes; what the kernel adds, pages of a record's
neighbours, is in what is fetched. The page cache is passed by, so that every read comes to us.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence

from cache.model import GIB, MIB
from tools.bench import lakes, readers
from tools.bench.figures import Figure, MeasurementFailed, Target, progress
from tools.bench.lakes import Endpoint
from tools.bench.settings import Settings

NAME = "random-records"
OBJECT_BYTES = 4 * GIB
OBJECT_BYTES_MIN = 256 * MIB  # A quarter of less is no tier, see tools/options.py.
KEY = "records.bin"
RECORD_BYTES = 100_000
LOADERS = 4
CACHE_SHARE = 0.25
EPOCHS = 2
PARTS = 8


def measure(settings: Settings) -> list[Figure]:
    size_bytes = settings.scaled(OBJECT_BYTES, least=OBJECT_BYTES_MIN)
    with settings.directory(NAME) as path, lakes.seaweed(path / "server") as endpoint:
        progress(f"{NAME}: making an object of {size_bytes / MIB:,.0f} MiB")
        lakes.fill(endpoint, {KEY: size_bytes})
        return [_figure(settings, endpoint, size_bytes)]


def _figure(settings: Settings, endpoint: Endpoint, size_bytes: int) -> Figure:
    ratios: list[float] = []
    shown: list[float | None] = []
    for number in range(settings.rounds):
        ratio, told = _round(settings, endpoint, size_bytes, number)
        ratios.append(ratio)
        shown.append(told)
        progress(f"{NAME}: round {number + 1} of {settings.rounds}: {ratio:.3f}")
    return Figure(
        name=NAME,
        what=f"bytes fetched over bytes read, records of {RECORD_BYTES:,} bytes at random out of"
        f" {size_bytes / MIB:,.0f} MiB, a cache of a quarter of it, {EPOCHS} epochs by {LOADERS} processes",
        unit="times",
        ours=ratios,
        target=Target(at_most=1.5),
        notes={"as `sluice ls` shows it, over the READs of the kernel": shown},
    )


def _round(
    settings: Settings, endpoint: Endpoint, size_bytes: int, number: int
) -> tuple[float, float | None]:
    """Return what was fetched over what was read from an empty cache on, and what the mount says it is."""
    records = size_bytes // RECORD_BYTES
    tier_bytes = int(size_bytes * CACHE_SHARE)
    with (
        settings.directory("tier") as tier,
        settings.mounted(endpoint, [f"--cache={tier}:{tier_bytes}", "--dram=0", "--keep-free=0"]) as mount,
    ):
        path = str(mount.directory / KEY)
        for epoch in range(EPOCHS):
            order = list(range(records))
            random.Random(number * EPOCHS + epoch).shuffle(order)
            for part in range(PARTS):  # A slow server takes minutes for each.
                numbers = order[part::PARTS]
                shares = [(path, numbers[share::LOADERS]) for share in range(LOADERS)]
                readers.timed(prepare_records, shares, len(numbers) * RECORD_BYTES)
        fetched_bytes = mount.status()["lake_io"]["bytes_fetched"]
        (entry,) = mount.ls(path)
    return fetched_bytes / (EPOCHS * records * RECORD_BYTES), entry["amplification"]


def prepare_records(share: tuple[str, Sequence[int]]) -> Callable[[], int]:
    """Return what reads the records of these numbers past the page cache and returns the bytes."""
    path, numbers = share

    def work() -> int:
        fd = os.open(path, os.O_RDONLY)
        try:
            return sum(_read_record(fd, number * RECORD_BYTES) for number in numbers)
        finally:
            os.close(fd)

    return work


def _read_record(fd: int, offset: int) -> int:
    # The kernel drops whole pages only, so the neighbours' parts of the outer ones go as well.
    page = os.sysconf("SC_PAGE_SIZE")
    start = offset // page * page
    os.posix_fadvise(fd, start, offset + RECORD_BYTES + page - start, os.POSIX_FADV_DONTNEED)
    body = os.pread(fd, RECORD_BYTES, offset)
    if len(body) != RECORD_BYTES:
        raise MeasurementFailed(f"{len(body)} bytes were read at {offset} instead of {RECORD_BYTES}")
    return len(body)
