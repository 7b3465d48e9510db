"""`find` over a large tree: cold against the bare LIST calls, the second time against ext4.

The bare LIST calls are boto3's paginator over the whole bucket, without a delimiter: the fewest
calls that show every key.
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from tools.bench import lakes
from tools.bench.figures import Figure, MeasurementFailed, Target, alternate, progress
from tools.bench.settings import Settings

NAME = "find"
KEYS = 100_000
FOLDER_KEYS = 1000
COLD_ROUNDS_MAX = 3


def find(directory: Path, expected: int) -> float:
    """Return the seconds that `find -type f` takes. Raises MeasurementFailed unless it finds *expected*."""
    start_s = time.perf_counter()
    done = subprocess.run(["find", str(directory), "-type", "f"], capture_output=True, check=True)
    took_s = time.perf_counter() - start_s
    found = done.stdout.count(b"\n")
    if found != expected:
        raise MeasurementFailed(f"find saw {found} files instead of {expected}")
    return took_s


def list_bucket(endpoint: lakes.Endpoint, expected: int) -> float:
    """Return the seconds that boto3 takes to list every key. Raises MeasurementFailed, ClientError."""
    client = endpoint.boto3()
    start_s = time.perf_counter()
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=lakes.BUCKET)
    found = sum(len(page["Contents"]) for page in pages)
    took_s = time.perf_counter() - start_s
    client.close()
    if found != expected:
        raise MeasurementFailed(f"the listing has {found} keys instead of {expected}")
    return took_s


def measure(settings: Settings) -> list[Figure]:
    keys = lakes.keys_in_folders(settings.scaled(KEYS), FOLDER_KEYS)
    objects = dict.fromkeys(keys, 1)
    with settings.directory(NAME) as path, lakes.seaweed(path / "server") as endpoint:
        progress(f"{NAME}: making {len(keys):,} objects and as many files")
        lakes.fill(endpoint, objects)
        lakes.write_tree(path / "plain", objects)

        def cold(_: int) -> float:
            with settings.mounted(endpoint) as mount:
                return find(mount.directory, len(keys))

        cold_rounds = min(settings.rounds, COLD_ROUNDS_MAX)
        first, listing = alternate(
            cold, lambda _: list_bucket(endpoint, len(keys)), cold_rounds, f"{NAME}-cold"
        )
        with settings.mounted(endpoint) as mount:
            find(mount.directory, len(keys))
            find(path / "plain", len(keys))
            again, plain = alternate(
                lambda _: find(mount.directory, len(keys)),
                lambda _: find(path / "plain", len(keys)),
                settings.rounds,
                f"{NAME}-again",
            )
    tree = f"`find -type f` over {len(keys):,} keys, {FOLDER_KEYS:,} in each prefix"
    return [
        Figure(
            name=f"{NAME}-cold",
            what=f"{tree}, first time",
            unit="s",
            ours=first,
            target=Target(at_most=1.5),
            baseline_name="boto3's flat LIST of the same keys",
            baseline=listing,
        ),
        Figure(
            name=f"{NAME}-again",
            what=f"{tree}, later times",
            unit="s",
            ours=again,
            target=Target(at_most=5),
            baseline_name="the same tree on the file system of the cache",
            baseline=plain,
        ),
    ]
