"""Whole-file operations on descriptors, for the lake in a directory. All raise OSError."""

from __future__ import annotations

import errno
import os
import time
from contextlib import suppress

from cache.lake.base import Body
from cache.model import MIB

_COPY_BYTES = 64 * MIB


def stamp(fd: int) -> os.stat_result:
    """Return a finished file's status, after giving it a time that no earlier file had.

    The kernel's own clock for files ticks every few milliseconds, and an inode number that a
    replaced file left is used again at once: without this, two versions could share an ETag.
    """
    now_ns = time.time_ns()
    os.utime(fd, ns=(now_ns, now_ns))
    return os.fstat(fd)


def sync_directory(path: bytes) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sweep(directory: bytes, age_s: float) -> None:
    """Delete the files that nobody wrote to for *age_s*. What can't be deleted stays."""
    before_s = time.time() - age_s
    with os.scandir(directory) as entries:
        for entry in entries:
            with suppress(OSError):
                if entry.stat(follow_symlinks=False).st_mtime < before_s:
                    os.unlink(entry.path)


def read(fd: int, offset: int, length: int) -> bytes:
    """Return the bytes at *offset*; fewer only at the file's end."""
    first = os.pread(fd, length, offset)
    if len(first) in (0, length):
        return first
    pieces = [first]
    while piece := os.pread(fd, length - sum(map(len, pieces)), offset + sum(map(len, pieces))):
        pieces.append(piece)
    return b"".join(pieces)


def write(fd: int, body: Body) -> None:
    rest = memoryview(body)
    while rest:
        rest = rest[os.write(fd, rest) :]


def copy_bytes(source_fd: int, target_fd: int, length: int) -> None:
    """Append *length* bytes from the start of the source; the kernel shares the blocks if it can."""
    offset = 0
    while offset < length:
        count = _copy_some(source_fd, target_fd, min(length - offset, _COPY_BYTES), offset)
        if count == 0:
            return  # Shortened meanwhile; the caller verifies it.
        offset += count


def _copy_some(source_fd: int, target_fd: int, length: int, offset: int) -> int:
    try:
        return os.copy_file_range(source_fd, target_fd, length, offset_src=offset)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise
        return os.sendfile(target_fd, source_fd, offset, length)
