"""Group commit: changes that are waiting together become one index transaction."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

import trio

from cache.errors import CacheError, SluiceError
from cache.index import Index
from cache.index_writer import IndexWriter

log = logging.getLogger(__name__)
T = TypeVar("T")

Change = Callable[[IndexWriter], T]

_PATIENCE_S = 0.01  # So long a change that is in no hurry waits for others to share their transaction.


class _Waiter(Generic[T]):
    __slots__ = ("change", "done", "error", "result", "then")

    def __init__(self, change: Change[T], then: Callable[[SluiceError | None], None] | None = None) -> None:
        self.change = change
        self.done: trio.Event | None = None
        self.then = then
        self.result: T | None = None
        self.error: SluiceError | None = None

    def tell(self) -> None:
        """Tell whoever waits that the transaction is over."""
        if self.done is not None:
            self.done.set()
        if self.then is not None:
            try:
                self.then(self.error)
            except Exception:  # The others of the transaction wait, too.
                log.exception("what follows a change of the index failed")

    def apply(self, writer: IndexWriter) -> None:
        """Carry out the change. What it refuses before its first write concerns nobody else."""
        try:
            self.result = self.change(writer)
        except SluiceError as error:
            self.error = error


class Committer:
    """The mover's one way to change the index. `run` must be started in the mover's nursery.

    *on_rollback* is called after a transaction that failed: what its changes did to memory besides
    is to be taken back there.
    """

    def __init__(self, index: Index, on_rollback: Callable[[], None] = lambda: None) -> None:
        self._index = index
        self.on_rollback = on_rollback
        self.on_nodes: Callable[[set[int]], None] = _nothing  # Gets the nodes that a commit has changed.
        # Gets (inode, name) for each name that a node is about to lose, before anybody sees it.
        self.on_names: Callable[[list[tuple[int, bytes]]], None] = _nothing
        self.on_end: Callable[[], None] = lambda: None  # Called when a transaction is over, come what may.
        self._pending: list[_Waiter[Any]] = []
        self._queued = trio.Event()
        self._hurry = trio.Event()
        self._due: list[_Waiter[Any]] = []

    async def commit(self, change: Change[T], *, patient: bool = False) -> T:
        """Apply *change* and return what it returned, once that is committed.

        A *patient* one goes with the next transaction that somebody wants, or after a moment alone.

        Raises the SluiceError that *change* raised, which it may before its first write: the others
        of the transaction are committed then. Raises CacheError when the transaction failed. A change
        that was queued is applied even if the caller is cancelled while it waits.
        """
        waiter = _Waiter(change)
        waiter.done = trio.Event()
        self._add(waiter, patient=patient)
        await waiter.done.wait()
        if waiter.error is not None:
            raise waiter.error
        return waiter.result  # type: ignore[return-value]  # Set where there is no error.

    def commit_now(self, change: Change[T]) -> T:
        """Do what `commit` does at once, with all that waits: for what may not await in between."""
        waiter = _Waiter(change)
        self._pending.append(waiter)
        self.flush()
        if waiter.error is not None:
            raise waiter.error
        return waiter.result  # type: ignore[return-value]  # Set where there is no error.

    def commit_nowait(self, change: Change[object]) -> None:
        """Apply *change* with the next transaction; failures show in the log only."""
        self._add(_Waiter(change))

    def commit_then(
        self, change: Change[object], then: Callable[[SluiceError | None], None], *, patient: bool = False
    ) -> None:
        """Apply *change* with the next transaction; call *then* with what `commit` would raise, or None."""
        self._add(_Waiter(change, then), patient=patient)

    def commit_due(self, change: Change[object], then: Callable[[SluiceError | None], None]) -> None:
        """The same for who calls `flush_due` before it waits for anything: `run` need not be woken.

        *change* must not depend on what waits with patience: that is left for the next transaction.
        """
        self._due.append(_Waiter(change, then))

    def flush_due(self) -> None:
        """Commit what is due, if anything is."""
        due, self._due = self._due, []
        self._commit(due)

    def _add(self, waiter: _Waiter[Any], *, patient: bool = False) -> None:
        self._pending.append(waiter)
        self._queued.set()
        if not patient:
            self._hurry.set()

    async def run(self) -> None:
        while True:
            await self._queued.wait()
            if not self._hurry.is_set():
                with trio.move_on_after(_PATIENCE_S):
                    await self._hurry.wait()
            self._queued, self._hurry = trio.Event(), trio.Event()
            self.flush()

    def flush(self) -> None:
        """Commit what waits, now; `run` may find nothing left then."""
        waiters, self._pending = self._pending, []
        self._commit(waiters)

    def _commit(self, waiters: list[_Waiter[Any]]) -> None:
        if not waiters:
            return
        try:
            with self._index.write() as writer:
                for waiter in waiters:
                    waiter.apply(writer)
                self.on_names(writer.lost_names)
            self.on_nodes(writer.changed_nodes)
        except Exception as failure:
            self._fail(waiters, failure)
        finally:
            self.on_end()
        for waiter in waiters:
            waiter.tell()

    def _fail(self, waiters: list[_Waiter[Any]], failure: Exception) -> None:
        """Nothing of the transaction happened: tell all who wait, even those who were refused."""
        if isinstance(failure, CacheError):
            error = failure
        else:  # A fault of ours fails these changes, not every mount's mover.
            log.exception("a change of the index failed, and %d with it", len(waiters) - 1)
            error = CacheError(f"{type(failure).__name__}: {failure}")
        for waiter in waiters:
            waiter.error = error
        self.on_rollback()


def _nothing(changed: Iterable[object]) -> None:
    """Nobody remembers nodes or names."""
