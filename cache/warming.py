"""Makes files resident that somebody asked for before reading them: `sluice warm`, `pin`, `.sluice/warm`.

A `Job` is planned first, so that what it takes and what has no room is known before a byte is fetched.
Its fetches yield to every reader, push out what a reader's would, but nothing that is pinned, that a
recognised epoch needs, or that the job itself brought.
"""

from __future__ import annotations

import logging
import os
import time
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import trio

from cache.errors import (
    AccessDenied,
    CacheError,
    CacheFull,
    LakeUnavailable,
    ObjectChanged,
    ObjectMissing,
    SluiceError,
    UsageError,
)
from cache.fetcher import Fetcher, Wanted
from cache.index import Index
from cache.lake_io import LakeIO
from cache.model import (
    GROUP_BLOCKS,
    GROUP_BYTES,
    SMALL_OBJECT_BYTES_MAX,
    GroupIndex,
    Inode,
    ObjectVersion,
    VersionId,
    block_count,
    group_count,
)
from cache.places import Tier
from cache.placing import DRAM_KEPT_SHARE, DRAM_SHARE_MAX
from cache.policy.eviction import ItemId
from cache.policy.parallel import Parallelism
from cache.policy.queues import PINNED
from cache.records import Node, VersionRow, charge, group_key
from cache.residency import Residency
from cache.walking import Found

log = logging.getLogger(__name__)

TIERS = ("dram", "nvme")
_STEPS = 200  # Files looked at between two checkpoints: about two milliseconds.
_GROUPS_AT_ONCE = 4  # Of one large file.
_LAKE_FAILURES_MAX = 3  # In a row, each with all its retries: then the lake is away.
_REASONS = (
    (ObjectChanged, "changed in the lake meanwhile"),
    (ObjectMissing, "no longer in the lake"),
    (AccessDenied, "access denied by the lake"),
    (LakeUnavailable, "the lake does not answer"),
    (CacheFull, "no room in the tiers"),
)


def items_of(index: Index, vid: bytes, row: VersionRow) -> list[ItemId]:
    """Return what the eviction policies know of a version: the whole object, or its groups."""
    if row.whole:
        return [ItemId(vid)]
    return [ItemId(group_key(vid, number)) for number, _ in index.groups_of(vid)]


class _Sizes(NamedTuple):
    """Of a missing file: what it takes of a tier, what is to be fetched, and whether that goes to a disk."""

    charged_bytes: int
    fetch_bytes: int
    is_for_disks: bool


@dataclass
class Job:
    """What is to be made resident and how far that is. *tier*: "dram", "nvme", or "" for either.

    *missing*: files to fetch, the first *fitting* of which there is room for. *misplaced*: cached in the
    other tier.
    """

    tier: str = ""
    files: int = 0
    total_bytes: int = 0
    cached_files: int = 0
    cached_bytes: int = 0
    missing: array[int] = field(default_factory=lambda: array("Q"))
    misplaced: array[int] = field(default_factory=lambda: array("Q"))
    fitting: int = 0
    fetch_bytes: int = 0  # Of what fits, without the parts that are there.
    unfit_bytes: int = 0
    fetched_files: int = 0
    fetched_bytes: int = 0
    moved_files: int = 0
    unfit_files: int = 0
    failures: dict[str, list[Any]] = field(default_factory=dict)  # Reason -> [count, first path].
    began_s: float = 0.0
    ended_s: float = 0.0

    def fail(self, reason: str, path: str, count: int = 1) -> None:
        if count:
            self.failures.setdefault(reason, [0, path])[0] += count

    @property
    def failed_files(self) -> int:
        return sum(count for count, _ in self.failures.values())

    @property
    def is_complete(self) -> bool:
        return not (self.unfit_files or self.failures)

    def left_s(self, now_s: float) -> float | None:
        """Return how long it may take from now on; None before anything has come."""
        took_s, left_bytes = now_s - self.began_s, self.fetch_bytes - self.fetched_bytes
        if not self.began_s or not self.fetched_bytes or took_s <= 0:
            return None
        return max(0.0, left_bytes * took_s / self.fetched_bytes)

    def told(self, now_s: float) -> dict[str, Any]:
        """Return it as JSON values, for the control socket."""
        end_s = self.ended_s or now_s
        return {
            "files": self.files,
            "bytes": self.total_bytes,
            "cached_files": self.cached_files,
            "cached_bytes": self.cached_bytes,
            "fetch_files": self.fitting,
            "fetch_bytes": self.fetch_bytes,
            "fetched_files": self.fetched_files,
            "fetched_bytes": self.fetched_bytes,
            "moved_files": self.moved_files,
            "unfit_files": self.unfit_files,
            "unfit_bytes": self.unfit_bytes,
            "failed_files": self.failed_files,
            "failures": [
                {"reason": reason, "files": count, "example": path}
                for reason, (count, path) in self.failures.items()
            ],
            "seconds": round(end_s - self.began_s, 3) if self.began_s else 0.0,
            "left_s": None if self.ended_s else self.left_s(now_s),
        }


