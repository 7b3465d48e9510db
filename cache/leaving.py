"""How what is cached leaves a tier: the index commits before the unlink, space is given back after it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container
from contextlib import ExitStack

from cache import shielded
from cache.busy import Busy
from cache.committer import Committer
from cache.engine import Engine
from cache.errors import CacheError
from cache.index import Index
from cache.index_writer import IndexWriter
from cache.model import GROUP_BLOCKS, GroupIndex
from cache.places import Tier, punch, remove
from cache.policy.eviction import ItemId
from cache.records import Group, VersionRow, group_key
from cache.rows import drop_items, group_of
from cache.sparse import SparseVersions
from cache.tier import TierFiles
from cache.unverified import Unverified
from cache.uses import Uses

log = logging.getLogger(__name__)

Rows = dict[ItemId, tuple[VersionRow, list[tuple[GroupIndex, Group]]]]


class Leaving:
    """Evicts items: whole objects, and groups of sparse ones. For the mover's trio thread.

    Who is cancelled meanwhile hears of it once what began to leave has left.
    """

    def __init__(
        self,
        tiers: list[Tier],
        index: Index,
        committer: Committer,
        disk_engine: Engine,
        busy: Busy,
        sparse: SparseVersions,
        unverified: Unverified,
        uses: Uses,
        is_open: Callable[[bytes], bool],
    ) -> None:
        self._tiers = tiers
        self._index = index
        self._committer = committer
        self._disk_engine = disk_engine
        self._busy = busy
        self._sparse = sparse
        self._unverified = unverified
        self._uses = uses
        self.is_open = is_open
        self.evicted_bytes = 0

    # What may leave

    def has_to_stay(self, vid: bytes) -> str | None:
        """Return why the version stays where it is for now; None if it may be moved and evicted."""
        if vid in self._busy:
            return "being written or moved"
        return "open in passthrough" if self.is_open(vid) else None

    def victims(self, place: int, need_bytes: int, besides: Container[bytes] = ()) -> list[ItemId]:
        """Return what the tier's policy gives up for *need_bytes*, without what has to stay.

        *besides*: versions that were tried, and stay too.
        """
        staying = _Staying(lambda item: item[:16] in besides or self._stays(item))
        return self._tiers[place].policy.victims(need_bytes, staying)

    def _stays(self, item: bytes) -> bool:
        """Return whether *item* is no victim: it would be gone, and take space that is not charged."""
        vid = item[:16]
        if vid in self._busy and not self._may_leave_alone(item):
            return True
        return self.is_open(vid)

    def _may_leave_alone(self, item: bytes) -> bool:
        """Return whether a group may go while other groups of its version are being filled.

        It needs another group that keeps the file. While all groups are there, the version is being
        made whole.
        """
        return item[:16] in self._sparse and self._busy.may_leave_alone(item)

    # Ways out

    async def make_room(self, place: int, need_bytes: int) -> bool:
        """Free about *need_bytes* of a disk; return whether anything came free."""
        victims = self.victims(place, need_bytes)
        return await self.evict(place, victims) > 0 or await self._unverified.drop_one(place)

    async def evict(self, place: int, items: list[ItemId]) -> int:
        """Drop *items* from a tier; return the bytes that came free. Skips what has to stay."""
        return await self._evict(place, [item for item in items if not self._stays(item)])

    async def drop(self, vid: bytes, group: int) -> None:
        """Evict the item that holds a group found to be corrupt."""
        row = self._index.version(vid)
        if row is not None:
            item = ItemId(vid if row.whole else group_key(vid, group))
            await self._evict(row.tier, [item], is_bad=True)  # Who has it open keeps the unlinked file.

    async def drop_version(self, vid: bytes) -> int:
        """Evict all of a version; return the bytes that came free."""
        row = self._index.version(vid)
        if row is None:
            return 0
        return await self.evict(row.tier, items_of(vid, row, self._index.groups_of(vid)))

    async def _evict(self, place: int, items: list[ItemId], *, is_bad: bool = False) -> int:
        tier = self._tiers[place]
        alone = [item for item in items if item[:16] in self._busy]
        items = [item for item in items if item[:16] not in self._busy and _is_in(tier, item)]
        freed_bytes = 0
        if items:
            with self._busy.moved(item[:16] for item in items):
                freed_bytes = await self.evict_held(place, items, is_bad=is_bad)
        return freed_bytes + await self.evict_groups(place, alone)

    async def evict_held(self, place: int, items: list[ItemId], *, is_bad: bool = False) -> int:
        """Drop *items*, whose versions the caller has alone; return the bytes that came free.

        What the kernel opens before the commit is kept, unless it is in memory and *is_bad*.
        """
        tier = self._tiers[place]
        rows = self._rows_of(items) if tier.files.is_memory and not is_bad else {}
        left = self._sparse.blocks_left(items)
        last_groups = {vid for vid, blocks_present in left.items() if not blocks_present}
        await shielded.commit(self._committer, lambda w: drop_items(w, items, last_groups))
        for vid, blocks_present in left.items():
            self._sparse[vid].blocks_present = blocks_present
            if not blocks_present:
                self._sparse.take(vid)
        late = [item for item in items if len(item) == 16 and self.is_open(item)]
        if late and tier.files.is_memory:  # Such files bear no label to be verified by.
            late = await self._put_back({item: rows[item] for item in late if item in rows})
        items = [item for item in items if item not in late]
        await shielded.run(self._disk_engine, lambda: _remove_files(tier.files, items, last_groups))
        if not tier.files.is_memory:
            self._keep(place, late)
        return self.gone(place, items)

    def _rows_of(self, items: list[ItemId]) -> Rows:
        """Return what the index has of the whole objects among *items*."""
        rows = {item: self._index.version(item) for item in items if len(item) == 16}
        return {item: (row, self._index.groups_of(item)) for item, row in rows.items() if row is not None}

    async def _put_back(self, rows: Rows) -> list[ItemId]:
        """Give files that the kernel opened their rows back; return those that have them."""
        try:
            await shielded.commit(self._committer, lambda w: _put_rows(w, rows))
        except CacheError as error:
            log.warning("%d open files left the cache: %s", len(rows), error)
            return []
        return list(rows)

    async def evict_groups(self, place: int, items: list[ItemId]) -> int:
        """Drop groups of versions that are being filled: their rows and files stay.

        Skips what may not leave alone. Returns the bytes that came free.
        """
        tier = self._tiers[place]
        items = [item for item in items if self._may_leave_alone(item) and _is_in(tier, item)]
        if not items:
            return 0
        left = self._sparse.blocks_left(items)
        gone = {vid: self._sparse[vid].blocks_present - count for vid, count in left.items()}
        with ExitStack() as stack:  # No await from here to the commit.
            for vid in gone:
                stack.enter_context(self._busy.used(vid))
                stack.callback(self._sparse.forget_if_empty, vid)
                self._sparse[vid].blocks_present -= gone[vid]  # At once: it might be taken for whole else.
            stack.enter_context(self._busy.left(items))
            try:
                await shielded.commit(self._committer, lambda w: drop_items(w, items, set()))
            except CacheError:
                for vid in gone:
                    self._sparse[vid].blocks_present += gone[vid]
                raise
            await shielded.run(self._disk_engine, lambda: _remove_files(tier.files, items, set()))
            return self.gone(place, items)

    def gone(self, place: int, items: list[ItemId]) -> int:
        """Give the space of *items* back, which have left the disk; return their bytes."""
        tier, freed_bytes = self._tiers[place], 0
        for item in items:
            size_bytes = tier.policy.size_of(item) or 0
            freed_bytes += size_bytes
            tier.policy.removed(item)
            self._uses.left(item, size_bytes)
        tier.budget.give_back(freed_bytes)
        self.evicted_bytes += freed_bytes
        return freed_bytes

    def _keep(self, place: int, items: list[ItemId]) -> None:
        """Keep files that the kernel opened while their rows were removed: they are as if found without."""
        policy = self._tiers[place].policy
        for item in items:
            size_bytes = policy.size_of(item) or 0
            self._unverified.keep(place, item, size_bytes)
            policy.removed(item)
            self._uses.left(item, size_bytes)


class _Staying(Container[bytes]):
    """Whatever *stays* says so of."""

    def __init__(self, stays: Callable[[bytes], bool]) -> None:
        self._stays = stays

    def __contains__(self, item: object) -> bool:
        return isinstance(item, bytes) and self._stays(item)


def _is_in(tier: Tier, item: ItemId) -> bool:
    return tier.policy.size_of(item) is not None


def items_of(vid: bytes, row: VersionRow, groups: list[tuple[GroupIndex, Group]]) -> list[ItemId]:
    """Return the items that a version is cached as: one if it is whole, else one a group."""
    return [ItemId(vid)] if row.whole else [ItemId(group_key(vid, group)) for group, _ in groups]


def _put_rows(w: IndexWriter, rows: Rows) -> None:
    for vid, (row, groups) in rows.items():
        w.put_version(vid, row)
        for number, group in groups:
            w.put_group(vid, number, group)


def _remove_files(files: TierFiles, items: list[ItemId], emptied: set[bytes]) -> None:
    for item in items:
        if len(item) == 16 or item[:16] in emptied:
            remove(files, item[:16])
        else:
            start = group_of(item) * GROUP_BLOCKS
            punch(files, item[:16], range(start, start + GROUP_BLOCKS))
