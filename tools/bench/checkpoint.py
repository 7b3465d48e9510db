"""Checkpoints written through the mount, as torch.save and os.replace do it, against ext4 and bare uploads.

The stall is what the training waits for: from open to the return of fsync and rename, for all files.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from cache.model import MIB
from tools.bench import lakes
from tools.bench.field import leave
from tools.bench.figures import Figure, MeasurementFailed, Target, alternate, progress
from tools.bench.settings import Settings
from tools.mounted import sluice_command

NAME = "checkpoint"
FILES = 4
FILE_BYTES = 512 * MIB
WRITE_BYTES = 8 * MIB  # torch.save hands over a tensor's storage at a time.
PART_BYTES = 16 * MIB
PARTS_AT_ONCE = 8
VERSIONS = 10  # Of a file that is replaced again and again.
STALL_MAX, DURABLE_MAX = 2.5, 1.3


def measure(settings: Settings) -> list[Figure]:
    size_bytes = settings.scaled(FILE_BYTES // MIB) * MIB
    with settings.directory(NAME) as path, lakes.seaweed(path / "server") as endpoint:
        progress(f"{NAME}: {FILES} files of {size_bytes // MIB} MiB")
        return [
            _stall(settings, endpoint, path, size_bytes, writers=1),
            _stall(settings, endpoint, path, size_bytes, writers=FILES),
            _durable(settings, endpoint, path, size_bytes * 2),
            _superseded(settings, endpoint, settings.scaled(16) * MIB),
        ]


def _stall(
    settings: Settings, endpoint: lakes.Endpoint, path: Path, size_bytes: int, *, writers: int
) -> Figure:
    def ours(_: int) -> float:
        with settings.mounted(endpoint, ["--upload-delay=600"], writable=True) as mount:
            took_s = save_all(mount.directory, size_bytes, writers)
            leave(mount)
            return took_s

    def native(number: int) -> float:
        with settings.directory(f"ext4-{number}") as directory:
            return save_all(directory, size_bytes, writers)

    name = NAME if writers == 1 else f"{NAME}-{writers}-writers"
    values = alternate(ours, native, settings.rounds, name)
    return Figure(
        name=name,
        what=f"{FILES} x {size_bytes // MIB} MiB written, synced and renamed, {writers} at a time",
        unit="s",
        ours=values[0],
        target=Target(at_most=STALL_MAX),
        baseline_name="the same on ext4",
        baseline=values[1],
    )


def save_all(directory: Path, size_bytes: int, writers: int) -> float:
    """Return how many seconds *writers* processes take to save FILES files of *size_bytes* in all."""
    context = get_context("fork")
    barrier = context.Barrier(writers + 1)
    shares = [range(first, FILES, writers) for first in range(writers)]
    children = [
        context.Process(target=_save_each, args=(directory, share, size_bytes, barrier), daemon=True)
        for share in shares
    ]
    try:
        for child in children:
            child.start()
        barrier.wait()
        started_s = time.monotonic()
        for child in children:
            child.join()
            if child.exitcode != 0:
                raise MeasurementFailed(f"a writer ended with status {child.exitcode}")
        return time.monotonic() - started_s
    finally:
        for child in children:  # Ours to end where we are interrupted: at exit Python waits for them.
            if child.pid is not None:
                child.kill()


def _save_each(directory: Path, share: range, size_bytes: int, barrier: Any) -> None:
    content = memoryview(os.urandom(WRITE_BYTES))
    barrier.wait()
    try:
        for number in share:
            save(directory / f"rank{number}.pt", content, size_bytes)
    except OSError as error:
        sys.exit(f"a writer failed: {error}")


def save(path: Path, content: memoryview, size_bytes: int) -> None:
    """Write, sync and rename, as careful savers of checkpoints do."""
    unfinished = path.with_suffix(".tmp")
    fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        left_bytes = size_bytes
        while left_bytes:
            left_bytes -= os.write(fd, content[:left_bytes])
        os.fsync(fd)
    finally:
        os.close(fd)
    os.replace(unfinished, path)


def _durable(settings: Settings, endpoint: lakes.Endpoint, path: Path, size_bytes: int) -> Figure:
    """From the first byte written to the lake's acknowledgement, over the larger of write and upload."""
    content = memoryview(os.urandom(WRITE_BYTES))

    def ours(_: int) -> float:
        with settings.mounted(endpoint, writable=True) as mount:
            started_s = time.monotonic()
            save(mount.directory / "model.pt", content, size_bytes)
            subprocess.run([sluice_command(), "sync", "--quiet", str(mount.directory)], check=True)
            return time.monotonic() - started_s

    def bare(number: int) -> float:
        with settings.directory(f"bare-{number}") as directory:
            started_s = time.monotonic()
            save(directory / "model.pt", content, size_bytes)
            written_s = time.monotonic() - started_s
            return max(written_s, in_child_s(upload, endpoint, directory / "model.pt", "bare.pt"))

    values = alternate(ours, bare, settings.rounds, f"{NAME}-durable")
    return Figure(
        name=f"{NAME}-durable",
        what=f"{size_bytes // MIB} MiB from the first byte written to the lake's acknowledgement",
        unit="s",
        ours=values[0],
        target=Target(at_most=DURABLE_MAX),
        baseline_name=f"the larger of ext4's write and boto3's multipart upload, {PARTS_AT_ONCE} at once",
        baseline=values[1],
    )


