"""Checkpoints as rates: written and synced, read back, and when the lake has them.

Uploads are held back while writing is measured, on every side that can, and files are removed before
they would be sent. `checkpoint` measures the same against what the write-back alone is to reach.
"""

from __future__ import annotations

import os
import shutil
import time
from http import HTTPStatus
from pathlib import Path
from typing import Any

from cache.model import GIB, MIB
from tools.bench import checkpoint, lakes, readers
from tools.bench.contest import Side, Task, contest
from tools.bench.field import Need, standing
from tools.bench.figures import Figure, MeasurementFailed, Target, progress
from tools.bench.settings import Settings

NAME = "bursts"
FILES = checkpoint.FILES
# As for any file system that is there to take checkpoints in: the kernel writes staging files itself.
OPTIONS = ["--profile=checkpoint", "--passthrough=all"]
FOLDER = "run"
# strace -f -e trace=fsync,fdatasync,sync_file_range of each daemon while 8 MiB are written and synced.
FSYNCS = "rclone's and that of JuiceFS with --writeback sync nothing; s3fs and weed send the file to the lake"
VISIBLE_WITHIN_S, VISIBLE_POLL_S = 60.0, 0.005


def measure(settings: Settings) -> list[Figure]:
    size_bytes = settings.scaled(checkpoint.FILE_BYTES // MIB) * MIB
    budget_bytes = 4 * FILES * size_bytes + GIB
    with settings.directory(NAME) as path, lakes.seaweed(path / "server") as endpoint:
        progress(f"{NAME}: {FILES} files of {size_bytes // MIB} MiB")
        held = Need(NAME, endpoint, endpoint, None, budget_bytes, writable=True, holds_uploads=True)
        with standing(settings, held, OPTIONS) as sides:
            figures = [_written(settings, sides, size_bytes), _read_back(settings, sides, size_bytes)]
        sent = Need(NAME, endpoint, endpoint, None, budget_bytes, writable=True)
        with standing(settings, sent, OPTIONS) as sides:
            return [*figures, _durable(settings, sides, endpoint, size_bytes)]


def _written(settings: Settings, sides: list[Side], size_bytes: int) -> Figure:
    total_bytes = FILES * size_bytes
    what = f"{FILES} x {size_bytes // MIB} MiB written, synced and renamed, one after the other"
    outcome = contest(
        settings,
        Task(f"{NAME}-written", what, "MiB/s", total_bytes / MIB, total_bytes),
        sides,
        lambda side, _: checkpoint.save_all(side.directory / FOLDER, size_bytes, writers=1),
        lambda side, _: _empty(side.directory / FOLDER),
    )
    return outcome.figure(
        Target(at_least=0.95),
        Target(at_least=3),
        goal="checkpoint write 4 x 512 MiB with fsync",
        notes={"fsync": FSYNCS} if settings.peers else {},
    )


def _read_back(settings: Settings, sides: list[Side], size_bytes: int) -> Figure:
    total_bytes = FILES * size_bytes
    files = [f"{FOLDER}/rank{number}.pt" for number in range(FILES)]
    outcome = contest(
        settings,
        Task(f"{NAME}-read-back", "the same files read", "MiB/s", total_bytes / MIB, total_bytes),
        sides,
        lambda side, _: readers.timed(
            readers.prepare_files, [lakes.paths_below(side.directory, files)], total_bytes
        ),
    )
    return outcome.figure(Target(at_least=0.9), Target(at_least=1.2), goal="checkpoint read back")


def _durable(settings: Settings, sides: list[Side], endpoint: lakes.Endpoint, size_bytes: int) -> Figure:
    content, client = memoryview(os.urandom(checkpoint.WRITE_BYTES)), endpoint.boto3()

    def durable_s(side: Side, number: int) -> float:
        key = f"{folder_of(side)}/{number}.pt"
        start_s = time.perf_counter()
        checkpoint.save(side.directory / key, content, size_bytes)
        if side.kind == "native":
            checkpoint.in_child_s(checkpoint.upload, endpoint, side.directory / key, key)
        else:
            side.settle()
        if not side.name.startswith("juicefs"):  # It has chunks there, no file.
            await_object(client, key, size_bytes)
        return time.perf_counter() - start_s

    what = f"{size_bytes // MIB} MiB, from the first byte written until the lake has it"
    outcome = contest(
        settings,
        Task(f"{NAME}-durable", what, "s", 0, size_bytes),
        sides,
        durable_s,
        lambda side, _: _empty(side.directory / folder_of(side)),
    )
    return outcome.figure(notes={"native": "written, and then sent by boto3"})


def await_object(client: Any, key: str, size_bytes: int, within_s: float = VISIBLE_WITHIN_S) -> None:
    """Return when the lake has the object, whole: that is asked of it, not of the mount.

    Raises MeasurementFailed when it is not there in time.
    """
    from botocore.exceptions import ClientError

    deadline_s = time.monotonic() + within_s
    while True:
        try:
            if client.head_object(Bucket=lakes.BUCKET, Key=key)["ContentLength"] == size_bytes:
                return
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] != HTTPStatus.NOT_FOUND:
                raise MeasurementFailed(f"the lake was asked for {key}: {error}") from error
        if time.monotonic() > deadline_s:
            raise MeasurementFailed(f"{key} is not in the lake {within_s:g} s after it should be")
        time.sleep(VISIBLE_POLL_S)


def folder_of(side: Side) -> str:
    """Return a folder of the side's own: but for JuiceFS all write to the same bucket."""
    return f"{FOLDER}-{side.name}"


def _empty(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir()
