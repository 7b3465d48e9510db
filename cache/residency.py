"""Where each object version's bytes are: what all tiers together can be asked.

Order of the steps, so that the index never names a file that is not there: on the way in the
file is renamed before the index commits; on the way out the index commits before the unlink.
Space is charged before bytes are written and given back after they are unlinked.
"""

from __future__ import annotations

from collections.abc import Callable

from cache.busy import Busy
from cache.committer import Committer
from cache.demotion import Demotion
from cache.engine import Engine
from cache.exchange import Exchange
from cache.filling import Filling
from cache.index import Index
from cache.leaving import Leaving
from cache.model import VersionId
from cache.opens import OpenTable
from cache.places import Tier
from cache.placing import Placing
from cache.policy.ledger import Ledger
from cache.room import Room
from cache.sparse import SparseVersions
from cache.unverified import Unverified
from cache.uses import Uses


class Residency:
    """What belongs to the tiers, put together; it decides nothing itself. For the mover's trio thread.

    What others use of the parts has its name here, and is described there.
    """

    def __init__(
        self,
        tiers: list[Tier],
        index: Index,
        committer: Committer,
        lake_engine: Engine,
        disk_engine: Engine,
        opens: OpenTable | None = None,
        passes_disks: Callable[[], bool] = lambda: False,
    ) -> None:
        def is_open(vid: bytes) -> bool:
            return opens is not None and opens.is_passed_through(vid)

        self.tiers = tiers
        self._index = index
        self.busy = Busy()
        self.sparse = SparseVersions(tiers, index, committer, self.busy)
        self.unverified = Unverified(tiers, index, committer, disk_engine, self.busy, is_open)
        self.uses = Uses(tiers, committer)
        self.placing = Placing(tiers, self.sparse, passes_disks)
        on_disk = (tiers, index, committer, disk_engine, self.busy)
        self.leaving = Leaving(*on_disk, self.sparse, self.unverified, self.uses, is_open)
        disk_room = Room(tiers, self.placing, self.leaving.make_room)
        self.demotion = Demotion(*on_disk, self.sparse, self.placing, self.leaving, disk_room)
        self._room = Room(tiers, self.placing, self.demotion.make_room)
        self.filling = Filling(
            tiers,
            index,
            committer,
            lake_engine,
            disk_engine,
            self.busy,
            self.sparse,
            self.unverified,
            self.uses,
            self.placing,
            self._room,
            self.leaving.drop_version,
        )
        self.exchange = Exchange(*on_disk, self.unverified, self.leaving, self._room)

        self.begin_fill_nowait = self.filling.begin_nowait
        self.end_fill_nowait = self.filling.end_nowait
        self.fill_whole = self.filling.fill_whole
        self.fill_blocks = self.filling.fill_blocks
        self.reserve = self._room.reserve
        self.may_read_ahead = self.placing.may_read_ahead
        self.may_hold = self.placing.may_hold
        self.present_bytes = self.sparse.present_bytes
        self.add_sparse = self.sparse.add
        self.adopt_staged = self.exchange.adopt_staged
        self.hand_over = self.exchange.hand_over
        self.add_unverified = self.unverified.add
        self.adopt_all = self.unverified.adopt_all
        self.used = self.uses.used
        self.touched = self.uses.touched
        self.hold = self.uses.hold
        self.let_go = self.uses.let_go
        self.expect = self.uses.expect
        self.release = self.uses.release
        self.passed = self.uses.passed
        self.outdated = self.uses.outdated
        self.usage = self.uses.usage
        self.save_usage = self.uses.save_usage
        self.has_to_stay = self.leaving.has_to_stay
        self.evict = self.leaving.evict
        self.drop = self.leaving.drop
        self.drop_version = self.leaving.drop_version
        self.keep_dram_room = self.demotion.keep_dram_room
        self.drain_dram = self.demotion.drain_dram

    @property
    def size_bytes(self) -> int:
        """Return what all tiers together hold at most."""
        return self.placing.size_bytes

    @property
    def ledger(self) -> Ledger:
        return self.uses.ledger

    @property
    def demoted_bytes(self) -> int:
        return self.demotion.demoted_bytes

    @property
    def evicted_bytes(self) -> int:
        return self.leaving.evicted_bytes

    def place_of(self, vid: bytes) -> int | None:
        """Return the tier that the version is in, None where it is in none."""
        row = self._index.version(vid)
        return None if row is None else row.tier

    async def move(self, vid: VersionId, *, to_memory: bool) -> int:
        """Move all of a version to DRAM, or to a disk; return the bytes that moved, 0 if it has to stay.

        Raises CacheFull and CacheError.
        """
        return await self.demotion.move(vid, to_memory=to_memory, room=self._room)
