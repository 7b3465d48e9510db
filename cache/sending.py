"""Sends the content of one file: a PUT, or the parts of a multipart upload, resumed where it stopped."""

from __future__ import annotations

import time
from array import array
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import trio

from cache.contents import Content, Stale, Summed, read_summed, sum_range, sum_small, verified_part
from cache.errors import SluiceError
from cache.lake.base import Part
from cache.lake_io import LakeIO
from cache.model import BLOCK_BYTES, MIB, ObjectInfo, block_count, ceil_div
from cache.pending import ANY_ETAG
from cache.policy.writeback import SINGLE_PUT_BYTES_MAX, TokenBucket
from cache.send_limits import PartBuffers, SlotGate

_MEMORY_BYTES_MAX = 256 * MIB  # Of bodies that are being sent, all files together.
_READ_BYTES, _SUMS_AT_ONCE = 16 * MIB, 2  # For the checksums: of this much in one job of a thread.
assert _READ_BYTES % BLOCK_BYTES == SINGLE_PUT_BYTES_MAX % BLOCK_BYTES == 0


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
            return await self._lake.run(lambda: sum_small(content))
        checksums = array("Q", bytes(8 * block_count(content.size_bytes)))
        starts = iter(range(0, content.size_bytes, _READ_BYTES))

        async def sum_some() -> None:
            for start in starts:
                stop = min(start + _READ_BYTES, content.size_bytes)
                found = await self._lake.run(partial(sum_range, content, start, stop))
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
                    await self._lake.run(partial(read_summed, content, summed, buffer, offset))
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
                verify = partial(verified_part, content, part, buffer, offset)
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
