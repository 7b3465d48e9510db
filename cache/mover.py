"""The mover: the one process that talks to the lake and writes the index. Composition root."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import trio

import sluicefs
from cache import messages
from cache.ahead import SetReadAhead
from cache.committer import Committer
from cache.config import MountConfig
from cache.control_files import TEXT_BYTES_MAX, WRITABLE, ControlFiles
from cache.counters import Counters, Features
from cache.dispatching import UploadConfig
from cache.engine import Engine
from cache.errors import CacheError, LakeError, MountReadOnly, ObjectChanged, ObjectMissing, SluiceError
from cache.fetcher import Fetcher
from cache.index import Index, cover_pages, remove_index
from cache.journaling import JournalKeeper
from cache.lake.open import open_lake
from cache.lake_io import LakeIO
from cache.lister import Lister
from cache.listing import Changed
from cache.messages import Answer
from cache.model import MIB, SMALL_OBJECT_BYTES_MAX, Inode, ObjectVersion
from cache.orders import Orders
from cache.pending import PendingTable
from cache.pinning import Keeper
from cache.pins import Pins
from cache.pipes import PIPES_NAME, Pipes
from cache.places import Tier
from cache.policy.freshness import Freshness
from cache.policy.policies import make_policy
from cache.policy.readahead import SequentialReadAhead
from cache.policy.retry import RetryPolicy
from cache.policy.sets import ListingOrder
from cache.quick import QuickFills
from cache.recorder import Recorder
from cache.records import Node
from cache.residency import Residency
from cache.restore import restore
from cache.store import read_store_id
from cache.survey import Survey
from cache.tier import TierBudget, TierFiles
from cache.uploader import Uploader
from cache.walking import Walker
from cache.warming import Warmer
from cache.write_path import (
    Ledger,
    Shared,
    WritePath,
    dirty_bytes_max,
    load_table,
    make_write_path,
    open_ledger,
    tell_workers_by,
)

log = logging.getLogger(__name__)
T = TypeVar("T")

_DISK_THREADS = 6
_LIST_THREADS = 12
_AHEAD_FLIGHTS_MAX = 8  # Of at most 8 MiB each: what read-ahead takes of the mover's memory.
_AHEAD_WINDOW_BYTES_MAX = 80 * MIB  # What one sequential reader has under way at most.
# ext4 keeps the extents of a file that has more than four in blocks of their own of 4 KiB, which nobody
# charges: up to 340 in each, so with every other block of 16 KiB there, and leaves half full, 1/680.
# A file whose last five blocks lie apart is worse; but before small runs of blocks are fetched of a file,
# sixteen units of 1 MiB were, so that there are next to none of these.
_EXTENTS_SHARE = 128
_AHEAD_WINDOW_SHARE = 4  # Of the smallest disk tier: what is fetched ahead must stay until it is read.
_SAVE_USAGE_EVERY_S = 30.0
_USAGE_AT_ONCE = 1000  # A transaction of some 5 ms,
_USAGE_PAUSE_S = 0.01  # and others have their turn.


@dataclass(frozen=True, slots=True)
class TierPlan:
    """One tier as the supervisor laid it out: sizes settled, directories there."""

    name: str
    path: Path
    is_memory: bool
    size_bytes: int


class Sample(NamedTuple):
    """Some objects of the lake, and their bytes together."""

    objects: int
    size_bytes: int


@dataclass
class Mover:
    """Everything the mover is made of; `handle` answers a worker's request."""

    config: MountConfig
    index: Index
    lake_io: LakeIO
    residency: Residency
    fetcher: Fetcher
    lister: Lister
    orders: Orders
    committer: Committer
    counters: Counters
    ahead: SetReadAhead | None  # None: --read-ahead says so.
    started_at_s: float
    table: PendingTable
    walker: Walker
    warmer: Warmer
    keeper: Keeper
    control_files: ControlFiles
    pipes: Pipes
    write_path: WritePath | None = None  # Neither on a read-only mount.
    uploader: Uploader | None = None
    recorders: list[Recorder] = field(default_factory=list)  # Of every request, while `sluice trace` runs.

    async def check_lake(self) -> None:
        """Raise what a mount would meet first: bucket, credentials, endpoint, TLS."""
        await self.lake_io.run(self.lake_io.lake.check)

    async def sample_lake(self) -> Sample:
        """Return what the first page of a listing holds, if `--profile auto` has to know; else nothing."""
        if self.config.profile != "auto" or not self.config.read_only or self.config.passthrough == "off":
            return Sample(0, 0)
        try:
            page = await self.lake_io.run(lambda: self.lake_io.lake.list_page("", delimiter=False))
        except LakeError:
            return Sample(0, 0)
        return Sample(len(page.objects), sum(info.version.size_bytes for info in page.objects))

    async def handle(self, request: messages.Request, id: int = 0, resends: int | None = None) -> Answer:
        """Carry out one request. Raises SluiceError for `messages.failure` to pack.

        *id*, *resends*: see `messages.Asked`; None: who asks can't be replaced.
        """
        for recorder in self.recorders:
            recorder.note(request, time.time())
        match request:
            case messages.Lookup(parent, name):
                return Answer(0, value=int(await self.lister.lookup(Inode(parent), name)))
            case messages.List(inode):
                await self.lister.list_directory(Inode(inode))
            case messages.Fetch(inode, offset, length):
                began_s = time.time()
                await self._of_version(
                    Inode(inode), lambda version: self._fetch(Inode(inode), version, offset, length)
                )
                if self.ahead is not None:
                    self.ahead.waited(Inode(inode), time.time() - began_s)
            case messages.ReadThrough(inode, offset, length):
                body = await self._of_version(
                    Inode(inode), lambda version: self.fetcher.read_through(version, offset, length)
                )
                return Answer(0, body=bytes(body))
            case messages.Corrupt(vid, group):
                await self.residency.drop(vid, group)
            case messages.Used(items, files, at_s):
                self.residency.used(items, time.time())
                if self.ahead is not None:
                    self.ahead.used_all(files, at_s)
            case messages.ReadSeen(reads):
                for inode, offset, length in reads:
                    self._note_read(Inode(inode), offset, length)
            case messages.RelistAhead(inode):
                self.lister.relist_ahead(Inode(inode))
            case messages.Settle() | messages.Notifies():
                pass  # Transactions run in this thread, in one go.
            case (
                messages.TakeSnapshot()
                | messages.ReadSnapshot()
                | messages.WriteText()
                | messages.FinishText()
                | messages.PipeLookedUp()
            ):
                return await self._control(request)
            case _:
                return await self._write(request, id, resends)
        return Answer(0)

    async def _control(self, request: messages.ControlRequest) -> Answer:
        files = self.control_files
        match request:
            case messages.TakeSnapshot(name):
                return Answer(0, value=files.snapshot(name))
            case messages.ReadSnapshot(number, offset, length):
                return Answer(0, body=files.read(number, offset, length))
            case messages.WriteText(handle, name, offset, body):
                await files.write(handle, name, offset, body)
            case messages.FinishText(handle, is_closed):
                await files.finish(handle, is_closed=is_closed)
            case messages.PipeLookedUp(name):
                await self.pipes.looked_up(name)
        return Answer(0)

    def _note_read(self, inode: Inode, offset: int, length: int) -> None:
        node = self.index.node(inode)
        if node is not None and node.vid:  # Else it has gone, or has another version, since it was read.
            self.fetcher.read_seen(self._version(inode), offset, length)
            self._note_large(inode, self._version(inode), offset + length)

    async def _fetch(self, inode: Inode, version: ObjectVersion, offset: int, length: int) -> None:
        if version.size_bytes <= SMALL_OBJECT_BYTES_MAX:
            self._note_use(inode, time.time())
            await self.fetcher.fetch(version, offset, length)
            return
        try:
            await self.fetcher.fetch(version, offset, length)
        finally:
            self._note_large(inode, version, offset + length)

    def _note_large(self, inode: Inode, version: ObjectVersion, end: int) -> None:
        """Tell the read-ahead of sets who goes through a large file, and who has come to its end."""
        use = self.fetcher.take_use(version.id)
        if self.ahead is None:
            return
        if use is not None:
            self.ahead.used(inode, time.time(), use)
        self.ahead.seen(inode, version.id, time.time(), end=end >= version.size_bytes)

    def _note_use(self, inode: int, now_s: float) -> None:
        if self.ahead is not None:
            self.ahead.used(Inode(inode), now_s)

    def begin_nowait(
        self, request: messages.Request, id: int, then: Callable[[Answer], None], resends: int
    ) -> bool:
        """Begin what waits for the next commit alone: see `Committer.flush_due`. *then* gets the answer.

        Returns False, with nothing done, for what `handle` is for.
        """
        if self.write_path is None or self.recorders:
            return False
        if isinstance(request, messages.Closed):
            return self.write_path.changes.closed_nowait(request.inode)
        if isinstance(request, messages.Create | messages.SetAttributes):
            self.keeper.names_changed()
            return self.write_path.changes.apply_nowait(request, id, then, resends)
        return False

    async def _write(
        self,
        request: messages.Change | messages.Stage | messages.Closed | messages.Sync | messages.AwaitRoom,
        id: int,
        resends: int | None,
    ) -> Answer:
        if self.write_path is None:
            raise MountReadOnly("mounted with --read-only")
        changes = self.write_path.changes
        match request:
            case messages.Stage(inode, keep_bytes):
                number = await self._of_version(
                    Inode(inode), lambda _: changes.stage(inode, keep_bytes, resends)
                )
                return Answer(0, value=number)
            case messages.Closed(inode):
                await changes.closed(inode)
            case messages.Sync(inode, length_bytes, remote):
                await changes.sync(inode, length_bytes, remote, resends)
            case messages.AwaitRoom():
                await changes.await_room()
            case _:
                answer = await changes.apply(request, id, resends)
                if isinstance(request, messages.Rename):
                    self.keeper.renamed(request.new_parent, request.new_name)
                self.keeper.names_changed()
                return answer
        return Answer(0)

    async def _of_version(self, inode: Inode, ask: Callable[[ObjectVersion], Awaitable[T]]) -> T:
        """Return what *ask* does for the inode's version; ask again where the index has another one by now.

        Should the lake turn out to have another one, the inode's path shows that from now on. Else it
        would be ESTALE until its ttl has passed, however often it is opened.
        """
        while True:
            version = self._version(inode)
            try:
                return await ask(version)
            except (ObjectChanged, ObjectMissing):
                if self._version(inode) == version and not self.index.is_detached(inode):
                    with suppress(SluiceError):  # What is told is that the version is gone.
                        node = self._node(inode)
                        await self.lister.refresh_entry(Inode(node.parent), node.name)
                if self._version(inode) == version:
                    raise  # Else it was moved, or is a copy of ours (`restating`).

    def _node(self, inode: Inode) -> Node:
        node = self.index.node(inode)
        if node is None:
            raise ObjectMissing(f"inode {inode} is not known")
        return node

    def _version(self, inode: Inode) -> ObjectVersion:
        node = self._node(inode)
        return ObjectVersion(os.fsdecode(self.index.key_of(inode)), node.etag, node.size_bytes, node.vid)

    async def save_usage_regularly(self) -> None:
        while True:
            await trio.sleep(_SAVE_USAGE_EVERY_S)
            has_more = True
            while has_more:
                has_more = self.residency.save_usage(_USAGE_AT_ONCE)
                await trio.sleep(_USAGE_PAUSE_S)
            self.index.env.reader_check()  # Slots of workers that were killed.


