"""What bounds sending: how many requests are under way, and the memory that parts are sent from."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from cache.policy.writeback import Slots


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
            assert len(buffer) == size_bytes  # A part of another size would make another object.
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
