"""Sends the content of one file: a PUT, or the parts of a multipart upload, resumed where it stopped."""

from __future__ import annotations

import hashlib
import os
import time
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import trio

from cache.errors import CacheError, SluiceError
from cache.lake.base import Part, crc32_text
from cache.lake_io import LakeIO
from cache.metadata import SentId, checksum_text
from cache.model import BLOCK_BYTES, MIB, ObjectInfo, block_count, ceil_div
from cache.pending import ANY_ETAG
from cache.policy.writeback import SINGLE_PUT_BYTES_MAX, Slots, TokenBucket
from cache.records import block_checksums

_MEMORY_BYTES_MAX = 256 * MIB  # Of bodies that are being sent, all files together.
_READ_BYTES = 16 * MIB  # For the checksums: of this much in one job of a thread,
_SUM_BYTES, _SUMS_AT_ONCE = MIB, 2  # in pieces of so much.
assert _READ_BYTES % BLOCK_BYTES == SINGLE_PUT_BYTES_MAX % BLOCK_BYTES == _SUM_BYTES % BLOCK_BYTES == 0


class Stale(Exception):
    """What is being sent was written to, renamed or removed meanwhile: look at the row again."""


class SlotGate:
    """`Slots` that can be waited for."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._slots = Slots(total)

    @asynccontextmanager
    async def slot(self, part_of: object | None = None) -> AsyncIterator[None]:
        """Have one request under way while the block runs; *part_of*: the large file it is for."""
        granted = trio.Event()
        self._slots.ask(granted, part_of)
        self._grant()
        try:
            await granted.wait()
            yield
        finally:
            if granted.is_set():
                self._slots.release(large=part_of is not None)
            else:
                self._slots.withdraw(granted, part_of)
            self._grant()

    def _grant(self) -> None:
        while (granted := self._slots.grant()) is not None:
            assert isinstance(granted, trio.Event)
            granted.set()


class PartBuffers:
    """Bounds the bytes held; who asks first goes first. One that is larger than all may be alone.

    A buffer is used again for the next part: fresh memory costs a page fault for each 4 KiB, and what
    threads allocate and free stays with the process.
    """

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._used_bytes = 0
        self._idle: list[bytearray] = []  # All of one size.
        self._queue = trio.StrictFIFOLock()
        self._freed = trio.Event()

    @asynccontextmanager
    async def held(self, size_bytes: int) -> AsyncIterator[bytearray]:
        """Have a buffer of this size while the block runs."""
        async with self._queue:
            while self._used_bytes and self._used_bytes + size_bytes > self._bytes_max:
                self._freed = trio.Event()
                await self._freed.wait()
            self._used_bytes += size_bytes
        try:
            self._keep_only(size_bytes)
            buffer = self._idle.pop() if self._idle else bytearray(size_bytes)
            yield buffer
            self._keep_only(size_bytes)
            self._idle.append(buffer)  # Not after an exception: a thread may still be sending from it.
        finally:
            self._used_bytes -= size_bytes
            if not self._used_bytes:
                self._idle.clear()
            self._freed.set()

    def _keep_only(self, size_bytes: int) -> None:
        """Give back idle buffers of another size: a part sent from one would be cut off."""
        if self._idle and len(self._idle[0]) != size_bytes:
            self._idle.clear()


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


@dataclass
class Upload:
    """A multipart upload under way. *save* commits its id before the first part is sent."""

    part_bytes: int
    save: Callable[[str], Awaitable[None]]
    id: str = ""
    parts: dict[int, Part] = field(default_factory=dict)


class Sender:
    def __init__(self, lake: LakeIO, slots: SlotGate, bandwidth: TokenBucket) -> None:
        self._lake = lake
        self._slots = slots
        self._bandwidth = bandwidth
        self._buffers = PartBuffers(_MEMORY_BYTES_MAX)

    async def sum(self, content: Content) -> Summed:
        """Read all of it once. Raises Stale, CacheError."""
        if content.size_bytes <= SINGLE_PUT_BYTES_MAX:
            return await self._lake.run(lambda: _sum_small(content))
        checksums = array("Q", bytes(8 * block_count(content.size_bytes)))
        starts = iter(range(0, content.size_bytes, _READ_BYTES))

        async def sum_some() -> None:
            for start in starts:
                stop = min(start + _READ_BYTES, content.size_bytes)
                found = await self._lake.run(partial(_sum_range, content, start, stop))
                first = start // BLOCK_BYTES
                checksums[first : first + len(found)] = found
                content.check()

        await run_all([sum_some] * _SUMS_AT_ONCE)
        return Summed(checksums, None)

    async def put(
        self, content: Content, summed: Summed, metadata: dict[str, str], base_etag: str
    ) -> ObjectInfo:
        """Send it in one request. Raises Stale before, LakeError."""
        body = summed.body if summed.body is not None else content.body
        await self._wait_for_bandwidth(content.size_bytes)
        async with self._slots.slot():
            content.check()
            if_match, if_none_match = conditions(base_etag)
            return await self._lake.put(
                content.key, body, metadata, if_match=if_match, if_none_match=if_none_match
            )

    async def put_parts(
        self,
        content: Content,
        summed: Summed,
        metadata: dict[str, str],
        base_etag: str,
        upload: Upload,
        on_sent: Callable[[int], None],
    ) -> ObjectInfo:
        """Send it in parts, those that the lake has already left out.

        Raises Stale, LakeError; ObjectMissing where the upload is not known (any more). The upload
        stays, for the next try: it is for the caller to abort.
        """
        if upload.id:
            upload.parts = await self._verified(content, upload)
            on_sent(sum(part.size_bytes for part in upload.parts.values()))
        else:
            upload.id = await self._lake.start_multipart(content.key, metadata)
            await upload.save(upload.id)
        numbers = iter(range(1, ceil_div(content.size_bytes, upload.part_bytes) + 1))
        missing = (number for number in numbers if number not in upload.parts)
        send_some = partial(self._send_some, content, summed, upload, missing, on_sent)
        await run_all([send_some] * self._slots.total)
        content.check()
        if_match, if_none_match = conditions(base_etag)
        parts = [upload.parts[number] for number in sorted(upload.parts)]
        return await self._lake.complete_multipart(
            content.key, upload.id, parts, if_match=if_match, if_none_match=if_none_match
        )

    async def _send_some(
        self,
        content: Content,
        summed: Summed,
        upload: Upload,
        numbers: Iterator[int],
        on_sent: Callable[[int], None],
    ) -> None:
        for number in numbers:
            offset = (number - 1) * upload.part_bytes
            length = min(upload.part_bytes, content.size_bytes - offset)
            async with self._buffers.held(length) as buffer:
                await self._wait_for_bandwidth(length)
                async with self._slots.slot(part_of=content.key):
                    content.check()
                    await self._lake.run(partial(_read_summed, content, summed, buffer, offset))
                    part = await self._lake.put_part(content.key, upload.id, number, buffer)
            upload.parts[number] = part
            on_sent(length)

    async def _verified(self, content: Content, upload: Upload) -> dict[int, Part]:
        """Return the parts that the lake has of exactly these bytes, as far as it tells: by MD5 or CRC32."""
        good: dict[int, Part] = {}
        for part in await self._lake.list_parts(content.key, upload.id):
            offset = (part.number - 1) * upload.part_bytes
            length = min(upload.part_bytes, content.size_bytes - offset)
            if length <= 0 or part.size_bytes != length:
                continue
            async with self._buffers.held(length) as buffer:
                verify = partial(_verified_part, content, part, buffer, offset)
                if (verified := await self._lake.run(verify)) is not None:
                    good[part.number] = verified
        return good

    async def _wait_for_bandwidth(self, size_bytes: int) -> None:
        delay_s = self._bandwidth.take(size_bytes, time.monotonic())
        if delay_s > 0:
            await trio.sleep(delay_s)


def conditions(base_etag: str) -> tuple[str | None, bool]:
    """Return (if_match, if_none_match) for what the lake may have under the key: see `pending.Put`."""
    return None if base_etag in ("", ANY_ETAG) else base_etag, base_etag == ""


@contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CacheError(f"a staging file can't be read: {error.strerror}") from error


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


async def run_all(calls: Iterable[Callable[[], Awaitable[None]]]) -> None:
    """Run them at once. Raises the first SluiceError or Stale of theirs, not a group; the others end."""
    error: Exception | None = None
    try:
        async with trio.open_nursery() as nursery:
            for call in calls:
                nursery.start_soon(call)
    except* (SluiceError, Stale) as group:
        error = _first(group)  # Raised in here it would be wrapped in a group again.
    if error is not None:
        raise error


def _first(group: BaseExceptionGroup[BaseException]) -> Exception:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, Exception)
    return error


def _sum_small(content: Content) -> Summed:
    body = content.read(0, content.size_bytes)
    content.check()
    return Summed(array("Q", block_checksums(body)), body)


def _sum_range(content: Content, start: int, stop: int) -> array[int]:
    checksums: array[int] = array("Q")
    buffer = memoryview(bytearray(min(_SUM_BYTES, stop - start)))  # It stays in the processor's cache.
    for offset in range(start, stop, _SUM_BYTES):
        piece = buffer[: min(_SUM_BYTES, stop - offset)]
        content.read_into(piece, offset)
        checksums.extend(block_checksums(piece))
    return checksums


def _read_summed(content: Content, summed: Summed, buffer: bytearray, offset: int) -> None:
    """Read a part's bytes, which must be those that the whole's checksum was made of."""
    content.read_into(memoryview(buffer), offset)
    first = offset // BLOCK_BYTES
    found = block_checksums(buffer)
    if array("Q", found) != summed.checksums[first : first + len(found)]:
        content.check()
        raise CacheError(f"{content.key}: the staging file's bytes changed on the disk")


def _verified_part(content: Content, part: Part, buffer: bytearray, offset: int) -> Part | None:
    content.read_into(memoryview(buffer), offset)
    crc32 = crc32_text(buffer)
    if part.crc32 != crc32 and part.etag != _md5_etag(buffer):
        return None
    return replace(part, crc32=crc32)


def _md5_etag(body: bytearray) -> str:
    return f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'
