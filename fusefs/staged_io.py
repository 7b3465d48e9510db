"""System calls on staging files, and what their errors mean to who writes."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from cache.errors import CacheError, FileTooLarge, StagingFull
from cache.messages import SetAttributes
from cache.records import Attributes
from cache.staging import StagingFiles, as_written, may_say


def pwrite_all(fd: int, body: bytes, offset: int) -> int:
    """Return how many bytes were written; fewer than given where an error came after some of them."""
    rest, written = memoryview(body), 0
    while rest:
        try:
            with staging_errors():
                count = os.pwrite(fd, rest, offset + written)
        except (StagingFull, CacheError, FileTooLarge):
            if written:
                return written
            raise
        rest, written = rest[count:], written + count
    return written


def sync_bytes(fd: int) -> int:
    """Return how many bytes of the file are durable now."""
    with staging_errors():
        length = os.fstat(fd).st_size
        os.fdatasync(fd)
    return length


@dataclass(frozen=True, slots=True)
class Room:
    """How much the disk of the staging files has, and how much of it may be written now."""

    total_bytes: int
    free_bytes: int
    files: int
    free_files: int


def room_of(staging: StagingFiles, bytes_max: int) -> Room:
    """Return how much room there is, of which no more than *bytes_max* may be written. Raises CacheError."""
    with staging_errors():
        disk = os.statvfs(staging.directory)
    free_bytes = min(disk.f_bavail * disk.f_frsize, bytes_max)
    return Room(disk.f_blocks * disk.f_frsize, free_bytes, disk.f_files, disk.f_favail)


def set_while_written(staging: StagingFiles, number: int, own: Attributes, request: SetAttributes) -> bool:
    """Set the mtime and mode of staging file *number*, which a node has with the attributes *own*.

    Returns False, with nothing done, where that is not all there is to do. written.c does the same.
    """
    status = os.stat(staging.path(number))
    own = as_written(own, status)
    if request.uid not in (None, own.uid) or request.gid not in (None, own.gid):
        return False
    if request.mode is not None and request.mode != own.mode:
        if not may_say(request.mode):
            return False
        staging.set_mode(number, request.mode)
    set_times(staging, number, status, request)
    return True


def set_times(staging: StagingFiles, number: int, now: os.stat_result, request: SetAttributes) -> None:
    """Set those times that *request* names; the file has *now*, and others stay."""
    atime_ns = now.st_atime_ns if request.atime_ns is None else request.atime_ns
    mtime_ns = now.st_mtime_ns if request.mtime_ns is None else request.mtime_ns
    with staging_errors(), suppress(FileNotFoundError):  # The lake has it by now.
        os.utime(staging.path(number), ns=(atime_ns, mtime_ns))


@contextmanager
def staging_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StagingFull(f"staging files: {error.strerror}") from error
        if error.errno == errno.EFBIG:
            raise FileTooLarge("the disk of the staging files takes no larger file") from error
        raise CacheError(f"staging files: {error.strerror}") from error
