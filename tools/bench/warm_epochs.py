"""Second and later epochs: shuffled whole files out of the cache, against the same files on ext4.

Both sides have been read before the first round, so the page cache counts for both.
"""

from __future__ import annotations

from pathlib import Path

from tools.bench import lakes, readers
from tools.bench.figures import Figure, Target, alternate, progress
from tools.bench.settings import Settings, sources

NAME = "warm-epochs"
FILES = 20_000
FILE_BYTES = 110_000
FOLDER_FILES = 1000
PROCESSES = 2


def measure(settings: Settings) -> list[Figure]:
    keys = lakes.keys_in_folders(settings.scaled(FILES, least=PROCESSES), FOLDER_FILES)
    objects = dict.fromkeys(keys, FILE_BYTES)
    with settings.directory(NAME) as path, lakes.seaweed(path / "server") as endpoint:
        progress(f"{NAME}: making {len(keys):,} files of {FILE_BYTES:,} bytes, twice")
        lakes.fill(endpoint, objects)
        lakes.write_tree(path / "plain", objects)
        with settings.mounted(endpoint) as mount:
            files_of = {side: lakes.paths_below(side, keys) for side in (mount.directory, path / "plain")}

            def epoch(side: Path, seed: int) -> float:
                """Return files per second of one epoch, in an order of its own."""
                shares = readers.shuffled_shares(files_of[side], PROCESSES, seed)
                took_s = readers.timed(readers.prepare_files, shares, len(keys) * FILE_BYTES)
                return len(keys) / took_s

            progress(f"{NAME}: first epochs, not counted")
            first = epoch(mount.directory, seed=-1)
            epoch(path / "plain", seed=-1)
            before = sources(mount)
            ours, baseline = alternate(
                lambda number: epoch(mount.directory, number),
                lambda number: epoch(path / "plain", number + settings.rounds),
                settings.rounds,
                NAME,
            )
            after = sources(mount)
    grown = {source: after[source] - before.get(source, 0) for source in after}
    return [
        Figure(
            name=NAME,
            what=f"shuffled epochs of {len(keys):,} files of {FILE_BYTES:,} bytes, {PROCESSES} processes",
            unit="files/s",
            ours=ours,
            target=Target(at_least=0.5),
            baseline_name="the same files on the file system of the cache",
            baseline=baseline,
            notes={
                "first epoch, files/s, not counted": round(first),
                "bytes that reached the mount in all rounds, by source": grown,
            },
        )
    ]
