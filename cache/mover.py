"""The mover: the one process that talks to the lake and writes the index. Composition root."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import trio

from cache import messages
from cache.committer import Committer
from cache.config import MountConfig
from cache.counters import Counters
from cache.engine import Engine
from cache.errors import CacheError, LakeError, ObjectChanged, ObjectMissing, SluiceError
from cache.fetcher import Fetcher
from cache.index import Index, remove_index
from cache.lake.open import open_lake
from cache.lake_io import LakeIO
from cache.lister import Lister
from cache.listing import Changed
from cache.messages import Answer
from cache.model import MIB, Inode, ObjectVersion
from cache.opens import OpenTable
from cache.places import Tier
from cache.policy.eviction import make_policy
from cache.policy.freshness import Freshness
from cache.policy.readahead import SequentialReadAhead
from cache.policy.retry import RetryPolicy
from cache.records import Node
from cache.residency import Residency
from cache.restore import restore
from cache.tier import TierBudget, TierFiles

log = logging.getLogger(__name__)

_DISK_THREADS = 6
_LIST_THREADS = 12
_AHEAD_FLIGHTS_MAX = 8  # Of at most 8 MiB each: what read-ahead takes of the mover's memory.
_AHEAD_WINDOW_BYTES_MAX = 80 * MIB  # What one sequential reader has under way at most.
# ext4 keeps the extents of a file that has more than four in blocks of their own, which nobody charges:
# at worst one of 4 KiB for five of a sparse file's blocks of 128 KiB, which is 1/160.
_EXTENTS_SHARE = 128
_SAVE_USAGE_EVERY_S = 30.0


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
    committer: Committer
    counters: Counters
    started_at_s: float

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

    async def handle(self, request: messages.Request) -> Answer:
        """Carry out one request. Raises SluiceError for `messages.failure` to pack."""
        match request:
            case messages.Lookup(parent, name):
                return Answer(0, value=int(await self.lister.lookup(Inode(parent), name)))
            case messages.List(inode):
                await self.lister.list_directory(Inode(inode))
            case messages.Fetch(inode, offset, length):
                async with self._noting_change(Inode(inode)):
                    await self.fetcher.fetch(self._version(Inode(inode)), offset, length)
            case messages.ReadThrough(inode, offset, length):
                async with self._noting_change(Inode(inode)):
                    body = await self.fetcher.read_through(self._version(Inode(inode)), offset, length)
                return Answer(0, body=bytes(body))
            case messages.Corrupt(vid, group):
                await self.residency.drop(vid, group)
            case messages.Used(items):
                self.residency.used(items, time.time())
            case messages.ReadSeen(inode, offset, length):
                self.fetcher.read_seen(self._version(Inode(inode)), offset, length, stalled=False)
            case messages.RelistAhead(inode):
                self.lister.relist_ahead(Inode(inode))
        return Answer(0)

    @asynccontextmanager
    async def _noting_change(self, inode: Inode) -> AsyncIterator[None]:
        """Should the block find another version in the lake, have the inode's path show that one.

        Else the path would be ESTALE until its ttl has passed, however often it is opened.
        """
        try:
            yield
        except (ObjectChanged, ObjectMissing):
            if not self.index.is_detached(inode):
                with suppress(SluiceError):  # What is told is that the version is gone.
                    node = self._node(inode)
                    await self.lister.refresh_entry(Inode(node.parent), node.name)
            raise

    def _node(self, inode: Inode) -> Node:
        node = self.index.node(inode)
        if node is None:
            raise ObjectMissing(f"inode {inode} is not known")
        return node

    def _version(self, inode: Inode) -> ObjectVersion:
        node = self._node(inode)
        return ObjectVersion(os.fsdecode(self.index.path_of(inode)), node.etag, node.size_bytes)

    async def save_usage_regularly(self) -> None:
        while True:
            await trio.sleep(_SAVE_USAGE_EVERY_S)
            self.residency.save_usage()
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


def open_index(directory: Path, *, may_rebuild: bool) -> Index:
    """Open the index; one that is corrupt is made anew, since all in it can be had again."""
    try:
        return Index(directory)
    except CacheError as error:
        if not may_rebuild:
            raise
        log.error("%s; it is made anew, and the cached files are verified", error)
        remove_index(directory)
        return Index(directory)


Serve = Callable[[Mover, trio.MemoryReceiveChannel[Changed]], Awaitable[Any]]


async def run_mover(
    config: MountConfig,
    plans: list[TierPlan],
    counters: Counters,
    opens: OpenTable,
    serve: Serve,
    *,
    first: bool,
) -> None:
    """Open lake and index, make the cache ready, and run *serve* until it returns.

    *first*: the mount is not there yet, so nobody has the index or a file open.

    Raises SluiceError when the lake or the cache can't be used. *serve* is started when
    requests can be answered; when it returns, everything is saved.
    """
    lake_engine = Engine("lake", config.fetch_threads + _LIST_THREADS, reserved=4)
    disk_engine = Engine("disk", _DISK_THREADS, reserved=2)
    lake = open_lake(config.lake)
    index = open_index(config.index_directory, may_rebuild=first)
    committer = Committer(index)
    with index.write() as writer:
        writer.add_root()
        if first:
            writer.sweep_detached()
    changed_send, changed_receive = trio.open_memory_channel[Changed](1000)
    lake_io = LakeIO(lake, lake_engine, RetryPolicy(budget_s=config.retry_s))
    residency = Residency(make_tiers(config, plans), index, committer, lake_engine, disk_engine, opens)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(committer.run)
            fetcher = Fetcher(
                nursery,
                lake_io,
                index,
                residency,
                SequentialReadAhead(_AHEAD_WINDOW_BYTES_MAX),
                ahead_flights_max=max(1, min(_AHEAD_FLIGHTS_MAX, config.fetch_threads // 2)),
            )
            freshness = Freshness(config.ttl_s, config.immutable)
            lister = Lister(nursery, lake_io, index, committer, freshness, changed_send)
            mover = Mover(
                config, index, lake_io, residency, fetcher, lister, committer, counters, time.time()
            )
            await restore(residency, index, committer, disk_engine)
            nursery.start_soon(residency.adopt_all)
            nursery.start_soon(residency.keep_dram_room)
            nursery.start_soon(mover.save_usage_regularly)
            await serve(mover, changed_receive)
            nursery.cancel_scope.cancel()
        residency.save_usage()
        committer.flush()
        index.env.sync(True)
    finally:
        lake_engine.stop()
        disk_engine.stop()
        index.close()
        lake.close()
