"""Where each object version's bytes are: placing, demoting and evicting them.

Order of the steps, so that the index never names a file that is not there: on the way in the
file is renamed before the index commits; on the way out the index commits before the unlink.
Space is charged before bytes are written and given back after they are unlinked.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Container, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import trio

from cache.committer import Committer
from cache.engine import Engine
from cache.errors import BlockCorrupt, CacheError, CacheFull
from cache.index import Index, IndexWriter
from cache.lake.base import Body
from cache.model import (
    BLOCK_BYTES,
    GROUP_BLOCKS,
    GROUP_BYTES,
    MIB,
    GroupIndex,
    ObjectVersion,
    VersionId,
    block_count,
)
from cache.opens import OpenTable
from cache.places import Sparse, Tier
from cache.policy.due import SOME_TIME, Next
from cache.policy.eviction import ItemId
from cache.policy.ledger import Ledger
from cache.records import Group, VersionRow, charge, group_key
from cache.rows import Usage, change, drop_items, group_of, put_blocks, put_usage, put_whole
from cache.tier import TierFiles

log = logging.getLogger(__name__)

DRAM_SHARE_MAX = 2  # An object over half of the DRAM tier lands on NVMe.
_EVICT_BYTES_MIN = 8 * MIB  # Evicted at once when room is short, to have some for the next,
_EVICT_SHARE_MAX = 1024  # but no more than this part of the tier.
_DRAM_KEPT_SHARE = 8  # `keep_dram_room` keeps so much of the DRAM tier free.
# Of a disk, read-ahead of sets leaves two such steps to demand, rounded up to whole items: what
# makes room for a miss then pushes out nothing that an epoch still needs.
_KEPT_STEPS = 2
_DEMOTERS = 4
_BUSY_S = 0.005
_ROOM_S, _LANDS_S = 2.0, 0.01  # A miss waits for room in a tier that is being filled, and looks so often.
_DRAIN_STEP = 256  # Items between two reports of progress.


Land = Callable[[], Callable[[IndexWriter], None] | None]
CommitAdoption = Callable[[Land | None], bool]


@dataclass
class _Landing:
    """A finished file that is to have a name in a tier."""

    files: TierFiles
    version: ObjectVersion
    place: int
    path: str
    checksums: Sequence[int]
    landed: bool = False

    def land(self) -> Callable[[IndexWriter], None] | None:
        try:
            self.files.link_whole(self.version, self.version.id, self.path, self.checksums)
        except CacheError as error:
            log.warning("%s is not kept in the cache: %s", self.version.key, error)
            return None
        self.landed = True
        return lambda w: put_whole(w, self.version, self.place, self.checksums)


class Residency:
    """All tiers together. For the mover's trio thread.

    A fill's GET and its writing are one job of *lake_engine*; other file calls run on *disk_engine*.
    """

    def __init__(
        self,
        tiers: list[Tier],
        index: Index,
        committer: Committer,
        lake_engine: Engine,
        disk_engine: Engine,
        opens: OpenTable | None = None,
    ) -> None:
        assert tiers
        self.tiers = tiers
        self._index = index
        self._committer = committer
        self._lake_engine = lake_engine
        self._disk_engine = disk_engine
        self._busy: Counter[bytes] = Counter()  # Versions that are being written, moved or evicted.
        self._opens = opens
        # Invariant: a version in here is busy once, by whoever set it: fills of it wait. A block that
        # landed while its version moves or leaves would be indexed and then unlinked or punched.
        self._moving: dict[bytes, trio.Event] = {}
        # The same for groups (20 bytes): those being filled, by how many, and those that leave alone
        # while others of their version are filled. Invariant: their versions are busy; no group is both.
        self._filling: Counter[bytes] = Counter()
        self._leaving: dict[bytes, trio.Event] = {}
        self._sparse: dict[bytes, Sparse] = {}
        self._unverified: dict[bytes, tuple[int, int]] = {}  # Whole files without a row: tier, charge.
        self._usage: dict[bytes, Usage] = {}  # Since the last `save_usage`.
        # Large versions that readers go through, see `hold`, and their use after this one, if it was told.
        self._held: dict[bytes, Next | None] = {}
        self.ledger = Ledger()
        self.dram_low = trio.Event()
        self.demoted_bytes = 0
        self.evicted_bytes = 0

    # Placing

    @contextmanager
    def busy(self, vid: bytes) -> Iterator[None]:
        """Keep the version where it is, for as long as the block runs."""
        assert vid not in self._moving, vid.hex()
        self._busy[vid] += 1
        try:
            yield
        finally:
            self._busy[vid] -= 1
            if not self._busy[vid]:
                del self._busy[vid]

    @contextmanager
    def _moved(self, vids: Iterable[bytes]) -> Iterator[None]:
        """Have the versions, none of which may be busy, to oneself for as long as the block runs."""
        done, vids = trio.Event(), set(vids)
        assert self._busy.keys().isdisjoint(vids)
        for vid in vids:
            self._busy[vid] = 1
            self._moving[vid] = done
        try:
            yield
        finally:
            for vid in vids:
                assert self._busy[vid] == 1, vid.hex()
                del self._busy[vid], self._moving[vid]
            done.set()

    async def _settled(self, vid: VersionId, item: bytes = b"") -> bool:
        """Wait until nobody moves the version or its group *item*; return whether it is whole by then.

        A file found without a row is verified first. Call `busy` at once after it, without an await.
        """
        while vid in self._moving or item in self._leaving or vid in self._unverified:
            if vid in self._moving:
                await self._moving[vid].wait()
            elif item in self._leaving:
                await self._leaving[item].wait()
            else:
                await self._adopt(vid)
        row = self._index.version(vid)
        return row is not None and row.whole

    # For fills that wait for nothing, see cache/quick.py

    def begin_fill_nowait(self, vid: VersionId, size_bytes: int, due: int | None) -> tuple[int, int] | None:
        """Charge a whole object that nobody asked for; return its tier and the bytes, None if it must wait.

        The version is busy then. End it with `end_fill_nowait`, after a failure with its bytes given back.
        """
        if vid in self._moving or vid in self._unverified:
            return None
        place = self._place(size_bytes)
        tier = self.tiers[place]
        charged = tier.files.whole_bytes(size_bytes)
        if not self._can_spare(place, charged, due) or not tier.has_room(charged):
            return None
        tier.budget.take(charged)
        tier.landing_bytes += charged
        self._check_watermark()
        self._busy[vid] += 1
        return place, charged

    def end_fill_nowait(self, vid: bytes, place: int, charged_bytes: int, *, landed: bool) -> None:
        """End what `begin_fill_nowait` began."""
        self.tiers[place].landing_bytes -= charged_bytes
        if not landed:
            self.tiers[place].budget.give_back(charged_bytes)
        self._busy[vid] -= 1
        if not self._busy[vid]:
            del self._busy[vid]

    def _place(self, size_bytes: int, *, on_disk: bool = False) -> int:
        """Return the tier where new content of *size_bytes* goes: DRAM, else the emptiest NVMe."""
        first = self.tiers[0]
        if first.files.is_memory and not on_disk and size_bytes <= first.budget.size_bytes // DRAM_SHARE_MAX:
            return 0
        return self._emptiest_disk(size_bytes)

    def _emptiest_disk(self, size_bytes: int) -> int:
        """Return the NVMe tier with the largest share free, of those that *size_bytes* fit into."""
        shares = [
            (tier.budget.size_bytes >= size_bytes, tier.budget.room_bytes / tier.budget.size_bytes, -place)
            for place, tier in enumerate(self.tiers)
            if not tier.files.is_memory
        ]
        return -max(shares)[2]

    async def reserve(
        self, place: int, charged_bytes: int, *, demand: bool = True, due: int | None = None
    ) -> None:
        """Charge *charged_bytes* to a tier, making room first. Raises CacheFull.

        Without *demand* nothing is pushed out that a recognised epoch still needs, unless it is known
        to need it only after *due*.
        """
        tier = self.tiers[place]
        if charged_bytes > tier.budget.size_bytes:
            raise CacheFull(f"{tier.name}: {charged_bytes} bytes are more than the tier's size")
        if not demand:
            self._check_spare(place, charged_bytes, due)
        if tier.has_room(charged_bytes):  # No await from here to take().
            tier.budget.take(charged_bytes)
            self._check_watermark()
            return
        deadline_s = trio.current_time() + _ROOM_S  # Also of those who wait for the lock.
        async with tier.room_lock:
            while not tier.has_room(charged_bytes):
                if not demand:  # Again: others were let in while we waited for the lock.
                    self._check_spare(place, charged_bytes, due)
                    if tier.guard_shortfall_bytes() > 0:
                        raise CacheFull(f"{tier.name}: its disk has no room for what nobody asked for")
                need_bytes = max(charged_bytes - tier.budget.room_bytes, tier.guard_shortfall_bytes())
                if await self._make_room(place, max(need_bytes, _step_bytes(tier))):
                    continue
                if demand and tier.landing_bytes and trio.current_time() < deadline_s:
                    await trio.sleep(_LANDS_S)  # What others are filling lands, and can leave then.
                else:
                    raise CacheFull(f"{tier.name}: no room for {charged_bytes} bytes, all of it is in use")
            tier.budget.take(charged_bytes)

    def may_read_ahead(self, size_bytes: int, due: int | None = None) -> bool:
        """Return whether an object that nobody asked for yet has room, with some left for demand.

        *due*: when it will be used, if that is known. What is used after it makes room then.
        """
        place = self._place(size_bytes)
        return self._can_spare(place, self.tiers[place].files.whole_bytes(size_bytes), due)

    @property
    def size_bytes(self) -> int:
        """Return what all tiers together hold at most."""
        return sum(tier.budget.size_bytes for tier in self.tiers)

    def may_hold(self, version: ObjectVersion) -> bool:
        """Return whether all of a large object has room where it goes, what is there of it included."""
        state = self._sparse.get(version.id)
        place = self._place(version.size_bytes) if state is None else state.tier
        tier = self.tiers[place]
        present_bytes = self.present_bytes(version.id)
        missing_bytes = tier.files.whole_bytes(version.size_bytes) - present_bytes
        others_bytes = max(0, tier.policy.spare_bytes - present_bytes)  # Most of it may be its own.
        return missing_bytes + _KEPT_STEPS * _step_bytes(tier) <= tier.room_bytes + others_bytes

    def present_bytes(self, vid: bytes) -> int:
        """Return about how many bytes are there of a large object that is not whole: full blocks."""
        state = self._sparse.get(vid)
        return 0 if state is None else state.blocks_present * BLOCK_BYTES

    def _check_spare(self, place: int, charged_bytes: int, due: int | None) -> None:
        if not self._can_spare(place, charged_bytes, due):
            raise CacheFull(f"{self.tiers[place].name}: no room for {charged_bytes} bytes unasked")

    def _can_spare(self, place: int, charged_bytes: int, due: int | None) -> bool:
        """Return whether so much is free, or not needed before *due*, where content ends up."""
        tier = self.tiers[place]
        disks = [other for other in self.tiers if not other.files.is_memory]
        over = [tier, *disks] if tier.files.is_memory else [tier]
        item_bytes = min(charged_bytes, GROUP_BYTES)  # What leaves at once for a miss, rounded up to items.
        kept_bytes = sum(_KEPT_STEPS * (_step_bytes(each) + item_bytes) for each in over)
        if tier.files.is_memory:
            kept_bytes += tier.budget.size_bytes // _DRAM_KEPT_SHARE
        short_bytes = charged_bytes + kept_bytes - sum(each.room_bytes for each in over)
        if short_bytes > 0:  # Else the policies need not be asked, twice for each file of a first epoch.
            short_bytes -= sum(each.policy.spare_bytes for each in over)
        if short_bytes > 0 and due is not None:
            short_bytes -= sum(each.policy.bytes_beyond(due, short_bytes) for each in over)
        return short_bytes <= 0

    async def fill_whole(
        self,
        version: ObjectVersion,
        get: Callable[[], Body],
        *,
        demand: bool,
        next: Next = SOME_TIME,
        wanted: bool = False,
        on_disk: bool = False,
    ) -> None:
        """Get a small object and store it. Raises what *get* raises, CacheFull and CacheError.

        *next*: when it is expected to be used, if it is neither demanded nor wanted. *wanted*: somebody
        asked for it to be here, though nobody waits; *on_disk*: and not in memory.
        """
        vid = version.id
        if await self._settled(vid):
            return
        with self.busy(vid):
            place = self._place(version.size_bytes, on_disk=on_disk)
            files = self.tiers[place].files
            charged = files.whole_bytes(version.size_bytes)
            await self.reserve(place, charged, demand=demand or wanted, due=next.due)
            try:
                with self.tiers[place].landing(charged):
                    checksums = await self._lake_engine.run(
                        lambda: files.land_whole(version, vid, get()), demand=demand
                    )
                    await self._committer.commit(lambda w: put_whole(w, version, place, checksums))
            except BaseException as error:
                if isinstance(error, CacheError):
                    await self._disk_engine.run(lambda: _remove(files, vid))
                self.tiers[place].budget.give_back(charged)
                raise
            self.tiers[place].added(ItemId(vid), charged, used=demand)
            if not (demand or wanted):
                self.tiers[place].policy.expect(ItemId(vid), next)

    async def fill_blocks(
        self,
        version: ObjectVersion,
        blocks: range,
        get_pieces: Callable[[], Iterator[Body]],
        *,
        demand: bool,
        on_disk: bool = False,
        is_spare: bool = False,
        due: int | None = None,
    ) -> None:
        """Get missing *blocks*, all in one group of a large object, and store them.

        *is_spare*: they push out nothing that a recognised epoch needs, unless only after *due*.
        """
        assert blocks.start // GROUP_BLOCKS == (blocks.stop - 1) // GROUP_BLOCKS, blocks
        vid = version.id
        item = group_key(vid, GroupIndex(blocks.start // GROUP_BLOCKS))
        if await self._settled(vid, item):
            return
        with self.busy(vid):
            state = self._sparse.get(vid)
            if state is None:
                place = self._place(version.size_bytes, on_disk=on_disk)
                state = self._sparse[vid] = Sparse(version, place)
            try:
                with self._filled(item):
                    await self._fill_group(state, vid, blocks, get_pieces, demand, is_spare, due)
                if state.blocks_present == block_count(version.size_bytes):
                    await self._make_whole(vid, state)
            finally:
                self._forget_if_empty(vid)

    @contextmanager
    def _filled(self, item: bytes) -> Iterator[None]:
        """Keep a group from leaving, for as long as the block runs."""
        assert item not in self._leaving
        self._filling[item] += 1
        try:
            yield
        finally:
            self._filling[item] -= 1
            if not self._filling[item]:
                del self._filling[item]

    def _forget_if_empty(self, vid: bytes) -> None:
        """Remove what is left of a sparse version without blocks, unless somebody else is at it."""
        state = self._sparse.get(vid)
        if state is None or state.blocks_present or self._busy[vid] > 1:
            return
        del self._sparse[vid]
        if self._index.version(vid) is not None:
            self._committer.commit_nowait(lambda w: w.remove_version(vid))
        _remove(self.tiers[state.tier].files, vid)

    async def _fill_group(
        self,
        state: Sparse,
        vid: VersionId,
        blocks: range,
        get_pieces: Callable[[], Iterator[Body]],
        demand: bool,
        is_spare: bool,
        due: int | None,
    ) -> None:
        version, place = state.version, state.tier
        tier, offset = self.tiers[place], blocks.start * BLOCK_BYTES
        group, first = GroupIndex(blocks.start // GROUP_BLOCKS), blocks.start % GROUP_BLOCKS
        charged = charge(min(version.size_bytes, blocks.stop * BLOCK_BYTES) - offset)
        await self.reserve(place, charged, demand=not is_spare, due=due)
        try:
            with tier.landing(charged):
                checksums = await self._lake_engine.run(
                    lambda: tier.files.land_blocks(vid, offset, get_pieces()), demand=demand
                )
                await self._committer.commit(lambda w: put_blocks(w, version, place, group, first, checksums))
        except BaseException as error:
            if isinstance(error, Exception):  # What of it was written must not stay uncharged.
                await self._disk_engine.run(lambda: _punch(tier.files, vid, blocks))
            tier.budget.give_back(charged)
            raise
        assert len(checksums) == len(blocks)
        state.blocks_present += len(blocks)
        item = ItemId(group_key(vid, group))
        tier.added(item, (tier.policy.size_of(item) or 0) + charged, used=demand)

    async def _make_whole(self, vid: VersionId, state: Sparse) -> None:
        if self._sparse.pop(vid, None) is None:
            return  # Another flight's landing got here first.
        tier, version = self.tiers[state.tier], state.version
        groups = self._index.groups_of(vid)
        checksums = [checksum for _, group in groups for checksum in group.checksums]
        assert len(checksums) == block_count(version.size_bytes)
        # A worker that looks between rename and commit finds a row that says partial, misses
        # the file, and looks again.
        charged = 0
        try:
            await self.reserve(state.tier, tier.files.label_bytes)
            charged = tier.files.label_bytes
            await self._disk_engine.run(lambda: tier.files.make_whole(version, vid, checksums))
            await self._committer.commit(lambda w: change(w, vid, whole=True))
        except CacheError as error:  # All of it is there, and can be read as it is.
            log.warning("%s stays a sparse file: %s", version.key, error)
            await self._disk_engine.run(lambda: tier.files.make_sparse(vid))
            tier.budget.give_back(charged)
            self._sparse[vid] = state
            return
        for group, _ in groups:
            item = ItemId(group_key(vid, group))
            charged += tier.policy.size_of(item) or 0
            tier.policy.removed(item)
        tier.added(ItemId(vid), charged, used=vid not in self._held)
        if vid in self._held:
            tier.policy.expect(ItemId(vid))

    # Taking over what was uploaded

    async def adopt_staged(
        self, version: ObjectVersion, path: str, checksums: Sequence[int], commit: CommitAdoption
    ) -> bool:
        """Keep the finished file at *path* as the cached *version*; return what *commit* returned.

        *commit* is called once, also when there is no room for the file or its tier is on another file
        system. It gets a function that gives the file its name in the tier and returns what belongs
        into the commit (None if that failed); it calls it, and commits, without an await, once it knows
        that the file is still the version. The caller unlinks *path*.
        """
        vid, place = version.id, self._place_beside(path)
        if await self._settled(vid) or place is None or self._index.version(vid) is not None:
            return commit(None)
        with self.busy(vid):
            files, charged = self.tiers[place].files, self.tiers[place].files.whole_bytes(version.size_bytes)
            try:
                await self.reserve(place, charged)
            except CacheFull:
                return commit(None)
            landing = _Landing(files, version, place, path, checksums)
            adopted = False
            try:
                adopted = commit(landing.land)
            finally:
                if not (adopted and landing.landed):
                    await self._take_back(place, vid, charged, landed=landing.landed)
            if landing.landed and adopted:
                # Nobody asked for it yet; and so the newest of what was written leaves last.
                self.tiers[place].added(ItemId(vid), charged, used=False)
            return adopted

    async def hand_over(
        self, vid: VersionId, path: str, file: int, mtime_ns: int, change: Callable[[IndexWriter], None]
    ) -> None:
        """Give a whole object, which the kernel has open, up to whoever will write to it, as *path*.

        *file*, *mtime_ns*: see `TierFiles.hand_over`. *change* is in the same commit. Raises CacheError, also
        where there is no such file any more.
        """
        while await self._settled(vid) and vid in self._busy:  # noqa: ASYNC110 - seldom, and for a moment.
            await trio.sleep(_BUSY_S)
        row = self._index.version(vid)
        if row is None or not row.whole:
            raise CacheError(f"{path}: readers have a file open that is not in the cache any more")
        tier, item = self.tiers[row.tier], ItemId(vid)

        def commit(w: IndexWriter) -> None:
            change(w)
            drop_items(w, [item], set())

        with self._moved([vid]):
            await self._disk_engine.run(lambda: tier.files.hand_over(vid, path, file, mtime_ns))
            await self._committer.commit(commit)
            await self._disk_engine.run(lambda: _remove(tier.files, vid))
            self._gone(tier, [item])

    async def _take_back(self, place: int, vid: VersionId, charged: int, *, landed: bool) -> None:
        with trio.CancelScope(shield=True):
            if landed:
                await self._disk_engine.run(lambda: _remove(self.tiers[place].files, vid))
            self.tiers[place].budget.give_back(charged)

    def _place_beside(self, path: str) -> int | None:
        """Return the tier that is on the same file system as *path*: only there can it have two names."""
        for place, tier in enumerate(self.tiers):
            try:
                if tier.files.is_beside(path):
                    return place
            except CacheError as error:
                if not os.path.lexists(path):
                    return None  # Its name went while it was sent: *commit* will see.
                log.warning("%s: can't be kept in the cache: %s", path, error)
        return None

    def add_sparse(self, vid: bytes, state: Sparse) -> None:
        self._sparse[vid] = state

    # Taking over files whose rows were lost

    def add_unverified(self, place: int, vid: bytes, charged: int) -> bool:
        """Charge a whole file found without a row; return False if there is no room for it."""
        budget = self.tiers[place].budget
        if charged > budget.room_bytes:
            return False
        budget.take(charged)
        self._unverified[vid] = (place, charged)
        return True

    async def _adopt(self, vid: VersionId) -> bool:
        """Verify a file found without a row; return whether it holds the whole version."""
        place, charged = self._unverified.pop(vid)
        tier = self.tiers[place]
        with self._moved([vid]):
            try:
                label = await self._disk_engine.run(lambda: tier.files.read_label(vid))
                if label is None:
                    raise BlockCorrupt("the bytes do not match the label")
                version, checksums = label
                await self._committer.commit(lambda w: put_whole(w, version, place, checksums))
            except CacheError as error:
                log.warning("%s: dropped: %s", tier.files.object_path(vid), error)
                await self._disk_engine.run(lambda: _remove(tier.files, vid))
                tier.budget.give_back(charged)
                return False
            tier.added(ItemId(vid), charged, used=False)
            return True

    async def adopt_all(self) -> int:
        """Verify, in the background, all files found without a row; return how many were good."""
        good = 0
        while self._unverified:
            good += await self._adopt(VersionId(next(iter(self._unverified))))
        return good

    # Use

    def used(self, items: list[bytes], now_s: float) -> None:
        """Note that readers hit *items*: whole objects (16 bytes) or groups (20)."""
        free = [ItemId(item) for item in items if item not in self._held]
        for tier in self.tiers:
            tier.policy.touched_all(free)
        vids = {item[:16] for item in items}
        self.ledger.used_all(vids)
        self._usage.update((vid, Usage()) for vid in vids - self._usage.keys())
        for item in items:
            usage = self._usage[item[:16]]
            usage.hits += len(item) == 16
            usage.last_used_s = now_s

    def touched(self, item: ItemId) -> None:
        """Tell the eviction policies that a reader uses *item*."""
        if item not in self._held:
            for tier in self.tiers:
                tier.policy.touched(item)
        self.ledger.used(item[:16])

    def hold(self, vid: bytes) -> None:
        """Keep a large object, if it is whole, while a reader goes through it: it is used at its end."""
        self._held[vid] = None
        self.expect(vid)

    def let_go(self, vid: bytes) -> None:
        """The reader of an object that was held has come to its end, or nothing was heard of it since."""
        next = self._held.pop(vid, None)
        self.touched(ItemId(vid))
        if next is not None:
            self.expect(vid, next)

    def expect(self, vid: bytes, next: Next = SOME_TIME) -> None:
        """Keep a whole object for an epoch that will use it. What is held stays as that is, meanwhile."""
        if vid in self._held and next != SOME_TIME:
            self._held[vid] = next
            return
        for tier in self.tiers:
            tier.policy.expect(ItemId(vid), next)

    def release(self, vid: bytes) -> None:
        """Take `expect` back."""
        for tier in self.tiers:
            tier.policy.release(ItemId(vid))

    def passed(self, vid: bytes) -> None:
        """Note that a scan has read a whole object and gone on."""
        for tier in self.tiers:
            tier.policy.passed(ItemId(vid))

    def outdated(self, vid: bytes) -> None:
        """Note that a later checkpoint was written than this one, a whole object."""
        for tier in self.tiers:
            tier.policy.outdated(ItemId(vid))

    def usage(self, vid: bytes, row: VersionRow) -> Usage:
        recent = self._usage.get(vid, Usage())
        return Usage(row.hits + recent.hits, max(row.last_used_s, recent.last_used_s))

    def save_usage(self) -> None:
        """Put what `used` gathered into the index with the next commit."""
        usage, self._usage = self._usage, {}
        if usage:
            self._committer.commit_nowait(lambda w: put_usage(w, usage))

    def has_to_stay(self, vid: bytes) -> str | None:
        """Return why the version stays where it is for now; None if it may be moved and evicted."""
        if vid in self._busy:
            return "being written or moved"
        return "open in passthrough" if self._is_passed_through(vid) else None

    def place_of(self, vid: bytes) -> int | None:
        row = self._index.version(vid)
        return None if row is None else row.tier

    # Leaving

    async def _make_room(self, place: int, need_bytes: int) -> bool:
        """Free about *need_bytes*; return whether anything came free. Holds the tier's room_lock."""
        tier = self.tiers[place]
        victims = tier.policy.victims(need_bytes, _Staying(self._stays))
        if not tier.files.is_memory:
            return await self.evict(place, victims) > 0 or await self._drop_unverified(place)
        if await self._demote(place, victims) > 0:
            return True
        # What is being filled can't move, but what of it is not filled right now can leave.
        return await self._evict_groups(tier, [item for item in victims if item[:16] in self._busy]) > 0

    async def _drop_unverified(self, place: int) -> bool:
        """Give up a file found without a row and not yet verified; return whether there was one."""
        found = (vid for vid, (where, _) in self._unverified.items() if where == place)
        vid = next((vid for vid in found if not self._is_passed_through(vid)), None)
        if vid is None:
            return False
        _, charged = self._unverified.pop(vid)
        with self._moved([vid]):
            await self._disk_engine.run(lambda: _remove(self.tiers[place].files, vid))
            self.tiers[place].budget.give_back(charged)
        return True

    async def evict(self, place: int, items: list[ItemId]) -> int:
        """Drop *items* from a tier; return the bytes that came free. Skips what has to stay."""
        return await self._evict(place, [item for item in items if not self._stays(item)])

    async def _evict(self, place: int, items: list[ItemId]) -> int:
        tier = self.tiers[place]
        alone = [item for item in items if item[:16] in self._busy]
        items = [item for item in items if item[:16] not in self._busy and _is_in(tier, item)]
        freed_bytes = 0
        if items:
            with self._moved(item[:16] for item in items):
                freed_bytes = await self._evict_held(tier, items)
        return freed_bytes + await self._evict_groups(tier, alone)

    def _stays(self, item: bytes) -> bool:
        """Return whether *item* is no victim: it would be gone, and take space that is not charged."""
        vid = item[:16]
        if vid in self._busy and not self._may_leave_alone(item):
            return True
        return self._is_passed_through(vid)

    def _is_passed_through(self, vid: bytes) -> bool:
        return self._opens is not None and self._opens.is_passed_through(vid)

    def _may_leave_alone(self, item: bytes) -> bool:
        """Return whether a group may go while other groups of its version are being filled.

        It needs another group that keeps the file. While all groups are there, the version is being
        made whole.
        """
        state = self._sparse.get(item[:16])
        if state is None or item[:16] in self._moving:
            return False
        return item not in self._filling and item not in self._leaving

    async def _evict_groups(self, tier: Tier, items: list[ItemId]) -> int:
        """Drop groups of versions that are being filled: their rows and files stay.

        Returns the bytes that came free.
        """
        items = [item for item in items if self._may_leave_alone(item) and _is_in(tier, item)]
        if not items:
            return 0
        left = self._blocks_left(items)
        gone = {vid: self._sparse[vid].blocks_present - count for vid, count in left.items()}
        with ExitStack() as stack:  # No await from here to the first commit.
            for vid in gone:
                stack.enter_context(self.busy(vid))
                stack.callback(self._forget_if_empty, vid)
                self._sparse[vid].blocks_present -= gone[vid]  # At once: it might be taken for whole else.
            stack.enter_context(self._left(items))
            try:
                await self._committer.commit(lambda w: drop_items(w, items, set()))
            except BaseException:
                for vid in gone:
                    self._sparse[vid].blocks_present += gone[vid]
                raise
            await self._disk_engine.run(lambda: _remove_files(tier.files, items, set()))
            return self._gone(tier, items)

    @contextmanager
    def _left(self, items: list[ItemId]) -> Iterator[None]:
        """Have fills of these groups wait, for as long as the block runs."""
        done = trio.Event()
        self._leaving.update(dict.fromkeys(items, done))
        try:
            yield
        finally:
            for item in items:
                del self._leaving[item]
            done.set()

    async def _evict_held(self, tier: Tier, items: list[ItemId]) -> int:
        left = self._blocks_left(items)
        last_groups = {vid for vid, blocks_present in left.items() if not blocks_present}
        await self._committer.commit(lambda w: drop_items(w, items, last_groups))
        for vid, blocks_present in left.items():
            self._sparse[vid].blocks_present = blocks_present
            if not blocks_present:
                del self._sparse[vid]
        late = [] if tier.files.is_memory else [item for item in items if self._was_opened(item)]
        items = [item for item in items if item not in late]
        await self._disk_engine.run(lambda: _remove_files(tier.files, items, last_groups))
        self._keep(tier, late)
        return self._gone(tier, items)

    def _was_opened(self, item: ItemId) -> bool:
        """Return whether the kernel got a whole object's file while its row was removed."""
        return len(item) == 16 and self._is_passed_through(item)

    def _keep(self, tier: Tier, items: list[ItemId]) -> None:
        """Keep files that the kernel opened while their rows were removed: they are as if found without."""
        for item in items:
            self._unverified[item] = (self.tiers.index(tier), tier.policy.size_of(item) or 0)
            tier.policy.removed(item)
            self.ledger.left(item)

    def _gone(self, tier: Tier, items: list[ItemId]) -> int:
        """Give the space of *items* back, which have left the disk; return their bytes."""
        freed = 0
        for item in items:
            size_bytes = tier.policy.size_of(item) or 0
            freed += size_bytes
            tier.policy.removed(item)
            if len(item) == 16:
                self.ledger.left(item)
            else:
                self.ledger.left_in_part(item[:16], size_bytes)
        tier.budget.give_back(freed)
        self.evicted_bytes += freed
        return freed

    def _blocks_left(self, items: list[ItemId]) -> dict[bytes, int]:
        """Return how many blocks stay of each sparse version that some of *items* are groups of."""
        left: dict[bytes, int] = {}
        for item in items:
            vid = item[:16]
            if len(item) == 16 or vid not in self._sparse:
                continue
            row = self._index.residence(vid, range(group_of(item), group_of(item) + 1))[1][0]
            blocks_present = left.get(vid, self._sparse[vid].blocks_present)
            left[vid] = blocks_present - (row.present.bit_count() if row is not None else 0)
        return left

    async def _demote(self, place: int, items: list[ItemId]) -> int:
        """Move the versions of *items* from DRAM to NVMe, all that is there of each.

        What can't move, leaves. Several at once, since each waits for the disk. Returns the
        bytes that came free.
        """
        vids = [vid for vid in dict.fromkeys(item[:16] for item in items) if vid not in self._busy]
        freed_bytes: list[int] = []
        async with trio.open_nursery() as nursery:
            for start in range(_DEMOTERS):
                nursery.start_soon(self._demote_each, place, vids[start::_DEMOTERS], freed_bytes)
        return sum(freed_bytes)

    async def _demote_each(self, place: int, vids: list[bytes], freed_bytes: list[int]) -> None:
        for vid in vids:
            try:
                freed_bytes.append(await self._move_version(place, VersionId(vid)))
            except CacheError as error:
                if self.tiers[place].is_pinned(vid):
                    log.warning("can't move %s to NVMe, it is pinned and stays: %s", vid.hex(), error)
                    continue
                log.warning("can't move %s to NVMe, it leaves the cache: %s", vid.hex(), error)
                try:
                    freed_bytes.append(await self.drop_version(vid))
                except CacheError as failure:
                    log.warning("%s can't leave the cache: %s", vid.hex(), failure)

    async def move(self, vid: VersionId, *, to_memory: bool) -> int:
        """Move all of a version to DRAM, or to a disk; return the bytes that moved, 0 if it has to stay.

        Raises CacheFull and CacheError.
        """
        row = self._index.version(vid)
        if row is None or self.has_to_stay(vid) or self.tiers[row.tier].files.is_memory == to_memory:
            return 0
        target = 0 if to_memory else self._emptiest_disk(row.size_bytes)
        return await self._move_version(row.tier, vid, target)

    async def _move_version(self, place: int, vid: VersionId, target_place: int | None = None) -> int:
        """Move a version to *target_place*, the emptiest disk by default; return the bytes that came free.

        What would push out there what is still needed leaves instead, unless it was asked for.
        """
        source, row = self.tiers[place], self._index.version(vid)
        if row is None or row.tier != place or vid in self._busy:
            return 0
        with self._moved([vid]):
            groups = self._index.groups_of(vid)
            sizes = {item: source.policy.size_of(item) or 0 for item in _items(vid, row, groups)}
            charged = sum(sizes.values())
            may_leave = target_place is None and not source.is_pinned(vid)
            target_place = self._emptiest_disk(charged) if target_place is None else target_place
            target = self.tiers[target_place]
            label_bytes = (target.files.label_bytes - source.files.label_bytes) if row.whole else 0
            expected = {item: next for item in sizes if (next := source.policy.next_of(item)) is not None}
            is_expected = any(not next.later for next in expected.values())
            if may_leave and not is_expected and target.is_all_expected(charged + label_bytes):
                return await self._evict_held(source, list(sizes))
            await self.reserve(target_place, charged + label_bytes)
            try:
                await self._disk_engine.run(
                    lambda: target.files.copy_from(source.files, row, vid, groups), demand=False
                )
                await self._committer.commit(lambda w: change(w, vid, tier=target_place))
            except BaseException as error:
                if isinstance(error, CacheError):
                    await self._disk_engine.run(lambda: _remove(target.files, vid), demand=False)
                target.budget.give_back(charged + label_bytes)
                raise
            if vid in self._sparse:
                self._sparse[vid].tier = target_place
            await self._disk_engine.run(lambda: _remove(source.files, vid), demand=False)
            for item, size_bytes in sizes.items():
                used = item not in expected and not source.policy.is_wanted(item)
                source.policy.removed(item)
                target.added(item, size_bytes + label_bytes, used=used)
                if item in expected:
                    target.policy.expect(item, expected[item])
            source.budget.give_back(charged)
        self.demoted_bytes += charged
        return charged

    async def drop(self, vid: bytes, group: int) -> None:
        """Evict the item that holds a group found to be corrupt."""
        row = self._index.version(vid)
        if row is not None:
            item = ItemId(vid if row.whole else group_key(vid, group))
            await self._evict(row.tier, [item])  # Readers in passthrough keep the unlinked file.

    async def drop_version(self, vid: bytes) -> int:
        """Evict all of a version; return the bytes that came free."""
        row = self._index.version(vid)
        if row is None:
            return 0
        return await self.evict(row.tier, _items(vid, row, self._index.groups_of(vid)))

    # DRAM's low-water mark

    def _check_watermark(self) -> None:
        first = self.tiers[0]
        if first.files.is_memory and first.budget.room_bytes < first.budget.size_bytes // 10:
            self.dram_low.set()

    async def keep_dram_room(self) -> None:
        """Demote ahead of need, so that what is fetched rarely waits for room. Runs for ever."""
        if not self.tiers[0].files.is_memory:
            return
        budget = self.tiers[0].budget
        while True:
            await self.dram_low.wait()
            self.dram_low = trio.Event()
            try:
                async with self.tiers[0].room_lock:
                    short_bytes = budget.size_bytes // _DRAM_KEPT_SHARE - budget.room_bytes
                    moved = short_bytes <= 0 or await self._make_room(0, short_bytes)
            except CacheError as error:
                log.warning("can't make room in DRAM ahead of need: %s", error)
                moved = False
            if not moved:
                await trio.sleep(1)  # All of it is in use, or the disk fails: look again later.

    async def drain_dram(self) -> AsyncIterator[tuple[int, int]]:
        """Move all that DRAM holds to NVMe, as far as it fits; yield (bytes moved, bytes in all)."""
        tier = self.tiers[0]
        if not tier.files.is_memory:
            return
        before, total = self.demoted_bytes, tier.budget.used_bytes
        items = tier.policy.order(len(tier.policy))
        for start in range(0, len(items), _DRAIN_STEP):
            async with tier.room_lock:
                await self._demote(0, items[start : start + _DRAIN_STEP])
            yield self.demoted_bytes - before, total