def in_child_s(work: Callable[..., None], *arguments: Any) -> float:
    """Return the seconds that *work* took in a child process, which writes them to a pipe."""
    context = get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    child = context.Process(target=_timed_child, args=(sending, work, *arguments), daemon=True)
    child.start()
    sending.close()
    try:
        return float(receiving.recv())
    except EOFError as error:
        raise MeasurementFailed(f"{work.__name__} failed") from error
    finally:
        child.join()


def _timed_child(sending: Any, work: Callable[..., None], *arguments: Any) -> None:
    started_s = time.monotonic()
    work(*arguments)
    sending.send(time.monotonic() - started_s)


def upload(endpoint: lakes.Endpoint, path: Path, key: str) -> None:
    """Send a file in parts with boto3, checksums included, a bounded number at a time."""
    client = endpoint.boto3()
    where = {"Bucket": lakes.BUCKET, "Key": key}
    upload_id = client.create_multipart_upload(**where)["UploadId"]
    fd = os.open(path, os.O_RDONLY)

    def send(number: int) -> dict[str, Any]:
        body = os.pread(fd, PART_BYTES, (number - 1) * PART_BYTES)
        reply = client.upload_part(**where, UploadId=upload_id, PartNumber=number, Body=body)
        return {"PartNumber": number, "ETag": reply["ETag"]}

    count = -(-os.fstat(fd).st_size // PART_BYTES)
    with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
        parts = list(pool.map(send, range(1, count + 1)))
    client.complete_multipart_upload(**where, UploadId=upload_id, MultipartUpload={"Parts": parts})
    os.close(fd)


def _superseded(settings: Settings, endpoint: lakes.Endpoint, size_bytes: int) -> Figure:
    """Bytes sent for a file that is replaced VERSIONS times before the first upload begins: one version."""
    content = memoryview(os.urandom(WRITE_BYTES))
    sent: list[float] = []
    for _ in range(settings.rounds):
        with settings.mounted(endpoint, ["--upload-delay=30"], writable=True) as mount:
            for _ in range(VERSIONS):
                save(mount.directory / "last.pt", content, size_bytes)
            subprocess.run([sluice_command(), "sync", "--quiet", str(mount.directory)], check=True)
            sent.append(mount.status()["lake_io"]["bytes_sent"] / size_bytes)
    return Figure(
        name=f"{NAME}-superseded",
        what=f"bytes sent for {VERSIONS} versions of which one was not superseded before its upload",
        unit="versions",
        ours=sent,
        target=Target(at_most=1.0),
    )
