"""The content of one file that is to be sent, as it was when it was looked at, and its checksums."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from cache.errors import CacheError
from cache.lake.base import Part, crc32_text
from cache.metadata import SentId, checksum_text
from cache.model import BLOCK_BYTES, MIB
from cache.records import block_checksums

_SUM_BYTES = MIB
assert _SUM_BYTES % BLOCK_BYTES == 0


class Stale(Exception):
    """What is being sent was written to, renamed or removed meanwhile: look at the row again."""


@dataclass(frozen=True, slots=True)
class Content:
    """What is to be sent, as it was when it was looked at. *fd* is None where *body* is all of it."""

    key: str
    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    id: SentId
    fd: int | None = None
    body: bytes = b""

    def check(self) -> None:
        """Raise Stale if the file has been written to since."""
        if self.fd is not None:
            status = os.fstat(self.fd)
            if (status.st_ctime_ns, status.st_size) != (self.ctime_ns, self.size_bytes):
                raise Stale(self.key)

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes of the file, blocking. Raises CacheError, Stale when it became shorter."""
        if self.fd is None:
            return self.body[offset : offset + length]
        pieces = []
        with _reading():
            while length > 0 and (piece := os.pread(self.fd, length, offset)):
                pieces.append(piece)
                offset, length = offset + len(piece), length - len(piece)
        if length:
            raise Stale(self.key)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill *buffer* with bytes of the file, blocking. Raises as `read` does."""
        assert self.fd is not None
        while len(buffer):
            with _reading():
                count = os.preadv(self.fd, [buffer], offset)
            if not count:
                raise Stale(self.key)
            buffer, offset = buffer[count:], offset + count


@dataclass(slots=True)
class Summed:
    """A content's block checksums, and its bytes where they are few."""

    checksums: array[int]
    body: bytes | None

    @property
    def text(self) -> str:
        return checksum_text(self.checksums)


@contextmanager
def opened(path: str) -> Iterator[int]:
    """Open a staging file for reading. Raises CacheError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CacheError(f"{path}: {error.strerror}") from error
    try:
        yield fd
    finally:
        os.close(fd)


def sum_small(content: Content) -> Summed:
    """Read all of it at once, blocking. Raises as `Content.read` does."""
    body = content.read(0, content.size_bytes)
    content.check()
    return Summed(array("Q", block_checksums(body)), body)


def sum_range(content: Content, start: int, stop: int) -> array[int]:
    """Return the checksums of the blocks from byte *start*, a block's first, to *stop*, blocking."""
    checksums: array[int] = array("Q")
    buffer = memoryview(bytearray(min(_SUM_BYTES, stop - start)))  # It stays in the processor's cache.
    for offset in range(start, stop, _SUM_BYTES):
        piece = buffer[: min(_SUM_BYTES, stop - offset)]
        content.read_into(piece, offset)
        checksums.extend(block_checksums(piece))
    return checksums


def read_summed(content: Content, summed: Summed, buffer: bytearray, offset: int) -> None:
    """Read a part's bytes, which must be those that the whole's checksum was made of."""
    content.read_into(memoryview(buffer), offset)
    first = offset // BLOCK_BYTES
    found = block_checksums(buffer)
    if array("Q", found) != summed.checksums[first : first + len(found)]:
        content.check()
        raise CacheError(f"{content.key}: the staging file's bytes changed on the disk")


def verified_part(content: Content, part: Part, buffer: bytearray, offset: int) -> Part | None:
    """Return the part if the lake has of exactly these bytes, as far as it tells: by MD5 or CRC32."""
    content.read_into(memoryview(buffer), offset)
    crc32 = crc32_text(buffer)
    if part.crc32 != crc32 and part.etag != _md5_etag(buffer):
        return None
    return replace(part, crc32=crc32)


def _md5_etag(body: bytearray) -> str:
    return f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'


@contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CacheError(f"a staging file can't be read: {error.strerror}") from error
