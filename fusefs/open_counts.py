"""Opens and closes as a writable mount counts them, and what the mover hears of it. Knows no pyfuse3."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cache.client import MoverClient
from cache.index import Index
from cache.messages import Closed, Settle
from cache.model import Inode
from cache.opens import OpenTable
from fusefs.passthrough import Passthrough

_CLOSING = 1  # The lowest bit of a request's number is free (linux/fuse.h: FUSE_INT_REQ_BIT).


class OpenCounts:
    """*opens*: None where nobody counts (tests): then the mover is told of every close."""

    def __init__(
        self, index: Index, mover: MoverClient, opens: OpenTable | None, passthrough: Passthrough | None
    ) -> None:
        self._index = index
        self._mover = mover
        self._opens = opens
        self._passthrough = passthrough

    def opened(self, inode: Inode, *, writing: bool, id: int) -> None:
        """Count one more open, to be answered later. *id*: of its request."""
        if self._passthrough is not None:
            self._passthrough.counted(inode, writing=writing, request=id)
        elif self._opens is not None:
            self._opens.opened(inode, writing=writing, request=id)
        if writing and self._opens is not None:
            self._opens.withdraw_grant(inode)

    async def settled(self, inode: Inode) -> None:
        """Return once the index says whether *inode* is there: it stays now that its open is counted.

        Where it is gone, whoever asks for its node next raises ObjectMissing; the kernel then looks the
        path up again.
        """
        if self._opens is not None and self._opens.may_leave(inode):
            await self._mover.ask(Settle())

    def failed(self, inode: Inode, *, writing: bool, id: int) -> None:
        """Take back what was counted for the open *id*: it failed."""
        self.closed(inode, writing=writing, id=id and id | _CLOSING)

    def closed(self, inode: Inode, *, writing: bool, id: int) -> None:
        """Count a close; tell the mover when nobody writes any more, or has the unlinked file open."""
        if self._opens is None:
            self._mover.tell(Closed(inode))
            return
        counts = self._passthrough or self._opens
        state = counts.closed(inode, writing=writing, request=id)
        if (writing and not state.may_be_written) or (not state.is_open and self._awaits_close(inode)):
            self._mover.tell(Closed(inode))

    def closed_granted(self, inode: Inode) -> None:
        """One of the opens that the channel answered is closed, and counted off."""
        if self._opens is not None and not self._opens.state(inode).is_open and self._awaits_close(inode):
            self._mover.tell(Closed(inode))

    def _awaits_close(self, inode: Inode) -> bool:
        """Return whether the mover does something once nobody has the file open, readers included.

        It may be about to take the file's name: what it finds open then waits for this close.
        """
        if self._opens is not None and self._opens.may_leave(inode):
            return True
        if self._index.is_detached(inode):
            return True
        node = self._index.node(inode)
        return self._passthrough is not None and node is not None and node.staged != 0

    @asynccontextmanager
    async def as_writer(self, inode: Inode, id: int) -> AsyncIterator[None]:
        """Count as a writer. Should we die inside, the request comes again and sets the count right."""
        self.opened(inode, writing=True, id=id)
        try:
            await self.settled(inode)
            yield
        finally:
            self.failed(inode, writing=True, id=id)
