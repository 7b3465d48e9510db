"""The first epoch: small files out of a lake that is 20 ms away, against obstore by itself.

The baseline is one process with as many threads as we have reader processes, each fetching whole
objects one after the other: no FUSE, no cache, no other process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from tools.bench import lakes, readers
from tools.bench.figures import Figure, MeasurementFailed, Target, alternate, progress
from tools.bench.settings import Settings

NAME = "cold-epoch"
FILES = 2000
FILE_BYTES = 110_000
FOLDER_FILES = 200
READERS = 16
LATENCY_S = 0.020


def measure(settings: Settings) -> list[Figure]:
    keys = lakes.keys_in_folders(settings.scaled(FILES, least=READERS), FOLDER_FILES)
    expected_bytes = len(keys) * FILE_BYTES
    listing_s: list[float] = []
    with settings.directory(NAME) as path, lakes.seaweed(path / "server") as direct:
        progress(f"{NAME}: making {len(keys):,} objects of {FILE_BYTES:,} bytes")
        lakes.fill(direct, dict.fromkeys(keys, FILE_BYTES))
        with lakes.slowed(direct, LATENCY_S) as (endpoint, proxy):

            def ours(number: int) -> float:
                with settings.mounted(endpoint) as mount:
                    start_s = time.perf_counter()
                    listed = [str(file) for file in sorted(mount.directory.glob("*/*"))]
                    listing_s.append(time.perf_counter() - start_s)
                    if listed != lakes.paths_below(mount.directory, keys):
                        raise MeasurementFailed(f"the mount shows {len(listed)} files, not the expected ones")
                    shares = readers.shuffled_shares(listed, READERS, number)
                    return len(keys) / readers.timed(readers.prepare_files, shares, expected_bytes)

            def baseline(number: int) -> float:
                share = (endpoint, readers.shuffled_shares(keys, READERS, number + settings.rounds))
                return len(keys) / readers.timed(prepare_threads, [share], expected_bytes)

            rates = alternate(ours, baseline, settings.rounds, NAME)
    return [
        Figure(
            name=NAME,
            what=f"first epoch of {len(keys):,} files of {FILE_BYTES:,} bytes, {READERS} reader processes,"
            f" {LATENCY_S * 1000:.0f} ms to first byte",
            unit="files/s",
            ours=rates[0],
            target=Target(at_least=0.8),
            baseline_name=f"obstore, {READERS} threads of one process, same server",
            baseline=rates[1],
            notes={
                "the files are listed before the clock starts; seconds": [round(s, 3) for s in listing_s],
                "latency from": proxy,
            },
        )
    ]


def prepare_threads(share: tuple[lakes.Endpoint, Sequence[Sequence[str]]]) -> Callable[[], int]:
    """Return what fetches each list of keys in a thread and returns the bytes."""
    endpoint, lists = share
    store = endpoint.obstore()

    def fetch(keys: Sequence[str]) -> int:
        return sum(len(store.get(key).bytes()) for key in keys)

    def work() -> int:
        with ThreadPoolExecutor(len(lists)) as pool:
            return sum(pool.map(fetch, lists))

    return work
