"""Keeps fetches of what epochs are about to read under way, as many as the lake rewards.

Which member is next each set says itself; here is decided which set may go on, and what follows a fetch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial

import trio

from cache.epochs import Epochs
from cache.errors import CacheFull, LakeUnavailable, SluiceError
from cache.fetcher import Fetcher, Started
from cache.followed import IDLE_S, Followed, FollowedSets
from cache.index import Index
from cache.keeping import Keeping
from cache.lake_io import LakeIO
from cache.model import ObjectVersion
from cache.policy.due import Next
from cache.policy.parallel import Parallelism
from cache.policy.sets import AHEAD, SampleSet
from cache.records import Node
from cache.residency import Residency

_TOLD_LATE_S = 0.25  # A hit is told of so late (see Filesystem), and read-ahead learns of it then.
_QUEUED_SHARE = 8  # For so many fetches at the lake, one waits for a thread.
_LEAD_WEIGHT = 0.125  # Of each fetch, in what is known of how long they take.
_CHUNK = 200  # Members looked at in one go: about two milliseconds.
_FOLDERS_MAX = 20_000

Done = Callable[[SluiceError | None], None]


class AheadFetches:
    """For the mover's trio thread. `run` fetches for all *sets*, which wake it."""

    def __init__(
        self,
        nursery: trio.Nursery,
        sets: FollowedSets,
        lake: LakeIO,
        index: Index,
        residency: Residency,
        fetcher: Fetcher,
        keeping: Keeping,
        epochs: Epochs,
        fetches_max: int,
        clock: Callable[[], float],
    ) -> None:
        """*nursery*: for fetches. *clock*: that of the uses' times."""
        self._nursery = nursery
        self._sets = sets
        self._lake = lake
        self._index = index
        self._residency = residency
        self._fetcher = fetcher
        self._keeping = keeping
        self._epochs = epochs
        self._clock = clock
        self._parallelism = Parallelism(fetches_max)
        self._folders: dict[int, str] = {}  # Directory -> its path with a slash; new in each epoch.
        self._under_way = 0
        self._fetch_s = 0.0  # How long fetches take, on average.
        self._retries_seen = lake.retries

    async def run(self) -> None:
        """Fetch what epochs need, until the sets are given up."""
        while not self._sets.is_broken:
            await self._sets.woken()
            await self._sets.guarded(self._fill_up, None)

    def forget_folders(self) -> None:
        """Look up directories' paths anew: they may have been renamed."""
        self._folders.clear()

    async def _fill_up(self, _: None) -> None:
        """Start as many fetches as may be under way."""
        self._note_retries()
        now_s = self._clock()
        for followed in list(self._sets):
            if self._under_way < self._limit and self._may_fetch(followed, now_s):
                await self._fill_up_for(followed)
        if self._under_way < self._limit:
            self._parallelism.idle()

    async def _fill_up_for(self, followed: Followed) -> None:
        """Start fetches for one set, until it needs none now."""
        looked = 0
        while self._under_way < self._limit and self._may_go_on(followed):
            place = followed.samples.take()
            if place is None or not self._start(followed, place):
                return
            looked += 1
            if looked % _CHUNK == 0:
                await trio.lowlevel.checkpoint()

    @property
    def _limit(self) -> int:
        """While the lake fails, one fetch tries whether it is back.

        A few more than are to be at the lake: results come in batches, and no thread is to wait for ours.
        """
        if self._lake.failing_since_s is not None:
            return 1
        return self._parallelism.limit + self._parallelism.limit // _QUEUED_SHARE

    def _note_retries(self) -> None:
        retries, self._retries_seen = self._retries_seen, self._lake.retries
        if retries != self._retries_seen:
            self._parallelism.slowed(trio.current_time())

    def _may_fetch(self, followed: Followed, now_s: float) -> bool:
        is_known = followed.samples.upcoming.is_known
        if (not followed.is_looked_over or followed.is_looking) and not is_known:
            return False  # With the order known, few are fetched at a time, and these looked at.
        if not self._may_go_on(followed):
            return False
        if now_s - followed.samples.last_used_s > IDLE_S:
            return False
        if is_known:  # What there is room for depends on when it is due.
            return True
        followed.has_no_room = not self._residency.may_read_ahead(followed.samples.members.mean_bytes)
        if followed.has_no_room:
            self._epochs.release_idle(now_s)
        return not followed.has_no_room

    def _may_go_on(self, followed: Followed) -> bool:
        """Return whether what was started last for a set does not speak against more."""
        if followed.waits_for_use or followed.account.is_wasteful:
            return False
        if followed.large_under_way:
            return False  # One large member at a time: it takes several requests at once itself.
        return self._keeping.may_go_further(followed.samples)

    def _start(self, followed: Followed, place: int) -> bool:
        """Start the fetch of a member that needs one; return False where there is no room for it.

        Few look-ups: each waits for the lake threads to let go of the GIL.
        """
        samples, inode = followed.samples, followed.samples.members.inodes[place]
        node = self._index.node(inode)
        if node is None or not node.vid or node.staged:
            samples.need_not(place)
            return True
        next = Next(samples.upcoming.due(place))
        version = ObjectVersion(self._key_of(node), node.etag, node.size_bytes, node.vid)
        done = partial(self._fetched, followed, samples, place, version, trio.current_time())
        started = self._fetcher.fetch_ahead_nowait(version, next, done)
        if started is Started.MUST_WAIT and not self._residency.may_read_ahead(node.size_bytes, next.due):
            self._put_back(followed, place)
            return False
        followed.has_no_room = False
        if started is Started.RESIDENT:
            samples.need_not(place)
            return True
        self._under_way += 1
        followed.large_under_way += samples.large
        self._residency.ledger.fetched(version.id, version.size_bytes, followed.account)
        if started is Started.MUST_WAIT:
            self._nursery.start_soon(self._fetch, version, next, done)
        return True

    def _put_back(self, followed: Followed, place: int) -> None:
        """There is no room for a member now: it is tried again after a use.

        Where not even one of the mean size has room, at anything that wakes us.
        """
        samples = followed.samples
        samples.put_back(place)
        followed.has_no_room = True
        is_odd = self._residency.may_read_ahead(samples.members.mean_bytes)
        followed.waits_for_use = is_odd or samples.upcoming.is_known
        self._epochs.release_idle(self._clock())

    def _key_of(self, node: Node) -> str:
        """Return the file's key. That of its directory may be old: then the lake has no such object."""
        if node.origin:
            return os.fsdecode(node.origin)
        folder = self._folders.get(node.parent)
        if folder is None:
            if len(self._folders) >= _FOLDERS_MAX:
                self._folders.clear()
            path = os.fsdecode(self._index.key_of(node.parent))
            folder = self._folders[node.parent] = f"{path}/" if path else ""
        return folder + os.fsdecode(node.name)

    async def _fetch(self, version: ObjectVersion, next: Next, done: Done) -> None:
        failure: SluiceError | None = SluiceError("the mover is stopping")
        try:
            await self._fetcher.fetch_ahead(version, next)
            failure = None
        except SluiceError as error:
            failure = error
        finally:
            done(failure)

    def _fetched(
        self,
        followed: Followed,
        samples: SampleSet,
        place: int,
        version: ObjectVersion,
        began_s: float,
        error: SluiceError | None,
    ) -> None:
        """A member is resident, or could not be fetched. The set may have grown into another one since."""
        now_s = trio.current_time()
        self._under_way -= 1
        followed.large_under_way -= samples.large
        self._sets.wake()
        if error is None and samples.large:
            return self._large_fetched(samples, place, version)
        if error is None:
            self._parallelism.landed(version.size_bytes, now_s)
            return self._note_lead(samples, now_s - began_s)
        self._residency.ledger.not_fetched(version.id)
        if isinstance(error, CacheFull | LakeUnavailable):
            samples.put_back(place)
            followed.waits_for_use = True
        else:
            samples.need_not(place)  # Who reads it gets the error, if it still holds then.

    def _large_fetched(self, samples: SampleSet, place: int, version: ObjectVersion) -> None:
        if samples.status[place] == AHEAD:  # Else a reader has come already.
            self._residency.expect(version.id, Next(samples.upcoming.due(place)))

    def _note_lead(self, samples: SampleSet, took_s: float) -> None:
        """Keep an average of how long before its use a member has to be asked for.

        Where all of the set may be cached, the sooner the better.
        """
        self._fetch_s += _LEAD_WEIGHT * (took_s - self._fetch_s) if self._fetch_s else took_s
        fits = self._keeping.fits(samples)
        samples.upcoming.lead_s = math.inf if fits else self._fetch_s + _TOLD_LATE_S
