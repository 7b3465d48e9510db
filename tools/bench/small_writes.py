"""Many small files: created and unpacked through the mount, and sent to the lake."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools.bench import lakes
from tools.bench.checkpoint import in_child_s, leave
from tools.bench.figures import Figure, Target, alternate, progress
from tools.bench.settings import Settings
from tools.mounted import sluice_command

NAME = "small-writes"
FILES = 10_000
FILE_BYTES = 4096
FOLDER = 1000
UPLOADS_AT_ONCE = 8
# JuiceFS with --writeback is the bar, and not measured here: it is no package of a registry. What
# ext4 does in the same run says what the machine was capable of.
SHARE_OF_EXT4 = 0.02


def measure(settings: Settings) -> list[Figure]:
    keys = lakes.keys_in_folders(settings.scaled(FILES, least=10), FOLDER)
    with settings.directory(NAME) as path, lakes.seaweed(path / "server") as endpoint:
        progress(f"{NAME}: {len(keys):,} files of {FILE_BYTES} bytes")
        archive = path / "files.tar"
        _pack(archive, keys)
        return [
            _created(settings, endpoint, keys),
            _unpacked(settings, endpoint, archive, len(keys)),
            _uploaded(settings, endpoint, path, keys),
        ]


def _created(settings: Settings, endpoint: lakes.Endpoint, keys: list[str]) -> Figure:
    def ours(_: int) -> float:
        with settings.mounted(endpoint, ["--upload-delay=600"], writable=True) as mount:
            rate = len(keys) / create_s(mount.directory, keys)
            leave(mount)
            return rate

    def native(number: int) -> float:
        with settings.directory(f"ext4-{number}") as directory:
            return len(keys) / create_s(directory, keys)

    values = alternate(ours, native, settings.rounds, f"{NAME}-created")
    return Figure(
        name=f"{NAME}-created",
        what=f"{len(keys):,} files of {FILE_BYTES} bytes created, written and closed",
        unit="files/s",
        ours=values[0],
        target=Target(at_least=SHARE_OF_EXT4),
        baseline_name="ext4",
        baseline=values[1],
    )


def _unpacked(settings: Settings, endpoint: lakes.Endpoint, archive: Path, count: int) -> Figure:
    def untar_s(directory: Path) -> float:
        started_s = time.monotonic()
        subprocess.run(["tar", "-xf", str(archive), "-C", str(directory)], check=True)
        return time.monotonic() - started_s

    def ours(_: int) -> float:
        with settings.mounted(endpoint, ["--upload-delay=600"], writable=True) as mount:
            rate = count / untar_s(mount.directory)
            leave(mount)
            return rate

    def native(number: int) -> float:
        with settings.directory(f"ext4-{number}") as directory:
            return count / untar_s(directory)

    values = alternate(ours, native, settings.rounds, f"{NAME}-unpacked")
    return Figure(
        name=f"{NAME}-unpacked",
        what=f"{count:,} files of {FILE_BYTES} bytes unpacked by tar",
        unit="files/s",
        ours=values[0],
        target=Target(at_least=SHARE_OF_EXT4),
        baseline_name="ext4",
        baseline=values[1],
    )


def _uploaded(settings: Settings, endpoint: lakes.Endpoint, path: Path, keys: list[str]) -> Figure:
    def ours(number: int) -> float:
        with settings.mounted(endpoint, ["--upload-delay=600"], writable=True) as mount:
            root = mount.directory / f"round{number}"
            root.mkdir()
            create_s(root, keys)
            started_s = time.monotonic()
            subprocess.run([sluice_command(), "sync", "--quiet", str(mount.directory)], check=True)
            return len(keys) / (time.monotonic() - started_s)

    def bare(_: int) -> float:
        return len(keys) / in_child_s(put_all, endpoint, keys)

    values = alternate(ours, bare, settings.rounds, f"{NAME}-uploaded")
    return Figure(
        name=f"{NAME}-uploaded",
        what=f"{len(keys):,} files of {FILE_BYTES} bytes sent to the lake",
        unit="files/s",
        ours=values[0],
        target=Target(at_least=0.7),
        baseline_name=f"boto3, {UPLOADS_AT_ONCE} threads",
        baseline=values[1],
    )


def create_s(root: Path, keys: list[str]) -> float:
    """Return how many seconds it takes to create the files, directories included."""
    content = os.urandom(FILE_BYTES)
    started_s = time.monotonic()
    made: set[str] = set()
    for key in keys:
        folder = os.path.dirname(key)
        if folder not in made:
            os.mkdir(f"{root}/{folder}")
            made.add(folder)
        with open(f"{root}/{key}", "xb", buffering=0) as file:
            file.write(content)
    return time.monotonic() - started_s


def put_all(endpoint: lakes.Endpoint, keys: list[str]) -> None:
    """Put the same objects with boto3 alone."""
    client, content = endpoint.boto3(), os.urandom(FILE_BYTES)

    def put(key: str) -> None:
        client.put_object(Bucket=lakes.BUCKET, Key=f"bare/{key}", Body=content)

    with ThreadPoolExecutor(UPLOADS_AT_ONCE) as pool:
        for _ in pool.map(put, keys):
            pass


def _pack(archive: Path, keys: list[str]) -> None:
    with tarfile.open(archive, "w") as tar:
        for key in keys:
            info = tarfile.TarInfo(key)
            info.size = FILE_BYTES
            info.mtime = 1_700_000_000
            tar.addfile(info, io.BytesIO(lakes.body(key, FILE_BYTES)))
