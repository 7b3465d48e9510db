"""Keeps the journal behind the pending table: what is durable is always some state that there was.

What the journal promises:

1. It never names a staging file whose name is not on the disk: names are synced before.
2. A Put that it calls SEALED has its bytes on the disk. One whose bytes are not there yet is
   written as it stood while it was OPEN, so that an fsync never waits for another file's bytes,
   and again as SEALED once they are. Only one that takes the place of another SEALED Put is synced
   first: replacing a file by rename leaves the old content or the new one.
3. A staging file that a Put of it names is there: `discard` unlinks it after the row has left, and
   until that is on the disk too the journal has an Orphan for it. Else a file that was deleted or
   uploaded could be back after a power loss, and nobody would know whose it is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import suppress
from typing import TypeGuard

import msgspec
import trio

from cache.engine import Engine
from cache.errors import CacheError, MountReadOnly, StagingFull
from cache.journal import Journal
from cache.pending import OPEN, Orphan, Pending, PendingTable, Put
from cache.staging import StagingFiles

log = logging.getLogger(__name__)

_GATHER_S = 0.02  # So long a write waits for more to come, unless somebody waits for it.
_SEAL_PAUSE_S = 0.5  # Between two rounds of syncing sealed files: many are gone again before.
_RETRY_S = 3.0  # Between two tries of a journal that fails.

_ORPHANS = 1 << 62  # No row of the table has so great a number.

Changes = dict[int, Pending | None]
Content = tuple[int, int, float]  # Staging file, length and time of sealing: another one is another content.


class JournalKeeper:
    """Writes what changed in *table* to *journal*; `run` must be started in the mover's nursery.

    To be made once recovery has made table and journal equal, and all that both name durable.
    *read_only_because* says why nothing may be changed (the journal fails), else it is empty.
    """

    def __init__(
        self,
        table: PendingTable,
        journal: Journal,
        staging: StagingFiles,
        engine: Engine,
        *,
        read_only_because: str = "",
        gather_s: float = _GATHER_S,
        seal_pause_s: float = _SEAL_PAUSE_S,
        retry_s: float = _RETRY_S,
    ) -> None:
        self._table = table
        self._journal = journal
        self._staging = staging
        self._engine = engine
        self._gather_s = gather_s
        self._seal_pause_s = seal_pause_s
        self._retry_s = retry_s
        self.read_only_because = read_only_because
        self._is_mendable = not read_only_because  # Nor is it once a staging file's bytes were lost.
        self._changed = trio.Event()
        self._hurry = trio.Event()
        self._waiters: list[_Waiter] = []
        self._writing: Changes = {}  # The batch that is on its way to the journal.
        self._discarded: set[int] = set()
        self._unlinked: set[int] = set()  # Of these: the journal still has their Orphans.
        self._staged: dict[int, int] = {}  # Which staging file each row of the journal names, and all
        self._named: set[int] = set()  # of these: their names are on the disk.
        self._whole: dict[int, Put] = {}  # By staging file, which a rename does not change: the
        self._unsealed: dict[int, Put] = {}  # Puts that the journal has as SEALED, and as OPEN though sealed.
        self._has_unsealed = trio.Event()
        for seq, row in table.rows.items():
            if isinstance(row, Put) and row.staged:
                self._staged[seq] = row.staged
                self._named.add(row.staged)
                if is_sealed(row):
                    self._whole[row.staged] = row
        table.on_change = self.wake

    @property
    def failed(self) -> bool:
        return bool(self.read_only_because)

    def wake(self) -> None:
        """Note that the table has changed. Called by the table itself, within the change."""
        self._changed.set()

    async def settled(self) -> None:
        """Return when the journal has all that was changed before this call.

        Raises MountReadOnly when it can't be written: then it is not known to be durable.
        """
        self.check()
        waiter = _Waiter()
        self._waiters.append(waiter)
        self._hurry.set()
        self._changed.set()
        await waiter.done.wait()
        if waiter.error:
            raise MountReadOnly(waiter.error)

    async def known(self, seqs: Iterable[int]) -> None:
        """Return when the journal has these rows as they are now; at once while it can't be written.

        To be awaited before the lake sees anything of them.
        """
        if any(seq in self._table.unjournaled or seq in self._writing for seq in seqs):
            with suppress(MountReadOnly):
                await self.settled()

    def check(self) -> None:
        """Raise MountReadOnly while the journal fails: to be asked before each change."""
        if self.failed:
            raise MountReadOnly(self.read_only_because)

    def discard(self, number: int) -> None:
        """Unlink the staging file once the journal has what was changed so far. Does not wait.

        To be called after the commit that took the file from its row. If the process ends before,
        recovery does it.
        """
        self._discarded.add(number)
        self._changed.set()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._seal_for_ever)
            while True:
                await self._changed.wait()
                with trio.move_on_after(self._gather_s):
                    await self._hurry.wait()
                if not await self._write_gathered():
                    await trio.sleep(self._retry_s)

    def finish(self) -> None:
        """Write what is left, blocking: for the mover's end, once `run` is over. Logs a failure."""
        rest, self._table.unjournaled = self._table.unjournaled, {}
        if self._is_mendable:
            sealed = (self._standing(row) for row in self._unsealed.values())
            rows = dict(standing for standing in sealed if standing is not None) | rest
        else:
            rows = self._durable_rows(rest, {})
        rows |= {orphan_seq(number): Orphan(0, number) for number in self._discarded}
        try:
            if rows:
                self._staging.sync_all()
                self._save(rows, with_names=True)
            self._unlink(self._discarded)  # What comes back of them is known to be nobody's.
        except (CacheError, StagingFull) as error:
            self._table.unjournaled = rest
            self._fail(str(error))

    async def _write_gathered(self) -> bool:
        """Write all that has gathered; tell those who wait. Returns whether it worked."""
        # No await from here to the end of these three: who comes later waits for the next time.
        batch, self._table.unjournaled = self._table.unjournaled, {}
        self._writing = batch
        waiters, self._waiters = self._waiters, []
        discarded, self._discarded = self._discarded, set()
        self._changed, self._hurry = trio.Event(), trio.Event()
        error = "the mover is stopping"
        try:
            error = await self._write(batch, discarded)
        finally:
            if error:
                self._table.unjournaled = {**batch, **self._table.unjournaled}
                self._discarded |= discarded
                self._changed.set()
            self._writing = {}
            for waiter in waiters:
                waiter.error = error or self.read_only_because
                waiter.done.set()
        if not error and discarded:
            self._unlinked |= await self._engine.run(lambda: self._unlink(discarded))
        return not error

    async def _write(self, batch: Changes, discarded: set[int]) -> str:
        """Write *batch*, and that *discarded* are nobody's; return the error, "" if there is none."""
        if not batch and not discarded:
            return ""
        first, unlinked = self._to_sync_first(batch), self._unlinked
        rows = self._durable_rows(batch, first)
        rows |= {orphan_seq(number): None for number in unlinked}
        rows |= {orphan_seq(number): Orphan(0, number) for number in discarded}
        with_names = bool(unlinked) or not self._named.issuperset(staged_in(batch))
        numbers = [row.staged for row in first.values()]
        try:
            if numbers:
                await self._sync(numbers)
            with trio.CancelScope(shield=True):  # It takes milliseconds, and `finish` must come after it.
                await self._engine.run(lambda: self._save(rows, with_names=with_names))
        except (CacheError, StagingFull) as failure:
            self._fail(str(failure))
            return self.read_only_because
        self._unlinked = set()
        self._take_note(batch, first)
        self._recover()
        return ""

    def _save(self, rows: Changes, *, with_names: bool) -> None:
        if with_names:
            self._staging.sync_entries()
        self._journal.write(rows)

    def _unlink(self, numbers: Iterable[int]) -> set[int]:
        """Unlink the files; return which of them are gone."""
        gone = set()
        for number in numbers:
            try:
                self._staging.remove(number)
                gone.add(number)
            except (CacheError, StagingFull) as error:
                log.warning("a staging file can't be removed, the next mount does it: %s", error)
        return gone

    # What is whole

    def _is_whole(self, row: Put) -> bool:
        whole = self._whole.get(row.staged)
        return whole is not None and content_of(whole) == content_of(row)

    def _left_by(self, batch: Changes) -> set[int]:
        """Return the staging files that the journal no longer names after *batch*."""
        return {self._staged[seq] for seq in batch if seq in self._staged} - staged_in(batch)

    def _to_sync_first(self, batch: Changes) -> dict[int, Put]:
        """Return the sealed Puts of *batch* that take the place of other content that is whole."""
        replaced = {self._whole[number].path for number in self._left_by(batch) if number in self._whole}
        return {
            seq: row
            for seq, row in batch.items()
            if is_sealed(row) and row.path in replaced and not self._is_whole(row)
        }

    def _durable_rows(self, batch: Changes, first: dict[int, Put]) -> Changes:
        """Return *batch* with the Puts that are not whole as they stood while they were OPEN."""
        rows = dict(batch)
        for seq, row in batch.items():
            if is_sealed(row) and seq not in first and not self._is_whole(row):
                rows[seq] = unsealed(row)
        return rows

    def _take_note(self, batch: Changes, first: dict[int, Put]) -> None:
        """Note what the journal has now."""
        for number in self._left_by(batch):
            self._whole.pop(number, None)
            self._unsealed.pop(number, None)
            self._named.discard(number)
        for seq, row in batch.items():
            self._staged.pop(seq, None)
            if isinstance(row, Put) and row.staged:
                self._staged[seq] = row.staged
                self._named.add(row.staged)
                self._note_content(row, is_whole=is_sealed(row) and (seq in first or self._is_whole(row)))
        if self._unsealed:
            self._has_unsealed.set()

    def _note_content(self, row: Put, *, is_whole: bool) -> None:
        self._whole.pop(row.staged, None)
        self._unsealed.pop(row.staged, None)
        if is_whole:
            self._whole[row.staged] = row
        elif is_sealed(row):
            self._unsealed[row.staged] = row

    async def _seal_for_ever(self) -> None:
        while True:
            await self._has_unsealed.wait()
            await trio.sleep(self._seal_pause_s)
            self._has_unsealed = trio.Event()
            if not await self._seal_gathered():
                await trio.sleep(self._retry_s)
                self._has_unsealed.set()

    async def _seal_gathered(self) -> bool:
        """Bring the bytes of what the journal has as OPEN to the disk; have it written as SEALED then."""
        rows = [row for row in self._unsealed.values() if self._standing(row) is not None]
        if not rows:
            return True
        try:
            await self._sync([row.staged for row in rows])
        except (CacheError, StagingFull) as error:
            self._fail(str(error))
            return False
        for row in rows:
            if (standing := self._standing(row)) is not None:
                seq, now = standing
                self._whole[row.staged] = now
                self._table.unjournaled.setdefault(seq, now)
                self._changed.set()
        return True

    def _standing(self, row: Put) -> tuple[int, Put] | None:
        """Return the row of the table that still says that this content is sealed, if there is one."""
        for seq, now in self._table.of_inode(row.inode):
            if is_sealed(now) and content_of(now) == content_of(row):
                return seq, now
        return None

    async def _sync(self, numbers: list[int]) -> None:
        """Sync the files' bytes. Raises CacheError, StagingFull.

        An error other than a full disk is for good: the kernel tells of lost pages once, and the
        next fsync(2) would succeed without them.
        """
        try:
            await self._engine.run(lambda: self._staging.sync(numbers))
        except CacheError:
            self._is_mendable = False
            raise

    # Failure

    def _fail(self, text: str) -> None:
        if not self.failed:
            log.critical(
                "%s: the mount is read-only %s; nothing is lost so far: what was written is kept,"
                " and goes on to the lake",
                text,
                "until that works again" if self._is_mendable else "until it is mounted again",
            )
        self.read_only_because = f"the mount is read-only: {text}"

    def _recover(self) -> None:
        if self.failed and self._is_mendable:
            log.warning("the journal works again: the mount takes changes again")
            self.read_only_because = ""


class _Waiter:
    __slots__ = ("done", "error")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.error = ""


def is_sealed(row: Pending | None) -> TypeGuard[Put]:
    """Return whether the row says that its staging file is whole."""
    return isinstance(row, Put) and row.state != OPEN and row.staged > 0


def orphan_seq(number: int) -> int:
    """Return under which number the journal, and only it, says that a staging file is nobody's."""
    return _ORPHANS + number


def staged_in(batch: Changes) -> set[int]:
    """Return the staging files that the batch's Puts name."""
    return {row.staged for row in batch.values() if isinstance(row, Put) and row.staged}


def unsealed(row: Put) -> Put:
    """Return the row as it stood while the file was written: good for what was fsynced."""
    return msgspec.structs.replace(row, state=OPEN, size_bytes=-1)


def content_of(row: Put) -> Content:
    return (row.staged, row.size_bytes, row.sealed_at_s)
