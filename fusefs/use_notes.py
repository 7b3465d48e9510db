"""What this process's readers used, gathered for the mover: its policies and read-ahead go by it."""

from __future__ import annotations

import time
from collections.abc import Callable

import trio

from cache.client import MoverClient
from cache.messages import ReadSeen, Used
from cache.model import MIB

_USED_BATCH = 128
_TELL_BYTES = 2 * MIB  # The read-ahead hears of a sequential reader's hits every so often,
_READS_BATCH = 64  # and of others' when so many have gathered, or before the next miss.
_TELL_S = 0.25


class UseNotes:
    """*gather* is called before the mover is told, to note what is known elsewhere."""

    def __init__(self, mover: MoverClient, gather: Callable[[], None]) -> None:
        self._mover = mover
        self._gather = gather
        self._items: list[bytes] = []
        self._files: list[int] = []
        self._at_s: list[float] = []
        self._reads: list[tuple[int, int, int]] = []  # Hits in large files: inode, offset, length.

    def __contains__(self, item: bytes) -> bool:
        return item in self._items

    def file(self, inode: int, at_s: float | None = None) -> None:
        """Note that the file was opened, or read where opens are not seen. *at_s*: now, by default."""
        self._files.append(inode)
        self._at_s.append(time.time() if at_s is None else at_s)

    def item(self, item: bytes) -> None:
        """Note the use of what a policy knows by *item*; the mover is told later."""
        self._items.append(item)

    def items(self, *items: bytes) -> None:
        """Note uses, and tell the mover if many have gathered."""
        self._items += items
        if len(self._items) >= _USED_BATCH:
            self.tell()

    def read(self, inode: int, offset: int, length: int) -> None:
        """Note a hit in a large file, with those next to it."""
        if self._reads:
            last, start, before = self._reads[-1]
            if last == inode and start + before == offset:
                self._reads.pop()
                offset, length = start, before + length
        self._reads.append((inode, offset, length))
        if len(self._reads) >= _READS_BATCH or offset // _TELL_BYTES != (offset + length) // _TELL_BYTES:
            self._tell_reads()

    def tell(self) -> None:
        """Tell the mover which cached items were used, for its eviction policy, and what was read."""
        self._tell_reads()
        self._gather()
        if self._items:
            self._mover.tell(Used(self._items, self._files, self._at_s))
            self._items, self._files, self._at_s = [], [], []

    async def tell_regularly(self) -> None:
        while True:
            await trio.sleep(_TELL_S)
            self.tell()

    def _tell_reads(self) -> None:
        if self._reads:
            self._mover.tell(ReadSeen(self._reads))
            self._reads = []
