"""Read-ahead of sample sets: the first epoch with and without it, and against the client library.

Few loader processes read one file at a time, as a training with few workers does: without read-ahead
each of them waits out the latency for each file. The bulk rate is obstore's, with as many
threads in one process as SluiceFS has fetches under way at most: no FUSE, no cache.
"""

from __future__ import annotations

from tools.bench import cold_epoch, lakes, readers
from tools.bench.figures import Figure, MeasurementFailed, Target, alternate, progress
from tools.bench.settings import Settings
from tools.mounted import Mounted

NAME = "set-ahead"
FILES = 5000
FILE_BYTES = 110_000
FOLDER_FILES = 500
LOADERS = 4
BULK_THREADS = 32
LATENCY_S = 0.020


def measure(settings: Settings) -> list[Figure]:
    keys = lakes.keys_in_folders(settings.scaled(FILES, least=100), FOLDER_FILES)
    expected_bytes = len(keys) * FILE_BYTES
    states: list[str] = []
    with settings.directory(NAME) as path, lakes.seaweed(path / "server") as direct:
        progress(f"{NAME}: making {len(keys):,} objects of {FILE_BYTES:,} bytes")
        lakes.fill(direct, dict.fromkeys(keys, FILE_BYTES))
        with lakes.slowed(direct, LATENCY_S) as (endpoint, proxy):

            def epoch(mode: str, seed: int) -> float:
                """Return files per second of a first epoch on a new mount."""
                with settings.mounted(endpoint, [f"--read-ahead={mode}"]) as mount:
                    listed = [str(file) for file in sorted(mount.directory.glob("*/*"))]
                    if listed != lakes.paths_below(mount.directory, keys):
                        raise MeasurementFailed(f"the mount shows {len(listed)} files, not the expected ones")
                    shares = readers.shuffled_shares(listed, LOADERS, seed)
                    took_s = readers.timed(readers.prepare_files, shares, expected_bytes)
                    if mode == "set":
                        states.append(_state(mount))
                    return len(keys) / took_s

            def bulk(number: int) -> float:
                share = (endpoint, readers.shuffled_shares(keys, BULK_THREADS, number))
                return len(keys) / readers.timed(cold_epoch.prepare_threads, [share], expected_bytes)

            without = alternate(
                lambda number: epoch("set", number),
                lambda number: epoch("file", number),
                settings.rounds,
                f"{NAME}-without",
            )
            against_bulk = alternate(
                lambda number: epoch("set", number + settings.rounds), bulk, settings.rounds, f"{NAME}-bulk"
            )
    what = (
        f"first epoch of {len(keys):,} files of {FILE_BYTES:,} bytes, shuffled, {LOADERS} loader processes,"
        f" {LATENCY_S * 1000:.0f} ms to first byte"
    )
    return [
        Figure(
            name=f"{NAME}-without",
            what=what,
            unit="files/s",
            ours=without[0],
            target=Target(at_least=4.0),
            baseline_name="the same with --read-ahead file",
            baseline=without[1],
            notes={"read ahead, used and wasted, each round": states, "latency from": proxy},
        ),
        Figure(
            name=f"{NAME}-bulk",
            what=what,
            unit="files/s",
            ours=against_bulk[0],
            target=Target(at_least=0.85),
            baseline_name=f"obstore, {BULK_THREADS} threads of one process, same server",
            baseline=against_bulk[1],
        ),
    ]


def _state(mount: Mounted) -> str:
    """Return how much of what was read ahead was used, in files."""
    shown = mount.status()["sets"]
    if not shown:
        return "no set was recognised"
    names = ("fetched_ahead_bytes", "used_ahead_bytes", "wasted_bytes")
    return " ".join(str(sum(one[name] for one in shown) // FILE_BYTES) for name in names)
