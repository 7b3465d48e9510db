"""What is done for a sample set when an epoch begins, and when what is known of its order changes.

The tiers are told what of it is resident and will be used, so that it stays for that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio

from cache.followed import Followed, FollowedSets
from cache.index import Index
from cache.keeping import Keeping
from cache.policy.sets import Members
from cache.residency import Residency

_RELEASE_S = 300.0  # What an idle set still needed is given up after it, where another one needs room.
_CHUNK = 200  # Members looked at in one go: about two milliseconds.


class Epochs:
    """For the mover's trio thread. *sets*: runs its tasks."""

    def __init__(self, sets: FollowedSets, index: Index, residency: Residency, keeping: Keeping) -> None:
        self._sets = sets
        self._index = index
        self._residency = residency
        self._keeping = keeping

    def began(self, followed: Followed) -> None:
        """Have what is resident of the set found anew, unless nothing has left the tiers since."""
        followed.epoch_began()
        evicted_bytes = self._residency.evicted_bytes
        if followed.samples.epoch > 1 and followed.is_looked_over:
            if evicted_bytes == followed.evicted_bytes_seen:
                return
            followed.samples.look_again()
        followed.evicted_bytes_seen = evicted_bytes
        self.look_over(followed)

    def look_over(self, followed: Followed) -> None:
        """Find what is resident of the set, and have it kept until the epoch has used it."""
        followed.is_looked_over = False
        if not followed.is_looking:
            followed.is_looking = True
            self._sets.start(self._look_over, followed)

    async def _look_over(self, followed: Followed) -> None:
        try:
            while not followed.is_looked_over:
                followed.is_looked_over = True  # Unless it is asked for again meanwhile.
                await self._look_once(followed)
        finally:
            followed.is_looking = False
            self._sets.wake()

    async def _look_once(self, followed: Followed) -> None:
        samples = followed.samples
        for place, inode in enumerate(samples.members.inodes):
            if place % _CHUNK == 0:
                await trio.lowlevel.checkpoint()
                if not followed.is_looked_over or self._sets.is_broken:
                    return
            if samples.is_used(place):
                continue
            vid = self._keeping.resident(inode)
            if vid is not None:
                samples.found_resident(place)
                self._keeping.expect(samples, place, vid)

    def release_idle(self, now_s: float) -> None:
        """Give up what idle sets still needed: another one wants the room."""
        for followed in self._sets:
            if not followed.is_released and now_s - followed.samples.last_used_s > _RELEASE_S:
                followed.is_released = True
                self._sets.start(self._release, followed)

    def forget(self, members: Members, now: Members | None = None) -> None:
        """Have what is resident of *members* leave as all others do, but for those that are in *now*, too.

        Nobody else takes back what was expected of them.
        """

        async def forget(inodes: Sequence[int]) -> None:
            await self._release_each(inodes, lambda inode: now is None or now.place(inode) is None)

        self._sets.start(forget, members.inodes)

    async def _release(self, followed: Followed) -> None:
        await self._release_each(followed.samples.members.inodes, lambda _: followed.is_released)
        if not followed.is_released:
            return  # It is in use again.
        followed.is_looked_over, followed.evicted_bytes_seen = True, -1  # Its next epoch looks again.
        self._sets.wake()

    async def _release_each(self, inodes: Sequence[int], is_due: Callable[[int], bool]) -> None:
        for number, inode in enumerate(inodes):
            if number % _CHUNK == 0:
                await trio.lowlevel.checkpoint()
            node = self._index.node(inode) if is_due(inode) else None
            if node is not None and node.vid:
                self._residency.release(node.vid)

    def follow_order(self, followed: Followed) -> None:
        """Once something else is known of the order, tell what is resident when it will be used."""
        if followed.samples.epoch and self._keeping.has_news(followed.samples, followed.kept):
            self._sets.start(self._replan, followed)

    async def _replan(self, followed: Followed) -> None:
        await self._keeping.replan(followed.samples, followed.kept, lambda: not self._sets.is_broken)
        self._sets.wake()
