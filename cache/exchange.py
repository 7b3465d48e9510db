"""Files that change sides between staging and the tiers without a copy: by a second name."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cache import shielded
from cache.busy import Busy
from cache.committer import Committer
from cache.engine import Engine
from cache.errors import CacheError, CacheFull
from cache.index import Index
from cache.index_writer import IndexWriter
from cache.leaving import Leaving
from cache.model import ObjectVersion, VersionId
from cache.places import Tier, remove
from cache.policy.eviction import ItemId
from cache.room import Room
from cache.rows import drop_items, put_whole
from cache.tier import TierFiles
from cache.unverified import Unverified

log = logging.getLogger(__name__)

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


class Exchange:
    """For the mover's trio thread."""

    def __init__(
        self,
        tiers: list[Tier],
        index: Index,
        committer: Committer,
        disk_engine: Engine,
        busy: Busy,
        unverified: Unverified,
        leaving: Leaving,
        room: Room,
    ) -> None:
        self._tiers = tiers
        self._index = index
        self._committer = committer
        self._disk_engine = disk_engine
        self._busy = busy
        self._unverified = unverified
        self._leaving = leaving
        self._room = room

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
        if place is None or await self._is_there(vid):
            return commit(None)
        with self._busy.moved([vid]):
            files = self._tiers[place].files
            charged = files.whole_bytes(version.size_bytes)
            try:
                await self._room.reserve(place, charged)
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
                self._tiers[place].added(ItemId(vid), charged, used=False)
            return adopted

    async def _is_there(self, vid: VersionId) -> bool:
        """Return whether the version is cached, or on its way: the key had the same bytes before."""
        try:
            await self._unverified.settled(vid)
        except CacheError:
            return True
        return vid in self._busy or self._index.version(vid) is not None

    async def hand_over(
        self, vid: VersionId, path: str, file: int, mtime_ns: int, change: Callable[[IndexWriter], None]
    ) -> None:
        """Give a whole object, which the kernel has open, up to whoever will write to it, as *path*.

        *file*, *mtime_ns*: see `TierFiles.hand_over`. *change* is in the same commit. Raises CacheError, also
        where there is no such file any more.
        """
        while await self._unverified.settled(vid) and vid in self._busy:
            await self._busy.free(vid)
        row = self._index.version(vid)
        if row is None or not row.whole:
            raise CacheError(f"{path}: readers have a file open that is not in the cache any more")
        tier, item = self._tiers[row.tier], ItemId(vid)

        def commit(w: IndexWriter) -> None:
            change(w)
            drop_items(w, [item], set())

        with self._busy.moved([vid]):
            await shielded.run(self._disk_engine, lambda: tier.files.hand_over(vid, path, file, mtime_ns))
            await shielded.commit(self._committer, commit)
            await shielded.run(self._disk_engine, lambda: remove(tier.files, vid))
            self._leaving.gone(row.tier, [item])

    async def _take_back(self, place: int, vid: VersionId, charged: int, *, landed: bool) -> None:
        if landed:
            await shielded.run(self._disk_engine, lambda: remove(self._tiers[place].files, vid))
        self._tiers[place].budget.give_back(charged)

    def _place_beside(self, path: str) -> int | None:
        """Return the tier that is on the same file system as *path*: only there can it have two names."""
        for place, tier in enumerate(self._tiers):
            try:
                if tier.files.is_beside(path):
                    return place
            except CacheError as error:
                if not os.path.lexists(path):
                    return None  # Its name went while it was sent: *commit* will see.
                log.warning("%s: can't be kept in the cache: %s", path, error)
        return None
