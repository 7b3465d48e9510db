"""Fetches ahead what an epoch is about to read: the coordinator of sample sets.

Every use of a file that reaches the mover comes here. `Recognition` finds sets, `SampleSet` says what an
epoch still needs, `Epochs` and `Keeping` tell the tiers what is to stay, `AheadFetches` fetches. Whatever
goes wrong in here costs speed and never a read.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import trio

from cache import traffic
from cache.epochs import Epochs
from cache.fetcher import Fetcher
from cache.followed import IDLE_S, Followed, FollowedSets
from cache.index import Index
from cache.keeping import Keeping, Kept
from cache.lake_io import LakeIO
from cache.model import Inode
from cache.policy.recognise import Use
from cache.policy.records import Access
from cache.policy.sets import ListingOrder, MakeUpcoming, Members, Pattern, SampleSet
from cache.prefetching import AheadFetches
from cache.recognising import Recognition
from cache.residency import Residency
from cache.survey import Survey

log = logging.getLogger(__name__)

_SAMPLE = 1000  # Members looked at for the cached shares that are shown, of all sets.


class SetReadAhead:
    """Tell it of uses with `used` and `used_all`; `run` fetches. For the mover's trio thread."""

    def __init__(
        self,
        nursery: trio.Nursery,
        lake: LakeIO,
        index: Index,
        residency: Residency,
        fetcher: Fetcher,
        survey: Survey,
        fetches_max: int,
        make_upcoming: MakeUpcoming = lambda members: ListingOrder(),
        clock: Callable[[], float] = time.time,
        prepare: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint,
    ) -> None:
        """*nursery*: for surveys and fetches. *clock*: that of the uses' times.

        *prepare*: is awaited before each call of *make_upcoming*, and begun at the first use of a file.
        """
        self._index = index
        self._residency = residency
        self._fetcher = fetcher
        self._clock = clock
        self._sets = sets = FollowedSets(nursery)
        self._keeping = Keeping(index, residency)
        self._epochs = Epochs(sets, index, residency, self._keeping)
        self._fetches = AheadFetches(
            nursery,
            sets,
            lake,
            index,
            residency,
            fetcher,
            self._keeping,
            self._epochs,
            fetches_max,
            clock,
        )
        self._recognition = Recognition(
            sets, index, survey, make_upcoming, prepare, clock, self._found, self._grown
        )

    async def run(self) -> None:
        """Fetch what epochs need, for ever."""
        await self._fetches.run()

    # Uses

    def used(self, inode: Inode, now_s: float, access: Access | None = None) -> None:
        """Note that somebody reads the file. Raises nothing.

        *access*: how a large one is read, as far as its reads are seen; all but RANDOM is a pass.
        """
        if self._sets.is_broken:
            return
        with self._sets.guard():
            followed = self._sets.find(inode)
            if followed is None:
                self._recognition.used(inode, now_s, access)
            elif self._used_of(followed, _places(followed, [inode]), [now_s]) and access is not None:
                self._note_access(followed, inode, now_s, access)

    def used_all(self, inodes: Sequence[int], at_s: Sequence[float]) -> None:
        """Note uses of files at these times, in this order, as `used` does. Raises nothing.

        What each costs is what of it can't be done for all uses of a set at once: the message of a worker
        tells of a hundred or more.
        """
        if self._sets.is_broken:
            return
        with self._sets.guard():
            start = 0
            while start < len(inodes):
                followed = self._sets.find(inodes[start])
                if followed is None:
                    self._recognition.used(Inode(inodes[start]), at_s[start], None)
                    start += 1
                    continue
                places = _places(followed, inodes[start:])
                self._used_of(followed, places, at_s[start : start + len(places)])
                start += len(places)

    def _used_of(self, followed: Followed, places: Sequence[int], at_s: Sequence[float]) -> bool:
        """Note uses of members of one set; return whether any was one of the running epoch."""
        samples, on_time = followed.samples, list[int]()
        while places:
            noted = samples.used_all(places, at_s)
            if noted.has_begun:
                self._epoch_began(followed)
                followed.uses += 1  # The one that showed it.
            else:
                followed.uses += noted.uses - len(noted.late)
            for place in noted.late:
                self._used_late(samples, place)
            late = set(noted.late)
            on_time += [place for place in places[: noted.uses] if place not in late]
            places, at_s = places[noted.uses :], at_s[noted.uses :]
        if on_time:
            followed.is_released = followed.waits_for_use = False
            self._keeping.used(samples, followed.kept, on_time)
            self._epochs.follow_order(followed)
            self._sets.wake()
        return bool(on_time)

    def _used_late(self, samples: SampleSet, place: int) -> None:
        """A use of the last epoch was told now: the tiers take the member for used in this one."""
        vid = self._keeping.resident(samples.members.inodes[place])
        if vid is not None and not samples.is_used(place):
            self._keeping.expect(samples, place, vid)

    def announced(self, directory: Inode) -> None:
        """Somebody told in which order the files below *directory* are about to be read. Raises nothing.

        So what comes first is fetched before the first use: later, the readers would wait for it.
        """
        if not self._sets.is_broken:
            self._recognition.announced(directory)

    def orders_changed(self) -> None:
        """Something else is known of the order of a set."""
        self._sets.wake()

    def waited(self, inode: Inode, seconds: float) -> None:
        """Note for how long a reader of the file waited for its bytes."""
        for followed in self._sets:
            if followed.samples.members.place(inode) is not None:
                followed.misses += 1
                followed.waited_s += seconds
                return

    # Large files, in readers' hands

    def seen(self, inode: Inode, vid: bytes, now_s: float, *, end: bool) -> None:
        """Something of a large file was read. *end*: its last bytes."""
        if end:
            self._recognition.ended(inode)
        for followed in self._sets:
            if not end:
                followed.hands.seen(vid, now_s)
            elif followed.hands.ended(vid):
                self._residency.let_go(vid)
                followed.samples.in_hands = len(followed.hands)
                self._sets.wake()

    def _note_access(self, followed: Followed, inode: Inode, now_s: float, access: Access) -> None:
        if access is Access.RANDOM:
            followed.samples.records_used += 1
        else:
            self._take_in_hands(followed, inode, now_s)

    def _take_in_hands(self, followed: Followed, inode: Inode, now_s: float) -> None:
        """A reader goes through a large member: what of it is there stays until the reader ends."""
        node = self._index.node(inode)
        if node is None or not node.vid:
            return
        self._residency.hold(node.vid)
        for vid in followed.hands.take(node.vid, now_s):
            self._residency.let_go(vid)
        followed.samples.in_hands = len(followed.hands)

    # Sets and their epochs

    def _found(self, followed: Followed, uses: Sequence[tuple[Use, Access | None]]) -> None:
        """Follow a set from now on; *uses* have shown it."""
        samples = followed.samples
        for use, access in uses:
            samples.used_all(_places(followed, [use.inode]), [use.at_s])
            if access is not None:
                self._note_access(followed, Inode(use.inode), use.at_s, access)
        for left in self._sets.add(followed):
            self._epochs.forget(left.samples.members)
        log.info(
            "%s: a sample set of %d files, its epochs are read ahead",
            self._path(followed),
            len(samples.members),
        )
        if samples.epoch:
            self._epoch_began(followed)

    def _grown(self, followed: Followed, samples: SampleSet) -> None:
        self._epochs.forget(followed.samples.members, samples.members)  # What was replaced in the lake, say.
        followed.kept = Kept()  # Of the old places.
        followed.samples = samples
        self._epochs.look_over(followed)

    def _epoch_began(self, followed: Followed) -> None:
        self._fetches.forget_folders()
        self._epochs.began(followed)

    def _path(self, followed: Followed) -> str:
        return os.fsdecode(self._index.path_of(followed.samples.root)) or "."

    # What is shown

    def status(self) -> list[dict[str, Any]]:
        """Return what `sluice status --json` shows under `sets`, the one used last first."""
        shown = [followed for followed in self._sets if followed.samples.epoch]
        return [self._status_of(followed) for followed in shown if self._index.node(followed.samples.root)]

    def _status_of(self, followed: Followed) -> dict[str, Any]:
        samples, account = followed.samples, followed.account
        return {
            "path": self._path(followed),
            "files": len(samples.members),
            "large": samples.large,
            "bytes": samples.members.total_bytes,
            "epoch": samples.epoch,
            "used_share": round(samples.used_count / len(samples.members), 4),
            "cached_share": round(self._cached_share(samples.members), 4),
            "pattern": samples.pattern.value,
            "order": samples.upcoming.name,
            "read_ahead": self._state(followed),
            "fetched_ahead_bytes": account.fetched_bytes,
            "used_ahead_bytes": account.used_bytes,
            "wasted_bytes": account.wasted_bytes,
            "uses": followed.uses,
            "hit_rate": round(max(0.0, 1 - followed.misses / followed.uses), 4) if followed.uses else None,
            "waited_s": round(followed.waited_s, 3),
            **(traffic.of_set(self._fetcher, self._index, samples.members.inodes) if samples.large else {}),
            "idle_s": round(max(0.0, self._clock() - samples.last_used_s), 1),
        }

    def _state(self, followed: Followed) -> str:
        samples = followed.samples
        if self._sets.is_broken:
            return "off after a fault, see the log"
        if followed.account.is_wasteful:
            return "stopped: too much was evicted before it was used"
        if samples.pattern is Pattern.REUSED:
            return "off: a few files are read again and again"
        if samples.pattern is Pattern.RECORDS:
            return "off: records are read at random"
        if followed.is_looking:
            return "looking what is cached"
        if samples.is_all_fetched:
            return "done"
        if self._clock() - samples.last_used_s > IDLE_S:
            return "paused: not in use"
        if followed.has_no_room:
            return "waiting for room"
        return "fetching"

    def _cached_share(self, members: Members) -> float:
        """Return the share of the members that are cached whole; of many, by a sample."""
        sample = members.inodes[:: max(1, len(members) * len(self._sets) // _SAMPLE)]
        return sum(self._keeping.resident(inode) is not None for inode in sample) / len(sample)


def _places(followed: Followed, inodes: Sequence[int]) -> list[int]:
    return followed.samples.members.places(inodes)
