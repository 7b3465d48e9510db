"""Whole files without a row in the index: they are charged, and taken over once they are verified."""

from __future__ import annotations

import logging
from collections.abc import Callable

from cache import shielded
from cache.busy import Busy
from cache.committer import Committer
from cache.engine import Engine
from cache.errors import CacheError
from cache.index import Index
from cache.model import VersionId
from cache.places import Tier, remove
from cache.policy.eviction import ItemId
from cache.rows import put_whole

log = logging.getLogger(__name__)


class Unverified:
    """Found at a start after the index was lost, or kept because the kernel has them open.

    Invariant: a version in here is charged to its tier, is in no policy, and nobody is busy with it.
    *is_open* tells of a version whether the kernel has its file open.
    """

    def __init__(
        self,
        tiers: list[Tier],
        index: Index,
        committer: Committer,
        disk_engine: Engine,
        busy: Busy,
        is_open: Callable[[bytes], bool],
    ) -> None:
        self._tiers = tiers
        self._index = index
        self._committer = committer
        self._disk_engine = disk_engine
        self._busy = busy
        self._is_open = is_open
        self._charges: dict[bytes, tuple[int, int]] = {}  # Version to its tier, and what it is charged there.

    def __contains__(self, vid: bytes) -> bool:
        return vid in self._charges

    def __len__(self) -> int:
        return len(self._charges)

    def charges(self) -> dict[bytes, tuple[int, int]]:
        """Return the tier and the bytes charged of each version."""
        return dict(self._charges)

    def add(self, place: int, vid: bytes, charged_bytes: int) -> bool:
        """Charge a file found without a row; return False if there is no room for it."""
        budget = self._tiers[place].budget
        if charged_bytes > budget.room_bytes:
            return False
        budget.take(charged_bytes)
        self.keep(place, vid, charged_bytes)
        return True

    def keep(self, place: int, vid: bytes, charged_bytes: int) -> None:
        """Go on with a file that is charged, and whose row was removed."""
        self._charges[vid] = (place, charged_bytes)

    async def settled(self, vid: VersionId, item: bytes = b"") -> bool:
        """Wait until nobody moves the version or its group *item*; return whether it is whole by then.

        A file found without a row is verified first. Use `Busy` at once after it, without an await.
        Raises CacheError when the index can't be written.
        """
        while True:
            await self._busy.settled(vid, item)
            if vid not in self._charges:
                break
            await self.adopt(vid)
        row = self._index.version(vid)
        return row is not None and row.whole

    async def adopt(self, vid: VersionId) -> bool:
        """Verify a file found without a row; return whether it holds the whole version.

        Raises CacheError when the index can't be written: the file stays as it is then.
        """
        place, charged = self._charges.pop(vid)
        tier = self._tiers[place]
        with self._busy.moved([vid]):
            try:
                label = await self._disk_engine.run(lambda: tier.files.read_label(vid))
                if label is not None:
                    version, checksums = label
                    await shielded.commit(self._committer, lambda w: put_whole(w, version, place, checksums))
            except BaseException:
                self._charges[vid] = (place, charged)
                raise
            if label is None:
                log.warning("%s: dropped: the bytes do not match the label", tier.files.object_path(vid))
                await shielded.run(self._disk_engine, lambda: remove(tier.files, vid))
                tier.budget.give_back(charged)
                return False
            tier.added(ItemId(vid), charged, used=False)
            return True

    async def adopt_all(self) -> int:
        """Verify, in the background, all files found without a row; return how many were good."""
        good = 0
        for vid in list(self._charges):
            if vid not in self._charges:
                continue  # Somebody needed it, or its room, sooner.
            try:
                good += await self.adopt(VersionId(vid))
            except CacheError as error:
                log.warning("%s is not taken over for now: %s", vid.hex(), error)
        return good

    async def drop_one(self, place: int) -> bool:
        """Give up a file of this tier; return whether there was one. What the kernel has open stays."""
        found = (vid for vid, (where, _) in self._charges.items() if where == place)
        vid = next((vid for vid in found if not self._is_open(vid)), None)
        if vid is None:
            return False
        _, charged = self._charges.pop(vid)
        with self._busy.moved([vid]):
            await shielded.run(self._disk_engine, lambda: remove(self._tiers[place].files, vid))
            self._tiers[place].budget.give_back(charged)
        return True