class Warmer:
    """For the mover's trio thread. *fetches_max*: at one time, of one job."""

    def __init__(
        self,
        lake: LakeIO,
        index: Index,
        residency: Residency,
        fetcher: Fetcher,
        fetches_max: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._lake = lake
        self._index = index
        self._residency = residency
        self._fetcher = fetcher
        self._fetches_max = fetches_max
        self._clock = clock
        self._jobs: list[Job] = []  # Under way.

    def status(self) -> list[dict[str, Any]]:
        """Return the jobs under way, for `status --json`."""
        return [job.told(self._clock()) for job in self._jobs]

    # Plan

    def check_tier(self, tier: str) -> None:
        """Raise UsageError where there is no such tier."""
        if tier and tier not in TIERS:
            raise UsageError(f"--tier {tier}: must be {' or '.join(TIERS)}")
        if tier == "dram" and not self._residency.tiers[0].files.is_memory:
            raise UsageError("--tier dram: this mount has no tier in memory; mount with --dram SIZE")

    async def plan(self, found: Found, tier: str = "") -> Job:
        """Return what is to be done for the files, and what of it there is room for."""
        self.check_tier(tier)
        job = Job(tier, files=found.local, cached_files=found.local)
        cached: list[int] = [0] * len(self._residency.tiers)
        sizes: list[_Sizes] = []  # Of each missing file.
        for number, inode in enumerate(found.inodes):
            if number % _STEPS == 0:
                await trio.lowlevel.checkpoint()
            node = self._index.node(inode)
            if node is not None and node.vid and not node.staged:
                self._plan_file(job, Inode(inode), node, cached, sizes)
        self._fit(job, sizes, cached)
        return job

    def _plan_file(self, job: Job, inode: Inode, node: Node, cached: list[int], sizes: list[_Sizes]) -> None:
        job.files += 1
        job.total_bytes += node.size_bytes
        row = self._index.version(node.vid)
        present_bytes = 0
        if row is not None:
            tier = self._residency.tiers[row.tier]
            cached[row.tier] += sum(
                tier.policy.size_of(item) or 0
                for item in items_of(self._index, node.vid, row)
                if not (_is_expected(tier, item) or tier.policy.why(item) == PINNED)
            )
            present_bytes = self._present_bytes(node.vid, row)
            if job.tier and tier.files.is_memory != (job.tier == "dram"):
                job.misplaced.append(inode)
        job.cached_bytes += present_bytes
        if row is not None and row.whole:
            job.cached_files += 1
            return
        job.missing.append(inode)
        charged = max(tier.files.whole_bytes(node.size_bytes) for tier in self._wanted_tiers(job.tier))
        is_for_disks = job.tier != "dram" and self._residency.placing.is_better_on_disk(node.size_bytes)
        sizes.append(_Sizes(charged, node.size_bytes - present_bytes, is_for_disks))

    def _present_bytes(self, vid: bytes, row: VersionRow) -> int:
        if row.whole:
            return row.size_bytes
        groups = self._index.groups_of(vid)
        return sum(group.present_bytes(number, row.size_bytes) for number, group in groups)

    def _wanted_tiers(self, tier: str) -> list[Tier]:
        tiers = self._residency.tiers
        return [each for each in tiers if not tier or each.files.is_memory == (tier == "dram")]

    def _room_bytes(self, tier: str, cached: list[int]) -> int:
        """Return the room for what is missing: free, or taken by what may go for it."""
        room_bytes = 0
        for place, each in enumerate(self._residency.tiers):
            if each not in self._wanted_tiers(tier):
                continue
            each.guard_shortfall_bytes()  # Has the disk asked how much it can take.
            policy = each.policy
            kept_bytes = policy.pinned_bytes + policy.expected_bytes + cached[place]
            if each.files.is_memory:
                kept_bytes += each.budget.size_bytes // DRAM_KEPT_SHARE
            room_bytes += max(0, each.room_bytes + each.budget.used_bytes - kept_bytes)
        return room_bytes

    def _fit(self, job: Job, sizes: list[_Sizes], cached: list[int]) -> None:
        """Have *missing* begin with what fits, in the order given; what follows does not."""
        largest = max(each.budget.size_bytes for each in self._wanted_tiers(job.tier))
        if job.tier == "dram":
            largest //= DRAM_SHARE_MAX
        room_bytes = self._fit_misplaced(job, self._room_bytes(job.tier, cached), largest)
        disks_bytes = self._room_bytes("nvme", cached)  # All others may go there as well.
        fitting, unfit = array("Q"), array("Q")
        for inode, (charged, fetch_bytes, is_for_disks) in zip(job.missing, sizes, strict=True):
            if charged <= min(room_bytes, largest, disks_bytes if is_for_disks else room_bytes):
                room_bytes -= charged
                disks_bytes -= charged if is_for_disks else 0
                job.fetch_bytes += fetch_bytes
                fitting.append(inode)
            else:
                job.unfit_bytes += fetch_bytes
                unfit.append(inode)
        job.missing, job.fitting = fitting + unfit, len(fitting)
        job.unfit_files += len(unfit)

    def _fit_misplaced(self, job: Job, room_bytes: int, largest: int) -> int:
        """Leave those in *misplaced* that fit; return the room that is left then."""
        fitting = array("Q")
        for inode in job.misplaced:
            node = self._index.node(inode)
            charged = charge(node.size_bytes) if node is not None else 0
            if charged <= min(room_bytes, largest):
                room_bytes -= charged
                fitting.append(inode)
            else:
                job.unfit_bytes += charged
        left_out, job.misplaced = len(job.misplaced) - len(fitting), fitting
        job.unfit_files += left_out
        return room_bytes

    # Fetch

    async def run(self, job: Job, found: Found) -> None:
        """Fetch what fits. What can't be had is counted in the job. A cancelled job stops at once."""
        job.began_s = self._clock()
        self._jobs.append(job)
        try:
            await self._keep(found.inodes)
            for inode in job.misplaced:
                await self._move(job, Inode(inode))
            await _Fetching(self, job).run()
        finally:
            job.ended_s = self._clock()
            self._jobs.remove(job)

    async def _keep(self, inodes: Iterable[int]) -> None:
        """Have what is there leave late, so that it does not go for what is fetched."""
        for number, inode in enumerate(inodes):
            if number % _STEPS == 0:
                await trio.lowlevel.checkpoint()
            node = self._index.node(inode)
            row = self._index.version(node.vid) if node is not None and node.vid else None
            if node is not None and row is not None:
                for item in items_of(self._index, node.vid, row):
                    self._residency.tiers[row.tier].policy.want(item)

    async def _move(self, job: Job, inode: Inode) -> None:
        node = self._index.node(inode)
        if node is None or not node.vid:
            return
        try:
            moved = await self._residency.move(VersionId(node.vid), to_memory=job.tier == "dram")
            job.moved_files += moved > 0
        except CacheFull:
            job.unfit_files += 1
        except SluiceError as error:
            job.fail(reason_of(error), self.path_of(inode))

    def path_of(self, inode: int) -> str:
        try:
            return os.fsdecode(self._index.path_of(inode))
        except CacheError:  # It is gone by now.
            return f"inode {inode}"

    async def fetch(self, job: Job, inode: Inode) -> None:
        """Fetch what is missing of the file. Raises SluiceError."""
        node = self._index.node(inode)
        if node is None or not node.vid or node.staged:
            return
        key = os.fsdecode(self._index.key_of(inode))
        version = ObjectVersion(key, node.etag, node.size_bytes, node.vid)
        wanted = Wanted(job.tier)
        if version.size_bytes <= SMALL_OBJECT_BYTES_MAX:
            await self._fetcher.fetch_wanted(version, range(block_count(version.size_bytes)), wanted)
            job.fetched_bytes += version.size_bytes
        else:
            await self._fetch_groups(job, version, wanted)
        job.fetched_files += 1

    async def _fetch_groups(self, job: Job, version: ObjectVersion, wanted: Wanted) -> None:
        present = dict(self._index.groups_of(version.id))
        waiting = map(GroupIndex, range(group_count(version.size_bytes)))
        failed: list[SluiceError] = []

        async def fetch_each() -> None:
            for number in waiting:
                if failed:
                    return
                start = number * GROUP_BLOCKS
                blocks = range(start, min(start + GROUP_BLOCKS, block_count(version.size_bytes)))
                group_bytes = min(version.size_bytes - number * GROUP_BYTES, GROUP_BYTES)
                there = present[number].present_bytes(number, version.size_bytes) if number in present else 0
                try:
                    await self._fetcher.fetch_wanted(version, blocks, wanted)
                    job.fetched_bytes += group_bytes - there
                except SluiceError as error:
                    failed.append(error)

        async with trio.open_nursery() as nursery:
            for _ in range(_GROUPS_AT_ONCE):
                nursery.start_soon(fetch_each)
        if failed:
            raise failed[0]

    @property
    def fetches_max(self) -> int:
        return self._fetches_max

    @property
    def lake_retries(self) -> int:
        return self._lake.retries


class _Fetching:
    """The fetches of one job: as many at a time as bring more bytes a second."""

    def __init__(self, warmer: Warmer, job: Job) -> None:
        self._warmer = warmer
        self._job = job
        self._waiting = iter(job.missing[: job.fitting])
        self._parallelism = Parallelism(warmer.fetches_max)
        self._under_way = 0
        self._started = 0
        self._retries_seen = warmer.lake_retries
        self._lake_failures = 0  # In a row.
        self._is_full = False
        self._landed = trio.Event()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            for inode in self._waiting:
                while self._under_way >= self._parallelism.limit:
                    self._landed = trio.Event()
                    await self._landed.wait()
                if self._is_full or self._lake_failures >= _LAKE_FAILURES_MAX:
                    self._give_up(inode)
                    break
                self._under_way += 1
                self._started += 1
                nursery.start_soon(self._fetch, inode)
            self._parallelism.idle()

    def _give_up(self, inode: int) -> None:
        left = self._job.fitting - self._started
        if self._is_full:
            self._job.unfit_files += left
        else:
            self._job.fail("not tried: the lake does not answer", self._warmer.path_of(inode), left)

    async def _fetch(self, inode: int) -> None:
        before = self._job.fetched_bytes
        try:
            await self._warmer.fetch(self._job, Inode(inode))
            self._lake_failures = 0
            self._parallelism.landed(self._job.fetched_bytes - before, trio.current_time())
        except CacheFull:
            self._is_full = True
            self._job.unfit_files += 1
        except SluiceError as error:
            self._lake_failures += isinstance(error, LakeUnavailable)
            self._job.fail(reason_of(error), self._warmer.path_of(inode))
        finally:
            self._under_way -= 1
            self._note_retries()
            self._landed.set()

    def _note_retries(self) -> None:
        if self._warmer.lake_retries != self._retries_seen:
            self._retries_seen = self._warmer.lake_retries
            self._parallelism.slowed(trio.current_time())


def _is_expected(tier: Tier, item: ItemId) -> bool:
    """Return whether the running epoch of some set needs the item: `expected_bytes` has it."""
    next = tier.policy.next_of(item)
    return next is not None and not next.later


def reason_of(error: SluiceError) -> str:
    """Return what went wrong in words that are the same for all files that it happened to."""
    return next((reason for kind, reason in _REASONS if isinstance(error, kind)), str(error))
