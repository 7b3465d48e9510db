"""System calls on staging files, and what their errors mean to who writes."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from cache.errors import CacheError, FileTooLarge, StagingFull


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