def make_tiers(config: MountConfig, plans: list[TierPlan]) -> list[Tier]:
    return [
        Tier(
            TierFiles(plan.name, plan.path, is_memory=plan.is_memory),
            TierBudget(plan.size_bytes - (0 if plan.is_memory else plan.size_bytes // _EXTENTS_SHARE)),
            make_policy(config.policy),
            0 if plan.is_memory else config.free_space_min_bytes,
        )
        for plan in plans
    ]


def _window_bytes_max(residency: Residency) -> int:
    sizes = [tier.budget.size_bytes for tier in residency.tiers if not tier.files.is_memory]
    return min(_AHEAD_WINDOW_BYTES_MAX, min(sizes) // _AHEAD_WINDOW_SHARE)


def _passes_disks(config: MountConfig, features: Features) -> bool:
    """Return whether large files are passed through from disks only, see `Writing.begin`."""
    return not config.read_only and bool(features.get("passthrough", {}).get("on"))


def open_index(directory: Path, *, may_rebuild: bool) -> Index:
    """Open the index; one that is corrupt is made anew, since all in it can be had again."""
    try:
        if may_rebuild:
            cover_pages(directory)
        return Index(directory)
    except CacheError as error:
        if not may_rebuild:
            raise
        log.error("%s; it is made anew, and the cached files are verified", error)
        remove_index(directory)
        return Index(directory)


Serve = Callable[[Mover, trio.MemoryReceiveChannel[Changed]], Awaitable[Any]]


async def run_mover(
    config: MountConfig, plans: list[TierPlan], shared: Shared, serve: Serve, *, first: bool
) -> None:
    """Open lake and index, make the cache ready, and run *serve* until it returns.

    *first*: the mount is not there yet, so nobody has the index or a file open.

    Raises SluiceError when the lake or the cache can't be used. *serve* is started when
    requests can be answered; when it returns, everything is saved.
    """
    lake_engine = Engine("lake", config.fetch_threads + _LIST_THREADS, reserved=_LIST_THREADS)
    disk_engine = Engine("disk", _DISK_THREADS, reserved=2)
    lake = open_lake(config.lake)
    index = open_index(config.index_directory, may_rebuild=first)
    table = PendingTable()
    committer = Committer(index, partial(load_table, table, index))
    with index.write() as writer:
        writer.add_root()
        if first:
            writer.sweep_detached()
            writer.clear_answers()  # The kernel's numbers start anew.
    changed_send, changed_receive = trio.open_memory_channel[Changed](1000)
    lake_io = LakeIO(lake, lake_engine, RetryPolicy(budget_s=config.retry_s))
    residency = Residency(
        make_tiers(config, plans),
        index,
        committer,
        lake_engine,
        disk_engine,
        shared.opens,
        partial(_passes_disks, config, shared.features),
    )
    pins = Pins(config.index_directory, index)
    for tier in residency.tiers:
        tier.is_pinned = pins.is_pinned
    ledger = None
    try:
        if config.read_only:
            load_table(table, index)
        else:
            store_id = read_store_id(config.index_directory)
            ledger = open_ledger(config.index_directory, store_id, index, table, first=first)
            tell_workers_by(shared, committer)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(committer.run)
            fetcher = Fetcher(
                nursery,
                lake_io,
                index,
                residency,
                SequentialReadAhead(_window_bytes_max(residency)) if config.read_ahead != "none" else None,
                ahead_flights_max=max(1, min(_AHEAD_FLIGHTS_MAX, config.fetch_threads // 2)),
                quick=QuickFills(residency, committer, lake_engine),
            )
            freshness = Freshness(config.ttl_s, config.immutable)
            lister = Lister(nursery, lake_io, index, committer, freshness, changed_send, table)
            orders = Orders(nursery, index, lister, ListingOrder)
            ahead: SetReadAhead | None = None
            if config.read_ahead == "set":
                survey = Survey(index, lister)
                ahead = SetReadAhead(
                    nursery,
                    lake_io,
                    index,
                    residency,
                    fetcher,
                    survey,
                    config.fetch_threads,
                    make_upcoming=orders.make_upcoming,
                    prepare=orders.prepare,
                )
                orders.on_change, orders.on_told = ahead.orders_changed, ahead.announced
                nursery.start_soon(ahead.run)
            walker = Walker(index, lister)
            warmer = Warmer(lake_io, index, residency, fetcher, config.fetch_threads)
            files = ControlFiles(nursery, config, orders, walker, warmer, sluicefs.__version__)
            mover = Mover(
                config,
                index,
                lake_io,
                residency,
                fetcher,
                lister,
                orders,
                committer,
                shared.counters,
                ahead,
                time.time(),
                table,
                walker,
                warmer,
                Keeper(index, residency, walker, pins),
                files,
                Pipes(nursery, config.mountpoint / os.fsdecode(PIPES_NAME), files.take, TEXT_BYTES_MAX),
            )
            await restore(residency, index, committer, disk_engine)
            if ledger is not None:
                mover.write_path = _start_writing(mover, nursery, ledger, disk_engine, shared)
            nursery.start_soon(residency.adopt_all)
            nursery.start_soon(mover.keeper.run)
            nursery.start_soon(residency.keep_dram_room)
            nursery.start_soon(mover.save_usage_regularly)
            if not first and config.read_only:  # Who waits to write to a mover that died finds a reader.
                for name in WRITABLE:
                    nursery.start_soon(mover.pipes.looked_up, name)
            await serve(mover, changed_receive)
            if mover.write_path is not None:
                await mover.write_path.settle()
            nursery.cancel_scope.cancel()
        residency.save_usage()
        committer.flush()
        if mover.write_path is not None:
            mover.write_path.finish()
        index.env.sync(True)
    finally:
        lake_engine.stop()
        disk_engine.stop()
        if ledger is not None:
            ledger.close()
        index.close()
        lake.close()


def _start_writing(
    mover: Mover, nursery: trio.Nursery, ledger: Ledger, disk_engine: Engine, shared: Shared
) -> WritePath:
    config = mover.config
    keeper = JournalKeeper(ledger.table, ledger.journal, ledger.staging, disk_engine)
    uploader = Uploader(
        nursery,
        mover.lake_io,
        mover.index,
        mover.committer,
        ledger.table,
        ledger.staging,
        mover.residency,
        shared.opens,
        keeper,
        UploadConfig(
            config.upload_delay_s,
            config.upload_open_delay_s,
            config.upload_threads,
            config.upload_bandwidth,
            read_store_id(config.index_directory),
        ),
        mover.lister.refresh_entry,
    )
    write_path = make_write_path(
        nursery,
        ledger,
        mover.index,
        mover.committer,
        mover.residency,
        mover.fetcher,
        mover.lister,
        keeper,
        uploader,
        disk_engine,
        shared,
        config.dirty_bytes_max or dirty_bytes_max(config.index_directory),
        (config.uid, config.gid),
    )
    write_path.start(nursery)
    nursery.start_soon(uploader.run)
    mover.uploader = uploader
    return write_path
