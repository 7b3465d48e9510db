"""Group commit: changes that are waiting together become one index transaction."""

from __future__ import annotations

from collections.abc import Callable

import trio

from cache.errors import CacheError
from cache.index import Index, IndexWriter

Change = Callable[[IndexWriter], None]


class _Waiter:
    __slots__ = ("change", "done", "error")

    def __init__(self, change: Change) -> None:
        self.change = change
        self.done = trio.Event()
        self.error: CacheError | None = None


class Committer:
    """The mover's one way to change the index. `run` must be started in the mover's nursery."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._pending: list[_Waiter] = []
        self._wake = trio.Event()

    async def commit(self, change: Change) -> None:
        """Apply *change* and return when it is committed. Raises CacheError.

        A change that was queued is applied even if the caller is cancelled while it waits.
        """
        waiter = _Waiter(change)
        self._pending.append(waiter)
        self._wake.set()
        await waiter.done.wait()
        if waiter.error is not None:
            raise waiter.error

    def commit_nowait(self, change: Change) -> None:
        """Apply *change* with the next transaction; failures show in the log only."""
        self._pending.append(_Waiter(change))
        self._wake.set()

    async def run(self) -> None:
        while True:
            await self._wake.wait()
            self.flush()

    def flush(self) -> None:
        self._wake = trio.Event()
        waiters, self._pending = self._pending, []
        error: CacheError | None = None
        try:
            with self._index.write() as writer:
                for waiter in waiters:
                    waiter.change(writer)
        except CacheError as failure:
            error = failure
        for waiter in waiters:
            waiter.error = error
            waiter.done.set()
