"""How object versions get into the tiers: charged, written, renamed, and then the index commits."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator

from cache.busy import Busy
from cache.committer import Committer
from cache.engine import Engine
from cache.errors import CacheError, CacheFull
from cache.index import Index
from cache.lake.base import Body
from cache.model import BLOCK_BYTES, GROUP_BLOCKS, GroupIndex, ObjectVersion, VersionId, block_count
from cache.places import Tier, punch, remove
from cache.placing import Placing
from cache.policy.due import SOME_TIME, Next
from cache.policy.eviction import ItemId
from cache.records import charge, group_key
from cache.room import Room
from cache.rows import change, put_blocks, put_whole
from cache.sparse import Sparse, SparseVersions
from cache.tier import TierFiles
from cache.unverified import Unverified
from cache.uses import Uses

log = logging.getLogger(__name__)


class Filling:
    """For the mover's trio thread. A fill's GET and its writing are one job of *lake_engine*.

    Other file calls run on *disk_engine*. Fills are cancelled only when the mover ends.
    """

    def __init__(
        self,
        tiers: list[Tier],
        index: Index,
        committer: Committer,
        lake_engine: Engine,
        disk_engine: Engine,
        busy: Busy,
        sparse: SparseVersions,
        unverified: Unverified,
        uses: Uses,
        placing: Placing,
        room: Room,
        drop_version: Callable[[bytes], Awaitable[int]],
    ) -> None:
        self._tiers = tiers
        self._index = index
        self._committer = committer
        self._lake_engine = lake_engine
        self._disk_engine = disk_engine
        self._busy = busy
        self._sparse = sparse
        self._unverified = unverified
        self._uses = uses
        self._placing = placing
        self._room = room
        self._drop_version = drop_version

    # For fills that wait for nothing, see cache/quick.py

    def begin_nowait(self, vid: VersionId, size_bytes: int, due: int | None) -> tuple[int, int] | None:
        """Charge a whole object that nobody asked for; return its tier and the bytes, None if it must wait.

        The version is busy then. End it with `end_nowait`, after a failure with its bytes given back.
        """
        if self._busy.is_moving(vid) or vid in self._unverified:
            return None
        place = self._placing.place(size_bytes)
        tier = self._tiers[place]
        charged = tier.files.whole_bytes(size_bytes)
        if not self._room.take_nowait(place, charged, due):
            return None
        tier.landing_bytes += charged
        self._busy.begin(vid)
        return place, charged

    def end_nowait(self, vid: bytes, place: int, charged_bytes: int, *, landed: bool) -> None:
        """End what `begin_nowait` began."""
        self._tiers[place].landing_bytes -= charged_bytes
        if not landed:
            self._tiers[place].budget.give_back(charged_bytes)
        self._busy.end(vid)

    # Small objects

    async def fill_whole(
        self,
        version: ObjectVersion,
        get: Callable[[], Body],
        *,
        demand: bool,
        next: Next = SOME_TIME,
        wanted: bool = False,
        wanted_tier: str = "",
    ) -> None:
        """Get a small object and store it. Raises what *get* raises, CacheFull and CacheError.

        *next*: when it is expected to be used, if it is neither demanded nor wanted. *wanted*: somebody
        asked for it to be here, though nobody waits; *wanted_tier*: in "dram" or "nvme".
        """
        vid = version.id
        if await self._unverified.settled(vid):
            return
        with self._busy.used(vid):
            place = await self._room.find(
                lambda: self._placing.place(version.size_bytes, wanted_tier),
                lambda tier: tier.files.whole_bytes(version.size_bytes),
                demand=demand or wanted,
                due=next.due,
            )
            tier, files = self._tiers[place], self._tiers[place].files
            charged = files.whole_bytes(version.size_bytes)
            try:
                with tier.landing(charged):
                    checksums = await self._lake_engine.run(
                        lambda: files.land_whole(version, vid, get()), demand=demand
                    )
                    await self._committer.commit(lambda w: put_whole(w, version, place, checksums))
            except BaseException as error:
                if isinstance(error, CacheError):
                    await self._disk_engine.run(lambda: remove(files, vid))
                tier.budget.give_back(charged)
                if isinstance(error, CacheFull) and (demand or wanted):
                    await self._room.disk_refused(place)
                raise
            tier.added(ItemId(vid), charged, used=demand)
            if wanted:
                tier.policy.want(ItemId(vid))
            elif not demand:
                tier.policy.expect(ItemId(vid), next)

    # Large objects

    async def fill_blocks(
        self,
        version: ObjectVersion,
        blocks: range,
        get_pieces: Callable[[], Iterator[Body]],
        *,
        demand: bool,
        wanted_tier: str = "",
        is_spare: bool = False,
        due: int | None = None,
    ) -> None:
        """Get missing *blocks*, all in one group of a large object, and store them.

        *is_spare*: they push out nothing that a recognised epoch needs, unless only after *due*.
        """
        assert blocks.start // GROUP_BLOCKS == (blocks.stop - 1) // GROUP_BLOCKS, blocks
        vid = version.id
        item = group_key(vid, GroupIndex(blocks.start // GROUP_BLOCKS))
        if await self._unverified.settled(vid, item):
            return
        is_sound = True
        with self._busy.used(vid):
            state = self._sparse.get(vid)
            if state is None:
                place = self._placing.place(version.size_bytes, wanted_tier)
                state = self._sparse.add(vid, Sparse(version, place))
            try:
                with self._busy.filled(item):
                    await self._fill_group(state, vid, blocks, get_pieces, demand, is_spare, due)
                if state.is_full:
                    is_sound = await self._make_whole(vid, state)
            finally:
                self._sparse.forget_if_empty(vid)
        if not is_sound:
            await self._drop_version(vid)

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
        tier, offset = self._tiers[place], blocks.start * BLOCK_BYTES
        group, first = GroupIndex(blocks.start // GROUP_BLOCKS), blocks.start % GROUP_BLOCKS
        charged = charge(min(version.size_bytes, blocks.stop * BLOCK_BYTES) - offset)
        await self._room.reserve(place, charged, demand=not is_spare, due=due)
        try:
            with tier.landing(charged):
                checksums = await self._lake_engine.run(
                    lambda: tier.files.land_blocks(vid, offset, get_pieces()), demand=demand
                )
                await self._committer.commit(lambda w: put_blocks(w, version, place, group, first, checksums))
        except BaseException as error:
            if isinstance(error, Exception):  # What of it was written must not stay uncharged.
                await self._disk_engine.run(lambda: punch(tier.files, vid, blocks))
            tier.budget.give_back(charged)
            if isinstance(error, CacheFull) and not is_spare:
                await self._room.disk_refused(place)
            raise
        assert len(checksums) == len(blocks)
        state.blocks_present += len(blocks)
        item = ItemId(group_key(vid, group))
        tier.added(item, (tier.policy.size_of(item) or 0) + charged, used=demand)

    async def _make_whole(self, vid: VersionId, state: Sparse) -> bool:
        """Turn a version of which all is there into a whole one; return False if its file is lost."""
        if self._sparse.take(vid) is None:
            return True  # Another flight's landing got here first.
        tier, version = self._tiers[state.tier], state.version
        groups = self._index.groups_of(vid)
        checksums = [checksum for _, group in groups for checksum in group.checksums]
        assert len(checksums) == block_count(version.size_bytes)
        # A worker that looks between rename and commit finds a row that says partial, misses
        # the file, and looks again.
        charged = 0
        try:
            await self._room.reserve(state.tier, tier.files.label_bytes)
            charged = tier.files.label_bytes
            await self._disk_engine.run(lambda: tier.files.make_whole(version, vid, checksums))
            await self._committer.commit(lambda w: change(w, vid, whole=True))
        except CacheError as error:  # All of it is there, and can be read as it is.
            log.warning("%s stays a sparse file: %s", version.key, error)
            is_sound = await self._disk_engine.run(lambda: _is_made_sparse(tier.files, vid))
            tier.budget.give_back(charged)
            self._sparse.add(vid, state)
            return is_sound
        items = [ItemId(group_key(vid, group)) for group, _ in groups]
        is_held, is_wanted = self._uses.is_held(vid), all(map(tier.policy.is_wanted, items))
        for item in items:
            charged += tier.policy.size_of(item) or 0
            tier.policy.removed(item)
        tier.added(ItemId(vid), charged, used=not (is_held or is_wanted))
        if is_held:
            tier.policy.expect(ItemId(vid))
        elif is_wanted:
            tier.policy.want(ItemId(vid))
        return True


def _is_made_sparse(files: TierFiles, vid: bytes) -> bool:
    try:
        files.make_sparse(vid)
    except CacheError as error:
        log.warning("%s leaves the cache: %s", files.object_path(vid), error)
        return False
    return True
