"""One large object read from start to end, cold, against obstore's ranged GETs of the same object.

The baseline keeps RANGES_AT_ONCE ranges of RANGE_BYTES under way and throws away what it got, in
order: what a client can do that neither stores nor checks anything. So is the mover's memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from cache.model import GIB, GROUP_BYTES, MIB
from tools.bench import lakes, readers
from tools.bench.figures import Figure, Target, alternate, progress
from tools.bench.memory import PeakSampler
from tools.bench.settings import Settings

NAME = "sequential"
OBJECT_BYTES = GIB
KEY = "large.bin"
RANGE_BYTES = GROUP_BYTES  # As the mover fetches.
RANGES_AT_ONCE = 8
MEMORY_BYTES_MAX = 300_000_000


def measure(settings: Settings) -> list[Figure]:
    size_bytes = settings.scaled(OBJECT_BYTES, least=RANGE_BYTES)
    with settings.directory(NAME) as path, lakes.seaweed(path / "server") as direct:
        progress(f"{NAME}: making an object of {size_bytes / MIB:,.0f} MiB")
        lakes.fill(direct, {KEY: size_bytes})
        figures = _measure(settings, NAME, direct, size_bytes, "no added latency")
        with lakes.slowed(direct, 0.020) as (slow, proxy):
            where = f"20 ms to first byte ({proxy})"
            return figures + _measure(settings, f"{NAME}-20ms", slow, size_bytes, where)


def _measure(
    settings: Settings, name: str, endpoint: lakes.Endpoint, size_bytes: int, where: str
) -> list[Figure]:
    private: list[float] = []
    anonymous: list[float] = []

    def ours(_: int) -> float:
        with settings.mounted(endpoint) as mount:
            mover = mount.pids()["mover"]
            file = str(mount.directory / KEY)
            with PeakSampler(lambda: mover) as peak:
                took_s = readers.timed(readers.prepare_files, [[file]], size_bytes)
            private.append(float(peak.private_bytes_max))
            anonymous.append(float(peak.anonymous_bytes_max))
            return size_bytes / MIB / took_s

    def baseline(_: int) -> float:
        return size_bytes / MIB / readers.timed(prepare_ranges, [(endpoint, size_bytes)], size_bytes)

    rates = alternate(ours, baseline, settings.rounds, name)
    return [
        Figure(
            name=name,
            what=f"cold sequential read of {size_bytes / MIB:,.0f} MiB, {where}",
            unit="MiB/s",
            ours=rates[0],
            target=Target(at_least=0.7),
            baseline_name=f"obstore, {RANGES_AT_ONCE} ranges of {RANGE_BYTES // MIB} MiB at a time",
            baseline=rates[1],
        ),
        Figure(
            name=f"{name}-memory",
            what="peak private memory of the mover meanwhile",
            unit="bytes",
            ours=private,
            target=Target(at_most=MEMORY_BYTES_MAX),
            notes={"anonymous memory alone, bytes": [int(count) for count in anonymous]},
        ),
    ]


def prepare_ranges(share: tuple[lakes.Endpoint, int]) -> Callable[[], int]:
    """Return what fetches the object in ranges, a bounded number at a time, and returns the bytes."""
    endpoint, size_bytes = share
    store = endpoint.obstore()

    def fetch(start: int) -> int:
        data: Any = store.get_range(KEY, start=start, end=min(size_bytes, start + RANGE_BYTES))
        return len(data)

    def work() -> int:
        fetched_bytes = 0
        under_way: deque[Future[int]] = deque()
        with ThreadPoolExecutor(RANGES_AT_ONCE) as pool:
            for start in range(0, size_bytes, RANGE_BYTES):
                if len(under_way) == RANGES_AT_ONCE:
                    fetched_bytes += under_way.popleft().result()
                under_way.append(pool.submit(fetch, start))
            return fetched_bytes + sum(future.result() for future in under_way)

    return work
