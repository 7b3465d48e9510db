"""Many small files: created and unpacked through the mount, and sent to the lake."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cache.model import GIB
from tools.bench import lakes
from tools.bench.checkpoint import in_child_s
from tools.bench.contest import Side, Task, Work, contest
from tools.bench.field import Need, standing
from tools.bench.figures import Figure, Target, alternate, progress
from tools.bench.settings import Settings
from tools.mounted import sluice_command

NAME = "small-writes"
FILES = 10_000
FILE_BYTES = 4096
FOLDER = 1000
UPLOADS_AT_ONCE = 8
PEERS = ("juicefs",)  # With --writeback it is the bar; the others send each file as it is closed.
# Without peers in the run, what ext4 does says what the machine was capable of.
OVER_NATIVE, OVER_PEER = Target(at_least=0.02), Target(at_least=1)
FOLDER_NAME = "round"


def measure(settings: Settings) -> list[Figure]:
    keys = lakes.keys_in_folders(settings.scaled(FILES, least=10), FOLDER)
    with settings.directory(NAME) as path, lakes.seaweed(path / "server") as endpoint:
        progress(f"{NAME}: {len(keys):,} files of {FILE_BYTES} bytes")
        archive = path / "files.tar"
        _pack(archive, keys)
        return [
            *_made(settings, endpoint, archive, keys),
            _uploaded(settings, endpoint, path, keys),
        ]


def _made(settings: Settings, endpoint: lakes.Endpoint, archive: Path, keys: list[str]) -> list[Figure]:
    total_bytes = len(keys) * FILE_BYTES
    budget_bytes = 4 * total_bytes + GIB
    need = Need(NAME, endpoint, endpoint, None, budget_bytes, writable=True, holds_uploads=True, peers=PEERS)
    works: dict[str, tuple[str, str, Work]] = {
        "created": (
            "created, written and closed",
            "10,000 files of 4 KB created",
            lambda side, _: create_s(side.directory / FOLDER_NAME, keys),
        ),
        "unpacked": (
            "unpacked by tar",
            "10,000 files of 4 KB untarred",
            lambda side, _: untar_s(archive, side.directory / FOLDER_NAME),
        ),
    }
    with standing(settings, need) as sides:
        return [
            contest(
                settings,
                Task(
                    f"{NAME}-{verb}",
                    f"{len(keys):,} files of {FILE_BYTES} bytes {how}",
                    "files/s",
                    len(keys),
                    total_bytes,
                ),
                sides,
                work,
                _begin_empty,
            ).figure(OVER_NATIVE, OVER_PEER, goal=goal)
            for verb, (how, goal, work) in works.items()
        ]


def _begin_empty(side: Side, _: int) -> None:
    root = side.directory / FOLDER_NAME
    if root.exists():
        shutil.rmtree(root)
    root.mkdir()


def untar_s(archive: Path, directory: Path) -> float:
    """Return how many seconds it takes to unpack *archive* in *directory*."""
    started_s = time.monotonic()
    subprocess.run(["tar", "-xf", str(archive), "-C", str(directory)], check=True)
    return time.monotonic() - started_s


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