class _Staying(Container[bytes]):
    """Whatever *stays* says so of."""

    def __init__(self, stays: Callable[[bytes], bool]) -> None:
        self._stays = stays

    def __contains__(self, item: object) -> bool:
        return isinstance(item, bytes) and self._stays(item)


def _is_in(tier: Tier, item: ItemId) -> bool:
    return tier.policy.size_of(item) is not None


def _step_bytes(tier: Tier) -> int:
    """Return how many bytes leave at once when room is short."""
    return min(_EVICT_BYTES_MIN, tier.budget.size_bytes // _EVICT_SHARE_MAX)


def _items(vid: bytes, row: VersionRow, groups: list[tuple[GroupIndex, Group]]) -> list[ItemId]:
    return [ItemId(vid)] if row.whole else [ItemId(group_key(vid, group)) for group, _ in groups]


# A file whose row is gone and that can't be removed is no error to anybody who reads: the next
# start finds it.


def _remove_files(files: TierFiles, items: list[ItemId], emptied: set[bytes]) -> None:
    for item in items:
        if len(item) == 16 or item[:16] in emptied:
            _remove(files, item[:16])
        else:
            start = group_of(item) * GROUP_BLOCKS
            _punch(files, item[:16], range(start, start + GROUP_BLOCKS))


def _remove(files: TierFiles, vid: bytes) -> None:
    try:
        files.remove(vid)
    except CacheError as error:
        log.warning("a cached file can't be removed: %s", error)


def _punch(files: TierFiles, vid: bytes, blocks: range) -> None:
    try:
        files.punch(vid, blocks)
    except CacheError as error:
        log.warning("a cached file's space can't be given back: %s", error)
