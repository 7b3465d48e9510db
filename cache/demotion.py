"""How what is cached moves between memory and disks: mostly down, when memory needs room."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator

import trio

from cache import shielded
from cache.busy import Busy
from cache.committer import Committer
from cache.engine import Engine
from cache.errors import CacheError, CacheFull
from cache.index import Index
from cache.leaving import Leaving, items_of
from cache.model import VersionId
from cache.places import Tier, remove
from cache.placing import DRAM_KEPT_SHARE, DRAM_SHARE_MAX, Placing
from cache.policy.eviction import ItemId
from cache.records import VersionRow
from cache.room import Room
from cache.rows import change
from cache.sparse import SparseVersions

log = logging.getLogger(__name__)

_DEMOTERS = 4
_DRAIN_STEP = 256  # Items between two reports of progress.


class Demotion:
    """Moves versions, all that is there of each. For the mover's trio thread.

    *disk_room* makes room on disks only, by eviction.
    """

    def __init__(
        self,
        tiers: list[Tier],
        index: Index,
        committer: Committer,
        disk_engine: Engine,
        busy: Busy,
        sparse: SparseVersions,
        placing: Placing,
        leaving: Leaving,
        disk_room: Room,
    ) -> None:
        self._tiers = tiers
        self._index = index
        self._committer = committer
        self._disk_engine = disk_engine
        self._busy = busy
        self._sparse = sparse
        self._placing = placing
        self._leaving = leaving
        self._disk_room = disk_room
        self.demoted_bytes = 0

    async def make_room(self, place: int, need_bytes: int) -> bool:
        """Free about *need_bytes* of any tier; return whether anything came free. Holds its room_lock."""
        if not self._tiers[place].files.is_memory:
            return await self._leaving.make_room(place, need_bytes)
        stuck: set[bytes] = set()
        while victims := self._leaving.victims(place, need_bytes, stuck):
            if await self.demote(place, victims) > 0:
                return True
            if not self._has_free_disk(place) and await self._evict_filling(place, victims) > 0:
                return True
            stuck.update(item[:16] for item in victims)  # Pinned, say, and no disk has room for it.
        # While others can move and nothing is lost by it, what could only leave stays.
        stuck = {vid for vid in stuck if vid not in self._busy}
        return await self._evict_filling(place, self._leaving.victims(place, need_bytes, stuck)) > 0

    def _has_free_disk(self, place: int) -> bool:
        """Return whether whatever is in memory could move without pushing anything out."""
        largest_bytes = self._tiers[place].budget.size_bytes // DRAM_SHARE_MAX
        return any(tier.room_bytes >= largest_bytes for tier in self._tiers if not tier.files.is_memory)

    async def _evict_filling(self, place: int, items: list[ItemId]) -> int:
        """Drop those of *items* whose versions are being filled: these can't move, their groups can leave."""
        return await self._leaving.evict_groups(place, [item for item in items if item[:16] in self._busy])

    async def demote(self, place: int, items: list[ItemId]) -> int:
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
                freed_bytes.append(await self._move(place, VersionId(vid), None, self._disk_room))
            except CacheError as error:
                if self._tiers[place].is_pinned(vid):
                    log.warning("can't move %s to NVMe, it is pinned and stays: %s", vid.hex(), error)
                    continue
                log.warning("can't move %s to NVMe, it leaves the cache: %s", vid.hex(), error)
                try:
                    freed_bytes.append(await self._leaving.drop_version(vid))
                except CacheError as failure:
                    log.warning("%s can't leave the cache: %s", vid.hex(), failure)

    async def move(self, vid: VersionId, *, to_memory: bool, room: Room) -> int:
        """Move all of a version to DRAM, or to a disk; return the bytes that moved, 0 if it has to stay.

        *room* makes room where it goes. Raises CacheFull and CacheError.
        """
        row = self._index.version(vid)
        if row is None or self._leaving.has_to_stay(vid):
            return 0
        if self._tiers[row.tier].files.is_memory == to_memory:
            return 0
        target = 0 if to_memory else self._placing.emptiest_disk(row.size_bytes)
        return await self._move(row.tier, vid, target, room)

    async def _move(self, place: int, vid: VersionId, target_place: int | None, room: Room) -> int:
        """Move a version to *target_place*, the emptiest disk by default; return the bytes that came free.

        What would push out there what is still needed leaves instead, unless it was asked for.
        """
        source, row = self._tiers[place], self._index.version(vid)
        if row is None or row.tier != place or self._leaving.has_to_stay(vid):
            return 0
        with self._busy.moved([vid]):
            items = items_of(vid, row, self._index.groups_of(vid))
            charged = sum(source.policy.size_of(item) or 0 for item in items)

            def choose() -> int:
                return self._placing.emptiest_disk(charged) if target_place is None else target_place

            def charge_at(target: Tier) -> int:
                return charged + (target.files.label_bytes - source.files.label_bytes if row.whole else 0)

            if target_place is None and not source.is_pinned(vid) and not _is_expected(source, items):
                target = self._tiers[choose()]
                if target.is_all_expected(charge_at(target)):
                    return await self._leaving.evict_held(place, items)
            chosen = await room.find(choose, charge_at)
            try:
                return await self._carry(place, chosen, vid, row, items)
            except CacheFull:
                await room.disk_refused(chosen)
                raise

    async def _carry(
        self, place: int, target_place: int, vid: VersionId, row: VersionRow, items: list[ItemId]
    ) -> int:
        """Copy a version to where room was taken for it; return the bytes that came free, 0 if it stays."""
        source, target = self._tiers[place], self._tiers[target_place]
        sizes = {item: source.policy.size_of(item) or 0 for item in items}
        label_bytes = (target.files.label_bytes - source.files.label_bytes) if row.whole else 0
        charged, groups = sum(sizes.values()), self._index.groups_of(vid)
        is_moved = False
        try:
            await shielded.run(
                self._disk_engine,
                lambda: target.files.copy_from(source.files, row, vid, groups),
                demand=False,
            )
            await shielded.commit(self._committer, lambda w: change(w, vid, tier=target_place))
            is_moved = not await self._is_kept_open(vid, place)
        finally:
            if not is_moved:
                await shielded.run(self._disk_engine, lambda: remove(target.files, vid), demand=False)
                target.budget.give_back(charged + label_bytes)
        if not is_moved:
            return 0
        if vid in self._sparse:
            self._sparse[vid].tier = target_place
        await shielded.run(self._disk_engine, lambda: remove(source.files, vid), demand=False)
        for item, size_bytes in sizes.items():
            _hand_on(source, target, item, size_bytes + label_bytes)
        source.budget.give_back(charged)
        self.demoted_bytes += charged
        return charged

    async def _is_kept_open(self, vid: bytes, place: int) -> bool:
        """Take the commit of a move back if the kernel opened the file in *place* before it.

        Unlinked, it would take space that is not charged. Return whether it was taken back.
        """
        if not self._leaving.is_open(vid):
            return False
        try:
            await shielded.commit(self._committer, lambda w: change(w, vid, tier=place))
        except CacheError as error:
            log.warning("%s moved while it was opened: %s", vid.hex(), error)
            return False
        return True

    # DRAM's low-water mark

    async def keep_dram_room(self) -> None:
        """Demote ahead of need, so that what is fetched rarely waits for room. Runs for ever."""
        first = self._tiers[0]
        if not first.files.is_memory:
            return
        while True:
            await first.is_low.wait()
            first.is_low = trio.Event()
            try:
                async with first.room_lock:
                    short_bytes = first.budget.size_bytes // DRAM_KEPT_SHARE - first.budget.room_bytes
                    moved = short_bytes <= 0 or await self.make_room(0, short_bytes)
            except CacheError as error:
                log.warning("can't make room in DRAM ahead of need: %s", error)
                moved = False
            if not moved:
                await trio.sleep(1)  # All of it is in use, or the disk fails: look again later.

    async def drain_dram(self) -> AsyncIterator[tuple[int, int]]:
        """Move all that DRAM holds to NVMe, as far as it fits; yield (bytes moved, bytes in all)."""
        tier = self._tiers[0]
        if not tier.files.is_memory:
            return
        before, total = self.demoted_bytes, tier.budget.used_bytes
        items = tier.policy.order(len(tier.policy))
        for start in range(0, len(items), _DRAIN_STEP):
            async with tier.room_lock:
                await self.demote(0, items[start : start + _DRAIN_STEP])
            yield self.demoted_bytes - before, total


def _is_expected(tier: Tier, items: list[ItemId]) -> bool:
    """Return whether a running epoch will use some of *items*."""
    return any(next is not None and not next.later for next in map(tier.policy.next_of, items))


def _hand_on(source: Tier, target: Tier, item: ItemId, size_bytes: int) -> None:
    """Have *target*'s policy know of *item* what *source*'s does by now."""
    next = source.policy.next_of(item)
    used = next is None and not source.policy.is_wanted(item)
    source.policy.removed(item)
    target.added(item, size_bytes, used=used)
    if next is not None:
        target.policy.expect(item, next)
