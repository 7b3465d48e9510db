"""Brings to the lake what is pending, and tells and asks about it: queue, receipts, drain, conflicts."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from functools import partial

import msgspec
import trio

from cache.committer import Committer
from cache.dispatching import Dispatcher, RefreshEntry
from cache.errors import LakeError, NameMissing, ObjectMissing
from cache.index import Index
from cache.index_writer import IndexWriter
from cache.journaling import JournalKeeper
from cache.lake_io import LakeIO
from cache.model import Inode
from cache.opens import OpenTable
from cache.pending import (
    CONFLICT,
    FAILED,
    OPEN,
    SEALED,
    Delete,
    Local,
    Move,
    Orphan,
    Pending,
    PendingTable,
    Put,
    path_of,
)
from cache.planning import Progress, UploadConfig
from cache.residency import Residency
from cache.staging import StagingFiles
from cache.uploading import Receipt

log = logging.getLogger(__name__)

_RECEIPTS_MAX = 10_000
_RECEIPTS_AT_ONCE = 50  # Of each the index is asked four times, 25 us in all.
_RECOUNT_S = 1.0  # Who drains counts again so often, also while nothing ends,
_COUNT_SHARE = 20  # and at most for this part of the time: there may be very many rows.
replace = msgspec.structs.replace


class Uploader:
    """Make it after the table was loaded, before anybody changes it; `run` goes into the mover's nursery."""

    def __init__(
        self,
        nursery: trio.Nursery,
        lake: LakeIO,
        index: Index,
        committer: Committer,
        table: PendingTable,
        staging: StagingFiles,
        residency: Residency,
        opens: OpenTable | None,
        keeper: JournalKeeper,
        config: UploadConfig,
        refresh_entry: RefreshEntry,
    ) -> None:
        """*refresh_entry*: the lister's; called where the lake turned out to have something else."""
        self._lake = lake
        self._index = index
        self._committer = committer
        self._table = table
        self._staging = staging
        self._refresh_entry = refresh_entry
        self._receipts: OrderedDict[int, Receipt] = OrderedDict()
        self._counted_for_s = 0.0
        self._dispatcher = Dispatcher(
            nursery,
            lake,
            index,
            committer,
            table,
            staging,
            residency,
            opens,
            keeper,
            config,
            refresh_entry,
            self._keep_receipt,
        )

    async def run(self) -> None:
        """Work for ever."""
        await self._dispatcher.run()

    def wake(self) -> None:
        """Have rows that changed looked at. To be called after each commit that changed some."""
        self._dispatcher.wake()

    def renamed(self, parent: int, name: bytes) -> None:
        """Take note of what has this name from now on."""
        self._dispatcher.checkpoints.renamed(parent, name)

    @property
    def dirty_bytes(self) -> int:
        """The bytes in staging files that the lake has not."""
        return self._dispatcher.plans.dirty_bytes

    # Waiting

    async def wait_for(self, inode: int) -> None:
        """Return when the lake has the file as it is now. Raises LakeError where it won't, for now."""
        urgent = self._dispatcher.plans.urgent
        urgent[inode] += 1
        self._dispatcher.look_again(seq for seq, _ in self._table.of_inode(inode))
        try:
            asked_ns = self._state_ns(inode)
            while self._lacks(inode, asked_ns):
                await self._dispatcher.moved_on.wait()
        finally:
            urgent[inode] -= 1
            if not urgent[inode]:
                del urgent[inode]

    def _state_ns(self, inode: int) -> int:
        for _, row in self._table.of_inode(inode):
            if isinstance(row, Put) and row.staged:
                return self._staging.stat(row.staged).st_ctime_ns
        return 1

    def _lacks(self, inode: int, asked_ns: int) -> bool:
        """Return whether the lake has no state of the file that is as new. Raises LakeError."""
        for seq, row in self._table.of_inode(inode):
            if not isinstance(row, Put):
                continue
            if row.state == CONFLICT:
                raise LakeError(f"conflict: {row.error}")
            progress = self._dispatcher.plans.progress.get(seq)
            if progress is not None and progress.refused:
                raise LakeError(progress.error)
            return progress is None or not (progress.is_idle or progress.uploaded_ns >= asked_ns)
        return False

    async def drain(self, on_progress: Callable[[int, int], None] | None = None, below: bytes = b"") -> None:
        """Return when nothing is left but what is in conflict or was refused; quiet times are over.

        *on_progress* gets the operations and bytes that are left, whenever they change. *below*: only
        what is at or below this path is waited for.
        """
        dispatcher = self._dispatcher
        dispatcher.plans.hurries += 1
        try:
            dispatcher.look_again(self._table.rows)
            while left := self._count_left(below):
                if on_progress is not None:
                    on_progress(left, dispatcher.plans.dirty_bytes)
                await self._recount_pause(dispatcher.moved_on)
        finally:
            dispatcher.plans.hurries -= 1

    def _count_left(self, below: bytes) -> int:
        started_s = time.monotonic()
        left = self._dispatcher.count_left(partial(_is_at, path=below) if below else None)
        self._counted_for_s = time.monotonic() - started_s
        return left

    async def _recount_pause(self, moved_on: trio.Event) -> None:
        with trio.move_on_after(_RECOUNT_S):
            await moved_on.wait()
        await trio.sleep(_COUNT_SHARE * self._counted_for_s)

    # Telling

    def queue(self) -> list[dict[str, object]]:
        """Return all pending operations, oldest first, for `sluice queue`."""
        return [
            self._described(seq, row)
            for seq, row in sorted(self._table.rows.items())
            if not isinstance(row, Local | Orphan)
        ]

    def _described(self, seq: int, row: Pending) -> dict[str, object]:
        progress = self._dispatcher.plans.progress.get(seq) or Progress(time.time(), time.time())
        path = row.key if isinstance(row, Delete) else path_of(row)
        return {
            "path": os.fsdecode(path or b""),
            "operation": type(row).__name__.lower(),
            "state": self._state(seq, row, progress),
            "bytes": progress.dirty_bytes,
            "sent": progress.sent_bytes,
            "error": progress.error or getattr(row, "error", ""),
            "since": getattr(row, "sealed_at_s", 0.0) or progress.since_s,
        }

    def _state(self, seq: int, row: Pending, progress: Progress) -> str:
        if isinstance(row, Put) and row.state == CONFLICT:
            return CONFLICT
        if seq in self._dispatcher.busy:
            return "running"
        if progress.refused or (isinstance(row, Put) and row.state == FAILED):
            return FAILED
        if progress.attempts:
            return "retrying"
        if isinstance(row, Put) and seq in self._dispatcher.plans.open:
            return OPEN
        return "waiting"

    async def receipts(self, below: Collection[bytes] = (b"",)) -> list[dict[str, object]]:
        """Return what was stored last of each file that is at or below one of these paths, oldest first."""
        found = []
        for number, (inode, receipt) in enumerate(list(self._receipts.items())):
            if number % _RECEIPTS_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
            node = self._index.node(inode)
            if node is None or self._index.is_detached(inode):
                self._receipts.pop(inode, None)  # Removed, or another's by now.
            elif not set(_ancestry(path := self._index.path_of(inode))).isdisjoint(below):
                is_clean = node.etag and not node.staged  # Else it is open still.
                if is_clean:  # It may have been moved in the lake since.
                    receipt = dataclasses.replace(receipt, key=self._index.key_of(inode), etag=node.etag)
                found.append(_told(receipt, path))
        return found

    def _keep_receipt(self, receipt: Receipt) -> None:
        self._receipts.pop(receipt.inode, None)
        self._receipts[receipt.inode] = receipt
        if len(self._receipts) > _RECEIPTS_MAX:
            self._receipts.popitem(last=False)

    # Mending

    async def retry(self, path: bytes | None = None) -> int:
        """Try what failed at once again, at or below *path* (None: all); return how many."""
        count = 0
        for seq, row in sorted(self._table.rows.items()):
            progress = self._dispatcher.plans.progress.get(seq)
            if progress is None or not progress.attempts or not _is_at(row, path):
                continue
            count += 1
            self._dispatcher.plans.forgive(seq)
            await self._committer.commit(partial(self._clear_error, seq))
        self._dispatcher.look_again(self._table.rows)
        return count

    def _clear_error(self, seq: int, w: IndexWriter) -> None:
        row = self._table.rows.get(seq)
        if isinstance(row, Put) and row.state == FAILED:
            self._table.replace(w, seq, replace(row, state=SEALED, error=""))
        else:
            self._dispatcher.plans.put_error(seq, "", w)

    async def resolve(self, path: bytes, keep: str) -> None:
        """End a conflict: what was written here replaces the lake's ("ours") or is put aside ("theirs").

        Raises NameMissing where there is no conflict, LakeError.
        """
        assert keep in ("ours", "theirs"), keep
        found = self._table.put_at(path)
        if found is None or found[1].state != CONFLICT:
            raise NameMissing(f"{os.fsdecode(path)}: there is no conflict")
        seq, row = found
        if keep == "ours":
            await self._keep_ours(seq, row)
        else:
            await self._keep_theirs(seq, row)

    async def _keep_ours(self, seq: int, row: Put) -> None:
        try:
            etag = (await self._lake.head(os.fsdecode(row.key))).version.etag
        except ObjectMissing:
            etag = ""

        def change(w: IndexWriter) -> None:
            now = self._table.rows.get(seq)
            if isinstance(now, Put) and now.state == CONFLICT:
                self._table.replace(w, seq, replace(now, base_etag=etag, state=SEALED, error=""))

        await self._committer.commit(change)
        self._dispatcher.wake()

    async def _keep_theirs(self, seq: int, row: Put) -> None:
        def change(w: IndexWriter) -> tuple[int, bytes] | None:
            now = self._table.rows.get(seq)
            if not isinstance(now, Put) or now.state != CONFLICT:
                return None
            self._table.remove(w, seq)
            node = w.node(now.inode)
            if node is None or w.is_detached(now.inode):
                return None
            w.detach(node.parent, node.name)
            return node.parent, node.name

        entry = await self._committer.commit(change)
        if row.staged:
            kept = await self._lake.run(lambda: self._staging.to_lost_found(row.staged, row.path))
            log.info("%s: the lake's object counts; what was written here is %s", os.fsdecode(row.path), kept)
        self._dispatcher.wake()
        if entry is not None:
            await self._refresh_entry(Inode(entry[0]), entry[1])


def _told(receipt: Receipt, path: bytes) -> dict[str, object]:
    return {
        "path": os.fsdecode(path),
        "key": os.fsdecode(receipt.key),
        "etag": receipt.etag,
        "size": receipt.size_bytes,
        "checksum": receipt.checksum,
        "time": receipt.stored_at_s,
    }


def _ancestry(path: bytes) -> Iterator[bytes]:
    """Yield *path* and all directories above it, b"" last."""
    while path:
        yield path
        path = path.rpartition(b"/")[0]
    yield b""


def _is_at(row: Pending, path: bytes | None) -> bool:
    """Return whether the row concerns something at or below *path* (None: all)."""
    place = row.key if isinstance(row, Delete) else path_of(row)
    if path is None or place is None:
        return path is None
    is_above = isinstance(row, Move) and row.is_tree and path.startswith(place + b"/")
    return place == path or place.startswith(path + b"/") or is_above
