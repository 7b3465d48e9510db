"""Tells the tiers when the members of a sample set are used next, so that the right ones stay.

With an order known, what this epoch or the next one uses last leaves first. What a first scan has read
and left behind leaves before everything else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import trio

from cache.index import Index
from cache.policy.due import Next
from cache.policy.sets import Pattern, SampleSet
from cache.records import Node
from cache.residency import Residency

_BEHIND = 8  # Uses after which what was missing has landed, mostly: before, nothing could be told of it.
_CHUNK = 200  # Members looked at in one go: about two milliseconds.
_SCAN_SHARE = 16  # A scan is at most this part of the tiers ahead.
_FITS_SHARE = 2  # A set of at most this part of the tiers is kept as a whole.


@dataclass(slots=True)
class Kept:
    """What the tiers have been told of one set. *order_seen*: `Upcoming.changes` at that time."""

    behind: deque[int] = field(default_factory=deque)  # Places used a moment ago.
    order_seen: int = 0
    is_replanning: bool = False


class Keeping:
    """For the mover's trio thread. Changes nothing but ranks: whatever it tells, no read fails by it."""

    def __init__(self, index: Index, residency: Residency) -> None:
        self._index = index
        self._residency = residency

    def used(self, samples: SampleSet, kept: Kept, places: Sequence[int]) -> None:
        """Members were used: of those used a while ago, tell when next, or that it is not soon."""
        kept.behind.extend(places)
        count = len(kept.behind) - _BEHIND
        if count <= 0:
            return
        ripe = [kept.behind.popleft() for _ in range(count)]
        # A tree that is read in its order again and again is a training that does not shuffle.
        if samples.epoch == 1 and samples.pattern is Pattern.SCAN:
            for vid in filter(None, self._vids(samples, ripe)):
                self._residency.passed(vid)
        elif not self.fits(samples):
            dues = [(place, samples.upcoming.due_later(place)) for place in ripe]
            self._expect_later(samples, [(place, due) for place, due in dues if due is not None])

    def _vids(self, samples: SampleSet, places: Sequence[int]) -> list[bytes]:
        """Return the version ids of members, as far as they have any: b"" for the others."""
        nodes = self._index.nodes(samples.members.inodes[place] for place in places)
        return [node.vid if node is not None else b"" for node in nodes]

    def _expect_later(self, samples: SampleSet, dues: list[tuple[int, int]]) -> None:
        vids = self._vids(samples, [place for place, _ in dues])
        for vid, (_, due) in zip(vids, dues, strict=True):
            if vid:
                self._residency.expect(vid, Next(due, later=True))

    def may_go_further(self, samples: SampleSet) -> bool:
        """Return whether it is no scan that is too far ahead: what was fetched for it leaves late."""
        if samples.large or samples.pattern is not Pattern.SCAN or samples.epoch > 1:
            return True  # Of large members, `SampleSet` itself lets few be ahead.
        ahead_bytes = samples.unused_ahead * samples.members.mean_bytes
        return ahead_bytes * _SCAN_SHARE <= self._residency.size_bytes

    def fits(self, samples: SampleSet) -> bool:
        """Return whether all of the set may be cached: then nothing of it need be told apart."""
        return samples.members.total_bytes * _FITS_SHARE < self._residency.size_bytes

    def has_news(self, samples: SampleSet, kept: Kept) -> bool:
        """Return whether `replan` is to be called: the set's order was found, dropped, or led further."""
        if samples.upcoming.changes == kept.order_seen or kept.is_replanning:
            return False
        if self.fits(samples):
            kept.order_seen = samples.upcoming.changes
            return False
        kept.is_replanning = True
        return True

    async def replan(self, samples: SampleSet, kept: Kept, go_on: Callable[[], bool]) -> None:
        """Tell of all resident members when they are used next, as long as *go_on* says so."""
        try:
            kept.order_seen = samples.upcoming.changes
            for place, inode in enumerate(samples.members.inodes):
                if place % _CHUNK == 0:
                    await trio.lowlevel.checkpoint()
                    if not go_on():
                        return
                vid = self.resident(inode)
                if vid is not None:
                    self.expect(samples, place, vid)
        finally:
            kept.is_replanning = False

    def expect(self, samples: SampleSet, place: int, vid: bytes) -> None:
        """Have a resident member kept for its next use, as far as that is known."""
        upcoming, is_used = samples.upcoming, samples.is_used(place)
        due = None if is_used else upcoming.due(place)
        if due is not None or not (is_used or upcoming.is_known):
            self._residency.expect(vid, Next(due))
        elif (due := upcoming.due_later(place)) is not None:
            self._residency.expect(vid, Next(due, later=True))
        elif not is_used:
            self._residency.release(vid)  # The order leaves it out: others read it, or nobody.

    def resident(self, inode: int) -> bytes | None:
        """Return the version id of a file that is cached whole."""
        node = self._index.node(inode)
        return node.vid if node is not None and node.vid and self.is_cached(node) else None

    def is_cached(self, node: Node) -> bool:
        """Return whether nothing has to be fetched: it is cached whole, or no object of the lake (yet)."""
        if not node.vid or node.staged:
            return True
        row = self._index.version(node.vid)
        return row is not None and row.whole
