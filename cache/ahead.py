"""Fetches ahead what an epoch is about to read: the coordinator of sample sets.

Every use of a file that reaches the mover comes here. `Recogniser` proposes sets, `SampleSet` says
what an epoch still needs, `Parallelism` how many fetches to have under way, `Residency` what there is
room for. Whatever goes wrong in here costs speed and never a read.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import trio

from cache import traffic
from cache.errors import CacheFull, LakeUnavailable, SluiceError
from cache.fetcher import Fetcher, Started
from cache.index import Index
from cache.keeping import Keeping, Kept
from cache.lake_io import LakeIO
from cache.model import SMALL_OBJECT_BYTES_MAX, Inode, ObjectVersion
from cache.policy.due import Next
from cache.policy.hands import Hands
from cache.policy.ledger import Account
from cache.policy.parallel import Parallelism
from cache.policy.recognise import Candidate, Directory, Recogniser
from cache.policy.records import Access
from cache.policy.sets import AHEAD, ListingOrder, MakeUpcoming, Members, Pattern, SampleSet
from cache.records import Node
from cache.residency import Residency
from cache.survey import Survey

log = logging.getLogger(__name__)

_SETS_MAX = 64
_FILES_MAX = 16_000_000  # Of all sets, at some 20 bytes each.
_MEMBERS_MIN = 32  # Fewer are read before reading ahead could begin;
_LARGE_MEMBERS_MIN = 3  # of large ones, what follows the first two can be fetched.
_DIRECTORIES_MAX = 20_000  # Kept in memory, to know a file's set without asking the index.
_IDLE_S = 120.0  # Nothing is fetched for a set that nobody has used for so long,
_RELEASE_S = 300.0  # and what it still needed is given up where another one needs room.
_STRANGE_ACCESSES_MAX = 1024
_STRANGERS_MAX = 8  # Used files that are no members, before a set is surveyed again,
_SURVEY_EVERY_S = 10.0  # but no more often than this.
_TOLD_LATE_S = 0.25  # A hit is told of so late (see Filesystem), and read-ahead learns of it then.
_QUEUED_SHARE = 8  # For so many fetches at the lake, one waits for a thread.
_LEAD_WEIGHT = 0.125  # Of each fetch, in what is known of how long they take.
_CHUNK = 200  # Members looked at in one go: about two milliseconds.
_SAMPLE = 1000  # Members looked at for the cached shares that are shown, of all sets.


Done = Callable[[SluiceError | None], None]


@dataclass(eq=False)
class Followed:
    """A set and what the coordinator knows of it."""

    samples: SampleSet
    account: Account = field(default_factory=Account)
    evicted_bytes_seen: int = -1  # Of all tiers, when the epoch began; then the status bytes were right.
    is_looked_over: bool = False  # What is resident of it has been found and is expected.
    is_looking: bool = False
    is_surveying: bool = False
    is_released: bool = False
    surveyed_at_s: float = 0.0
    has_no_room: bool = False
    waits_for_use: bool = False  # A fetch failed: none is tried before somebody reads of the set again.
    kept: Kept = field(default_factory=Kept)
    hands: Hands = field(default_factory=Hands)  # Large members.
    large_under_way: int = 0
    # Of this epoch: uses that were seen, how many of them waited for bytes, and how long in all.
    uses: int = 0
    misses: int = 0
    waited_s: float = 0.0

    def epoch_began(self) -> None:
        self.uses, self.misses, self.waited_s = 0, 0, 0.0


class SetReadAhead:
    """Tell it of uses with `used`; `run` fetches. For the mover's trio thread."""

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
        self._nursery = nursery
        self._lake = lake
        self._index = index
        self._residency = residency
        self._fetcher = fetcher
        self._survey = survey
        self._keeping = Keeping(index, residency)
        self._make_upcoming = make_upcoming
        self._clock = clock
        self._prepare = prepare
        self._is_prepared = False  # Or on the way.
        self._recogniser = Recogniser()
        self._large_recogniser = Recogniser(large=True)
        self._parallelism = Parallelism(fetches_max)
        self._sets: list[Followed] = []  # The one used last comes first.
        self._directories: dict[int, Directory] = {}
        self._folders: dict[int, str] = {}  # Directory -> its path with a slash; new in each epoch.
        self._access: OrderedDict[Inode, Access] = OrderedDict()  # Of large files that belong to no set yet.
        self._surveying: set[Candidate] = set()
        self._under_way = 0
        self._fetch_s = 0.0  # How long fetches take, on average.
        self._retries_seen = lake.retries
        self._wake = trio.Event()
        self._is_broken = False

    # Uses

    def used(self, inode: Inode, now_s: float, access: Access | None = None) -> None:
        """Note that somebody reads the file. Raises nothing.

        *access*: how a large one is read, as far as its reads are seen; all but RANDOM is a pass.
        """
        if self._is_broken:
            return
        try:
            self._used(inode, now_s, access)
        except Exception:
            log.exception("sample sets are no longer watched, nothing is read ahead of epochs")
            self._is_broken = True

    def announced(self, directory: Inode) -> None:
        """Somebody told in which order the files below *directory* are about to be read. Raises nothing.

        So what comes first is fetched before the first use: later, the readers would wait for it.
        """
        candidate = Candidate(directory, deep=True, large=False)
        if not self._is_broken and candidate not in self._surveying:
            self._surveying.add(candidate)
            self._nursery.start_soon(self._guarded, self._follow_announced, candidate)

    def orders_changed(self) -> None:
        """Something else is known of the order of a set."""
        self._wake.set()

    def waited(self, inode: Inode, seconds: float) -> None:
        """Note for how long a reader of the file waited for its bytes."""
        for followed in self._sets:
            if followed.samples.members.place(inode) is not None:
                followed.misses += 1
                followed.waited_s += seconds
                return

    def seen(self, inode: Inode, vid: bytes, now_s: float, *, end: bool) -> None:
        """Something of a large file was read. *end*: its last bytes."""
        if end and self._access.get(inode) is not Access.RANDOM:
            self._access.pop(inode, None)  # Once it is a member of a set, it is in nobody's hands any more.
        for followed in self._sets:
            if not end:
                followed.hands.seen(vid, now_s)
            elif followed.hands.ended(vid):
                self._residency.let_go(vid)
                followed.samples.in_hands = len(followed.hands)
                self._wake.set()

    def _note_access(self, followed: Followed, inode: Inode, now_s: float, access: Access | None) -> None:
        if access is Access.RANDOM:
            followed.samples.records_used += 1
        elif access is not None:
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

    def _used(self, inode: Inode, now_s: float, access: Access | None) -> None:
        for number, followed in enumerate(self._sets):
            place = followed.samples.members.place(inode)
            if place is not None:
                if number:
                    self._sets.insert(0, self._sets.pop(number))
                if followed.samples.is_late(now_s):
                    return self._used_late(followed, inode, place)
                if followed.samples.used(place, now_s):
                    followed.epoch_began()
                    self._epoch_began(followed)
                followed.uses += 1
                self._note_access(followed, inode, now_s, access)
                followed.is_released = followed.waits_for_use = False
                self._keeping.used(followed.samples, followed.kept, place)
                self._follow_order(followed)
                self._wake.set()
                return
        if access is not None:
            self._access[inode] = access
            if len(self._access) > _STRANGE_ACCESSES_MAX:
                self._access.popitem(last=False)
        self._used_stranger(inode, now_s)

    def _used_late(self, followed: Followed, inode: Inode, place: int) -> None:
        """A use of the last epoch was told now: the tiers take the member for used in this one."""
        vid = self._keeping.resident(inode)
        if vid is not None and not followed.samples.is_used(place):
            self._keeping.expect(followed.samples, place, vid)

    def _used_stranger(self, inode: Inode, now_s: float) -> None:
        node = self._index.node(inode)
        if node is None or not node.vid or not node.size_bytes:
            return
        if not self._is_prepared:
            self._is_prepared = True
            self._nursery.start_soon(self._guarded, lambda _: self._prepare(), None)
        directory, large = self._directory(node.parent), node.size_bytes > SMALL_OBJECT_BYTES_MAX
        grown = self._set_at(directory, large)
        if grown is not None:
            self._note_growth(grown, now_s)
            return
        candidate = self._recogniser_of(large).used(inode, directory, now_s)
        if candidate is not None and candidate not in self._surveying:
            self._surveying.add(candidate)
            self._nursery.start_soon(self._guarded, self._follow, candidate)

    def _recogniser_of(self, large: bool) -> Recogniser:
        return self._large_recogniser if large else self._recogniser

    def _directory(self, inode: int) -> Directory:
        known = self._directories.get(inode)
        if known is None:
            if len(self._directories) >= _DIRECTORIES_MAX:
                self._directories.clear()
            node, state = self._index.node(inode), self._index.directory(inode)
            is_root = node is None or node.parent == inode
            parent = None if node is None or is_root else self._directory(node.parent)
            known = Directory(inode, state.entries if state is not None else 0, parent)
            if state is not None:  # Else it is being listed for the first time.
                self._directories[inode] = known
        return known

    def _set_at(self, directory: Directory, large: bool) -> Followed | None:
        """Return the set that a file in *directory* belongs to."""
        roots = {
            followed.samples.root: followed for followed in self._sets if followed.samples.large == large
        }
        for above in directory.chain():
            followed = roots.get(above.inode)
            if followed is not None and (followed.samples.deep or above is directory):
                return followed
        return None

    def _note_growth(self, followed: Followed, now_s: float) -> None:
        followed.samples.strangers += 1
        is_due = now_s - followed.surveyed_at_s >= _SURVEY_EVERY_S
        if followed.samples.strangers >= _STRANGERS_MAX and is_due and not followed.is_surveying:
            followed.is_surveying = True
            self._nursery.start_soon(self._guarded, self._follow_growth, followed)

    # Sets

    async def _guarded(self, task: Callable[[Any], Any], argument: Any) -> None:
        """Run a task; a fault of ours ends the read-ahead, not the mover."""
        try:
            await task(argument)
        except SluiceError as error:
            log.warning("read-ahead of a sample set: %s", error)
        except Exception:
            log.exception("sample sets are no longer watched, nothing is read ahead of epochs")
            self._is_broken = True

    async def _follow(self, candidate: Candidate) -> None:
        """Look what is below the candidate, and follow it as a set if it is one."""
        try:
            members = await self._survey.members(candidate)
            await self._prepare()
        except SluiceError:
            members = None  # The lake is away: it is proposed again later.
        finally:
            self._surveying.discard(candidate)
        recogniser = self._recogniser_of(candidate.large)
        if members is None or len(members) < (_LARGE_MEMBERS_MIN if candidate.large else _MEMBERS_MIN):
            recogniser.refuse(candidate, self._clock())
            return
        upcoming, deep, large = self._make_upcoming(members), candidate.deep, candidate.large
        samples = SampleSet(candidate.root, members, upcoming, deep=deep, large=large)
        followed = Followed(samples, surveyed_at_s=self._clock())
        for use in recogniser.claim(candidate):
            place = members.place(use.inode)
            if place is not None:
                samples.used(place, use.at_s)
                inode = Inode(use.inode)
                self._note_access(followed, inode, use.at_s, self._access.pop(inode, None))
        self._add(followed)
        if samples.epoch:
            self._epoch_began(followed)

    async def _follow_announced(self, candidate: Candidate) -> None:
        try:
            members = await self._survey.members(candidate)
            await self._prepare()
        finally:
            self._surveying.discard(candidate)
        if members is None or len(members) < _MEMBERS_MIN or self._is_followed(members):
            return
        samples = SampleSet(candidate.root, members, self._make_upcoming(members), deep=True)
        samples.announce(self._clock())
        followed = Followed(samples, surveyed_at_s=self._clock())
        self._add(followed)
        self._epoch_began(followed)

    def _is_followed(self, members: Members) -> bool:
        """Return whether some of *members* belong to a set already."""
        some = (members.inodes[0], members.inodes[-1])
        return any(other.samples.members.place(inode) is not None for other in self._sets for inode in some)

    def _add(self, followed: Followed) -> None:
        self._sets.insert(0, followed)
        while len(self._sets) > 1 and (
            len(self._sets) > _SETS_MAX
            or sum(len(other.samples.members) for other in self._sets) > _FILES_MAX
        ):
            self._sets.pop()
        log.info(
            "%s: a sample set of %d files, its epochs are read ahead",
            self._path(followed),
            len(followed.samples.members),
        )

    async def _follow_growth(self, followed: Followed) -> None:
        old = followed.samples
        try:
            members = await self._survey.members(Candidate(old.root, old.deep, old.large))
        finally:
            followed.is_surveying = False
            followed.surveyed_at_s = self._clock()
            old.strangers = 0
        if members is not None and members.inodes != old.members.inodes:
            followed.kept = Kept()  # Of the old places.
            followed.samples = old.succeeded_by(members, self._make_upcoming(members), old.last_used_s)
            self._start_looking_over(followed)

    def _path(self, followed: Followed) -> str:
        return os.fsdecode(self._index.path_of(followed.samples.root)) or "."

    # Epochs

    def _epoch_began(self, followed: Followed) -> None:
        """Have what is resident of the set found anew, unless nothing has left the tiers since."""
        evicted_bytes = self._residency.evicted_bytes
        if followed.samples.epoch > 1 and followed.is_looked_over:
            if evicted_bytes == followed.evicted_bytes_seen:
                return
            followed.samples.look_again()
        followed.evicted_bytes_seen = evicted_bytes
        self._folders.clear()
        self._start_looking_over(followed)

    def _start_looking_over(self, followed: Followed) -> None:
        followed.is_looked_over = False
        if not followed.is_looking:
            followed.is_looking = True
            self._nursery.start_soon(self._guarded, self._look_over, followed)

    async def _look_over(self, followed: Followed) -> None:
        """Find what is resident of the set, and have it kept until the epoch has used it."""
        try:
            while not followed.is_looked_over:
                followed.is_looked_over = True  # Unless it is asked for again meanwhile.
                await self._look_once(followed)
        finally:
            followed.is_looking = False
            self._wake.set()

    async def _look_once(self, followed: Followed) -> None:
        samples = followed.samples
        for place, inode in enumerate(samples.members.inodes):
            if place % _CHUNK == 0:
                await trio.lowlevel.checkpoint()
                if not followed.is_looked_over or self._is_broken:
                    return
            if samples.is_used(place):
                continue
            vid = self._keeping.resident(inode)
            if vid is not None:
                samples.found_resident(place)
                self._keeping.expect(samples, place, vid)

    async def _release(self, followed: Followed) -> None:
        """Give up what an idle set still needed: another one wants the room."""
        for number, inode in enumerate(followed.samples.members.inodes):
            if number % _CHUNK == 0:
                await trio.lowlevel.checkpoint()
                if not followed.is_released:
                    return  # It is in use again.
            node = self._index.node(inode)
            if node is not None and node.vid:
                self._residency.release(node.vid)
        followed.is_looked_over, followed.evicted_bytes_seen = True, -1  # Its next epoch looks again.
        self._wake.set()

    def _follow_order(self, followed: Followed) -> None:
        """Once something else is known of the order, tell what is resident when it will be used."""
        if followed.samples.epoch and self._keeping.has_news(followed.samples, followed.kept):
            self._nursery.start_soon(self._guarded, self._replan, followed)

    async def _replan(self, followed: Followed) -> None:
        await self._keeping.replan(followed.samples, followed.kept, lambda: not self._is_broken)
        self._wake.set()

    # Fetching

    async def run(self) -> None:
        """Fetch what epochs need, for ever."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            await self._guarded(self._fill_up, None)
            if self._is_broken:
                return

    async def _fill_up(self, _: None) -> None:
        """Start as many fetches as may be under way."""
        looked = 0
        self._note_retries()
        while self._under_way < self._limit:
            chosen = self._take()
            if chosen is None:
                self._parallelism.idle()
                return
            looked += 1
            if looked % _CHUNK == 0:
                await trio.lowlevel.checkpoint()
            self._start(*chosen)

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

    def _take(self) -> tuple[Followed, int] | None:
        now_s = self._clock()
        for followed in self._sets:
            if not self._may_fetch(followed, now_s):
                continue
            place = followed.samples.take()
            if place is not None:
                return followed, place
        return None

    def _may_fetch(self, followed: Followed, now_s: float) -> bool:
        is_known = followed.samples.upcoming.is_known
        if (not followed.is_looked_over or followed.is_looking) and not is_known:
            return False  # With the order known, few are fetched at a time, and these looked at.
        if followed.waits_for_use or followed.account.is_wasteful:
            return False
        if followed.large_under_way:
            return False  # One large member at a time: it takes several requests at once itself.
        if not self._keeping.may_go_further(followed.samples):
            return False
        if now_s - followed.samples.last_used_s > _IDLE_S:
            return False
        if is_known:  # What there is room for depends on when it is due.
            return True
        followed.has_no_room = not self._residency.may_read_ahead(followed.samples.members.mean_bytes)
        if followed.has_no_room:
            self._release_idle(now_s)
        return not followed.has_no_room

    def _release_idle(self, now_s: float) -> None:
        for followed in self._sets:
            if not followed.is_released and now_s - followed.samples.last_used_s > _RELEASE_S:
                followed.is_released = True
                self._nursery.start_soon(self._guarded, self._release, followed)

    def _start(self, followed: Followed, place: int) -> None:
        """Start the fetch of a member. Few look-ups: each waits for the lake threads to let go of the GIL."""
        samples, inode = followed.samples, followed.samples.members.inodes[place]
        node = self._index.node(inode)
        if node is None or not node.vid or node.staged:
            return samples.need_not(place)
        next = Next(samples.upcoming.due(place))
        if not self._residency.may_read_ahead(node.size_bytes, next.due):
            samples.put_back(place)
            followed.has_no_room = followed.waits_for_use = True
            self._release_idle(self._clock())
            return
        followed.has_no_room = False
        version = ObjectVersion(self._key_of(node), node.etag, node.size_bytes, node.vid)
        done = partial(self._fetched, followed, samples, place, version, trio.current_time())
        started = self._fetcher.fetch_ahead_nowait(version, next, done)
        if started is Started.RESIDENT:
            return samples.need_not(place)
        self._under_way += 1
        followed.large_under_way += samples.large
        self._residency.ledger.fetched(version.id, version.size_bytes, followed.account)
        if started is Started.MUST_WAIT:
            self._nursery.start_soon(self._fetch, version, next, done)

    def _key_of(self, node: Node) -> str:
        """Return the file's key. That of its directory may be old: then the lake has no such object."""
        if node.origin:
            return os.fsdecode(node.origin)
        folder = self._folders.get(node.parent)
        if folder is None:
            if len(self._folders) >= _DIRECTORIES_MAX:
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
        self._wake.set()
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
        if self._is_broken:
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
        if self._clock() - samples.last_used_s > _IDLE_S:
            return "paused: not in use"
        if followed.has_no_room:
            return "waiting for room"
        return "fetching"

    def _cached_share(self, members: Members) -> float:
        """Return the share of the members that are cached whole; of many, by a sample."""
        sample = members.inodes[:: max(1, len(members) * len(self._sets) // _SAMPLE)]
        return sum(self._keeping.resident(inode) is not None for inode in sample) / len(sample)
