"""The write path's parts, put together: only where the mount may be written to."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import trio

from cache.changes import Changes, Sender
from cache.committer import Committer
from cache.copy_up import CopyUp
from cache.counters import Counters, Features, WriteBudget
from cache.engine import Engine
from cache.errors import MountReadOnly
from cache.fetcher import Fetcher
from cache.index import Index
from cache.journal import Journal
from cache.journaling import JournalKeeper
from cache.lister import Lister
from cache.opens import OpenTable
from cache.passed_names import PassedNames
from cache.pending import PendingTable, decode_pending
from cache.recovery import Recovered, recover
from cache.residency import Residency
from cache.staging import StagingFiles
from cache.store import forget_power_loss, kept_all_bytes


class Shared(Protocol):
    """What all processes of a mount share in memory."""

    @property
    def counters(self) -> Counters: ...

    @property
    def opens(self) -> OpenTable: ...

    @property
    def budget(self) -> WriteBudget: ...

    @property
    def features(self) -> Features: ...

    @property
    def passed_names(self) -> PassedNames: ...


@dataclass
class Ledger:
    """What the lake does not know yet, as this start found it; the *journal* is to be closed."""

    table: PendingTable
    journal: Journal
    staging: StagingFiles
    recovered: Recovered = field(default_factory=Recovered)

    def close(self) -> None:
        self.journal.close()
        self.staging.close()

    @property
    def read_only_because(self) -> str:
        """Return why nothing may be changed, "" if it may."""
        return "; ".join(self.recovered.read_only_because)


def open_ledger(directory: Path, store_id: str, index: Index, table: PendingTable, *, first: bool) -> Ledger:
    """Open journal and staging files, and have them and the index agree. Blocks.

    Raises UsageError when the journal can't be used, CacheError, StagingFull.
    """
    journal = Journal(directory, store_id)
    try:
        staging = StagingFiles(directory)
        is_intact = kept_all_bytes(directory)
        recovered = recover(index, journal, staging, table, first=first, is_intact=is_intact)
        forget_power_loss(directory)
        return Ledger(table, journal, staging, recovered)
    except BaseException:
        journal.close()
        raise


def load_table(table: PendingTable, index: Index) -> None:
    """Have *table* say what the index does: at a start, and after a commit that failed."""
    table.load((seq, decode_pending(packed)) for seq, packed in index.pending_rows())


def tell_workers_by(shared: Shared, committer: Committer) -> None:
    """Have workers see in shared memory what transactions change. To be called before the first of them."""
    committer.on_nodes = shared.opens.generations.changed
    committer.on_names = shared.passed_names.note
    committer.on_end = shared.opens.left
    shared.opens.generations.begin()
    shared.opens.begin_leaving()


def dirty_bytes_max(directory: Path) -> int:
    """Return the default of --dirty-max: half of what is free on the disk of the staging files."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize // 2


@dataclass
class WritePath:
    ledger: Ledger
    keeper: JournalKeeper
    changes: Changes

    def start(self, nursery: trio.Nursery) -> None:
        nursery.start_soon(self.keeper.run)
        nursery.start_soon(self.changes.run)

    async def settle(self) -> None:
        """At the end: have the journal get what it lacks, if it can be written."""
        with suppress(MountReadOnly):
            await self.keeper.settled()

    def finish(self) -> None:
        """Once nothing runs any more: have the journal say what is whole. Blocks."""
        self.keeper.finish()


def make_write_path(
    nursery: trio.Nursery,
    ledger: Ledger,
    index: Index,
    committer: Committer,
    residency: Residency,
    fetcher: Fetcher,
    lister: Lister,
    keeper: JournalKeeper,
    sender: Sender,
    disk_engine: Engine,
    shared: Shared,
    dirty_max: int,
    owner: tuple[int, int],
) -> WritePath:
    copy_up = CopyUp(
        nursery,
        index,
        committer,
        ledger.table,
        ledger.staging,
        residency,
        fetcher,
        disk_engine,
        shared.opens,
        owner,
    )
    changes = Changes(
        index,
        committer,
        ledger.table,
        ledger.staging,
        shared.opens,
        keeper,
        lister,
        copy_up,
        sender,
        shared.counters,
        shared.budget,
        dirty_max,
        owner,
        ledger.read_only_because,
    )
    return WritePath(ledger, keeper, changes)
