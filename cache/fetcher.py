"""Brings object versions into the tiers: one flight for each block, however many wait for it."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import partial

import trio

from cache.errors import CacheError, CacheFull, SluiceError
from cache.index import Index
from cache.lake.base import Body
from cache.lake_io import LakeIO
from cache.model import (
    BLOCK_BYTES,
    FETCH_BLOCKS,
    GROUP_BLOCKS,
    SMALL_OBJECT_BYTES_MAX,
    GroupIndex,
    ObjectVersion,
    block_count,
    ceil_div,
    group_count,
)
from cache.policy.amplification import Amplification
from cache.policy.due import SOME_TIME, Next
from cache.policy.eviction import ItemId
from cache.policy.readahead import SequentialReadAhead
from cache.policy.records import Access, RecordReads, Want
from cache.quick import QuickFills
from cache.records import range_mask
from cache.residency import Residency

log = logging.getLogger(__name__)

FlightKey = tuple[bytes, GroupIndex]

_SPARE_FLIGHTS_MAX = 4  # Of at most 8 MiB each: on top of the read-ahead's, in the mover's memory.


@dataclass(frozen=True, slots=True)
class Wanted:
    """What `sluice warm` and `pin` fetch: it may push out what demand may. *tier*: "dram", "nvme" or ""."""

    tier: str = ""


class Started(Enum):
    """What `fetch_ahead_nowait` did."""

    UNDER_WAY = 1
    RESIDENT = 2  # Nothing: it is there.
    MUST_WAIT = 3  # Nothing: that is for `fetch_ahead`.


@dataclass(eq=False)
class Flight:
    """The one fetch of some blocks of a group. *error* is set before *landed*."""

    mask: int  # Of adjacent blocks.
    group: GroupIndex
    is_spare: bool = False  # No reader is near: it pushes out nothing that is needed.
    landed: trio.Event = field(default_factory=trio.Event)
    error: SluiceError | None = None
    wanted: Wanted | None = None  # Somebody asked for it to be here, and nobody waits.
    demanded: trio.Event = field(default_factory=trio.Event)  # A reader waits for it.
    next: Next = SOME_TIME  # Of what nobody asked for: when it will be used.
    failed: BaseException | None = None  # What its first attempt raised, if nobody has dealt with it yet.

    @property
    def blocks(self) -> range:
        start = self.group * GROUP_BLOCKS
        return range(start + (self.mask & -self.mask).bit_length() - 1, start + self.mask.bit_length())

    def brings(self, blocks: range) -> bool:
        """Return whether it brings any of *blocks*."""
        own = self.blocks
        return own.start < blocks.stop and blocks.start < own.stop


class Fetcher:
    """Starts flights in *nursery*, which must outlive every reader."""

    def __init__(
        self,
        nursery: trio.Nursery,
        lake: LakeIO,
        index: Index,
        residency: Residency,
        readahead: SequentialReadAhead | None,
        ahead_flights_max: int,
        quick: QuickFills | None = None,
    ) -> None:
        self._nursery = nursery
        self._lake = lake
        self._index = index
        self._residency = residency
        self._readahead = readahead
        self._quick = quick
        self._ahead_slots = trio.CapacityLimiter(ahead_flights_max)
        self._spare_slots = trio.CapacityLimiter(min(_SPARE_FLIGHTS_MAX, ahead_flights_max))
        self._records = RecordReads()
        self.amplification = Amplification()
        self._being_fetched: set[bytes] = set()  # Large versions: all that is missing of them.
        # Invariant: the masks of one key's flights are disjoint, and disjoint from what is present.
        self._flights: dict[FlightKey, list[Flight]] = {}

    async def fetch(self, version: ObjectVersion, offset: int, length: int) -> None:
        """Return when the bytes are resident. Raises LakeError, CacheFull and CacheError.

        A cancelled caller leaves the flights to the others.
        """
        if offset >= version.size_bytes:
            return
        if version.size_bytes <= SMALL_OBJECT_BYTES_MAX:
            await self._await_all(self._join(version, range(block_count(version.size_bytes)), demand=True))
            self._residency.touched(ItemId(version.id))  # It may have been on its way unasked.
            return
        want = self._note(version, offset, length)
        # The reader's own blocks first: joined to a flight of the read-ahead, they would wait for
        # its slot and for all of its group.
        flights = self._join(version, _blocks(want.demand), demand=True, is_exact=want.is_exact)
        if want.may_stream:
            self._read_on(version, offset, length, stalled=True)
        else:
            self._start_rest(version)
        asked = _blocks(range(offset, min(offset + length, version.size_bytes)))
        await self._await_all([flight for flight in flights if flight.brings(asked)])

    async def fetch_ahead(self, version: ObjectVersion, next: Next = SOME_TIME) -> None:
        """Make an object resident that nobody asked for yet. Raises as `fetch` does.

        *next*: when it will be used. The caller bounds how many are under way. Raises CacheFull where it
        would push out what a recognised epoch still needs, before that.
        """
        if version.size_bytes <= SMALL_OBJECT_BYTES_MAX:
            blocks = range(block_count(version.size_bytes))
            await self._await_all(self._join(version, blocks, demand=False, next=next))
            return
        under_way: deque[Flight] = deque()
        for group in range(group_count(version.size_bytes)):
            blocks = range(group * GROUP_BLOCKS, (group + 1) * GROUP_BLOCKS)
            blocks = range(blocks.start, min(blocks.stop, block_count(version.size_bytes)))
            under_way += self._join(version, blocks, demand=False, is_spare=True, next=next)
            while len(under_way) > _SPARE_FLIGHTS_MAX:
                await self._await_all([under_way.popleft()])
            await trio.lowlevel.checkpoint()
        await self._await_all(list(under_way))

    def fetch_ahead_nowait(
        self, version: ObjectVersion, next: Next, then: Callable[[SluiceError | None], None]
    ) -> Started:
        """Start what `fetch_ahead` does, as far as nothing has to be waited for.

        *then* is called later, if it says UNDER_WAY, with what `fetch_ahead` would raise, or None.
        """
        key, row = (bytes(version.id), GroupIndex(0)), self._index.version(version.id)
        if row is not None and row.whole:
            return Started.RESIDENT
        if self._quick is None or row is not None or version.size_bytes > SMALL_OBJECT_BYTES_MAX:
            return Started.MUST_WAIT
        if key in self._flights or self._lake.failing_since_s is not None:
            return Started.MUST_WAIT
        flight = Flight(range_mask(0, block_count(version.size_bytes) - 1), key[1], next=next)
        get = partial(self._lake.get, version, 0, version.size_bytes)
        if not self._quick.start(version, get, next, partial(self._quick_done, version, key, flight, then)):
            return Started.MUST_WAIT
        self._flights[key] = [flight]  # No await since the look: see _join.
        return Started.UNDER_WAY

    def _quick_done(
        self,
        version: ObjectVersion,
        key: FlightKey,
        flight: Flight,
        then: Callable[[SluiceError | None], None],
        error: BaseException | None,
    ) -> None:
        """Land the flight; after a failure, start it anew with retries and what else takes waiting."""
        if error is None:
            self._lake.note_success()
            self._end(key, flight)
            then(None)
            return
        flight.failed = error
        self._nursery.start_soon(self._fly_again, version, key, flight, then)

    async def _fly_again(
        self,
        version: ObjectVersion,
        key: FlightKey,
        flight: Flight,
        then: Callable[[SluiceError | None], None],
    ) -> None:
        try:
            await self._fly(version, key, flight)
        finally:
            then(flight.error)

    async def fetch_wanted(self, version: ObjectVersion, blocks: range, wanted: Wanted) -> None:
        """Make *blocks* resident, which somebody asked for and nobody waits for. Raises as `fetch` does.

        The caller bounds how many are under way.
        """
        await self._await_all(self._join(version, blocks, demand=False, wanted=wanted))

    def read_seen(self, version: ObjectVersion, offset: int, length: int) -> None:
        """Somebody read what is resident of a large object: tell the policies, start what they ask for."""
        want = self._note(version, offset, length)
        if want.may_stream:
            self._read_on(version, offset, length, stalled=False)

    def _note(self, version: ObjectVersion, offset: int, length: int) -> Want:
        self.amplification.read(version.id, length)
        directory = version.key.rpartition("/")[0]
        return self._records.read(version.id, offset, length, version.size_bytes, directory)

    def _read_on(self, version: ObjectVersion, offset: int, length: int, *, stalled: bool) -> None:
        """Fetch ahead what a sequential reader will come to."""
        if self._readahead is None:
            return
        ahead = self._readahead.read(
            version.id, offset, length, version.size_bytes, stalled=stalled, goes_on=True
        )
        if ahead is not None:
            self._join(version, _blocks(ahead), demand=False)

    def _start_rest(self, version: ObjectVersion) -> None:
        """Fetch all that is missing of a large object, if that is cheaper than what was paid so far."""
        vid = version.id
        if self._readahead is None or vid in self._being_fetched:
            return
        rest_bytes = version.size_bytes - self._residency.present_bytes(vid)
        if not self._records.is_whole_cheaper(vid, rest_bytes) or not self._residency.may_hold(version):
            return
        self._being_fetched.add(vid)
        self._nursery.start_soon(self._fetch_rest, version)

    async def _fetch_rest(self, version: ObjectVersion) -> None:
        try:
            await self.fetch_ahead(version)
        except SluiceError as error:  # Readers who need it are told when they ask for it.
            log.info("%s: is not fetched whole: %s", version.key, error)
            self._records.emptied(version.id)  # Not tried again before as much has been paid anew.
        finally:
            self._being_fetched.discard(version.id)

    async def read_through(self, version: ObjectVersion, offset: int, length: int) -> Body:
        """Return bytes that can't be cached, straight from the lake."""
        get = partial(self._lake.get, version, offset, length)
        return await self._lake.retrying("get", version.key, partial(self._lake.run, get))

    def access(self, vid: bytes) -> tuple[Access, int]:
        """Return how a large object is read, and the size of its records (0 where that is not known)."""
        return self._records.access(vid), self._records.record_bytes(vid)

    def take_use(self, vid: bytes) -> Access | None:
        """See `RecordReads`."""
        return self._records.take_use(vid)

    @property
    def flights_under_way(self) -> int:
        return sum(len(flights) for flights in self._flights.values())

    async def _await_all(self, flights: list[Flight]) -> None:
        for flight in flights:
            await flight.landed.wait()
            if flight.error is not None:
                raise flight.error

    def _join(
        self,
        version: ObjectVersion,
        blocks: range,
        *,
        demand: bool,
        is_exact: bool = False,
        is_spare: bool = False,
        wanted: Wanted | None = None,
        next: Next = SOME_TIME,
    ) -> list[Flight]:
        """Return the flights that bring the missing ones of *blocks*, starting those not under way.

        *is_exact*: no others; else those of a large object are widened to whole units.
        No await in here: two readers must not both start one.
        """
        if not blocks:
            return []
        vid, joined = version.id, []
        if version.size_bytes > SMALL_OBJECT_BYTES_MAX and not is_exact:
            blocks = _whole_units(blocks, block_count(version.size_bytes))
        groups = range(blocks.start // GROUP_BLOCKS, (blocks.stop - 1) // GROUP_BLOCKS + 1)
        row, rows = self._index.residence(vid, groups)
        if row is not None and row.whole:
            return []
        for number, group in zip(groups, rows, strict=True):
            start = number * GROUP_BLOCKS
            first, last = max(blocks.start - start, 0), min(blocks.stop - start, GROUP_BLOCKS) - 1
            missing = range_mask(first, last) & ~(group.present if group is not None else 0)
            key = (bytes(vid), GroupIndex(number))
            for flight in self._flights.get(key, []):
                if flight.mask & missing:
                    joined.append(flight)
                    if demand:
                        flight.demanded.set()
                    missing &= ~flight.mask
            while missing:
                run = _lowest_run(missing)
                missing &= ~run
                flight = Flight(run, key[1], is_spare, wanted=wanted, next=next)
                joined.append(self._start(version, key, flight, demand))
        return joined

    def _start(self, version: ObjectVersion, key: FlightKey, flight: Flight, demand: bool) -> Flight:
        if demand:
            flight.demanded.set()
        self._flights.setdefault(key, []).append(flight)
        self._nursery.start_soon(self._fly, version, key, flight)
        return flight

    async def _fly(self, version: ObjectVersion, key: FlightKey, flight: Flight) -> None:
        try:
            holds_slot = await self._get_slot(version, flight)
            try:
                await self._fill_as_demanded(version, flight)
            finally:
                if holds_slot:
                    self._slots(flight).release_on_behalf_of(flight)
        except SluiceError as error:
            flight.error = error
            if isinstance(error, CacheError) and not isinstance(error, CacheFull):
                log.warning("%s: can't be cached (%s), read from the lake", version.key, error)
        except Exception as error:  # A fault of ours fails this read, not every mount's mover.
            log.exception("%s: the fetch failed", version.key)
            flight.error = SluiceError(f"{type(error).__name__}: {error}")
        except BaseException:
            flight.error = SluiceError("the mover is stopping")
            raise
        finally:
            self._end(key, flight)

    def _end(self, key: FlightKey, flight: Flight) -> None:
        """No await in here: who comes now must see index and flights agree."""
        self._flights[key].remove(flight)
        if not self._flights[key]:
            del self._flights[key]
        flight.landed.set()

    async def _get_slot(self, version: ObjectVersion, flight: Flight) -> bool:
        """Wait for one of the read-ahead's slots, unless a reader wants the flight; return whether got.

        Small objects need none: see `fetch_ahead`.
        """
        if flight.demanded.is_set() or version.size_bytes <= SMALL_OBJECT_BYTES_MAX:
            return False
        slots = self._slots(flight)
        with contextlib.suppress(trio.WouldBlock):
            slots.acquire_on_behalf_of_nowait(flight)
            return True

        async def stop_waiting() -> None:
            await flight.demanded.wait()
            nursery.cancel_scope.cancel()

        got = False
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stop_waiting)
            await slots.acquire_on_behalf_of(flight)
            got = True
            nursery.cancel_scope.cancel()
        return got

    def _slots(self, flight: Flight) -> trio.CapacityLimiter:
        return self._spare_slots if flight.is_spare else self._ahead_slots

    async def _fill_as_demanded(self, version: ObjectVersion, flight: Flight) -> None:
        demand = flight.demanded.is_set()
        try:
            await self._fill(version, flight, demand=demand)
        except CacheFull:
            if demand or not flight.demanded.is_set():
                raise  # Else a reader has come to wait for it, and may push out more.
            await self._fill(version, flight, demand=True)

    async def _fill(self, version: ObjectVersion, flight: Flight, *, demand: bool) -> None:
        blocks = flight.blocks
        offset = blocks.start * BLOCK_BYTES
        length = min(blocks.stop * BLOCK_BYTES, version.size_bytes) - offset
        fill: Callable[[], Awaitable[None]]
        is_wanted = flight.wanted is not None
        wanted_tier = flight.wanted.tier if flight.wanted is not None else ""
        if version.size_bytes <= SMALL_OBJECT_BYTES_MAX:
            fill = partial(
                self._residency.fill_whole,
                version,
                partial(self._lake.get, version, offset, length),
                demand=demand,
                next=flight.next,
                wanted=is_wanted,
                wanted_tier=wanted_tier,
            )
        else:
            is_spare = flight.is_spare and not demand
            fill = partial(
                self._residency.fill_blocks,
                version,
                blocks,
                partial(self._lake.get_pieces, version, offset, length),
                demand=demand,
                is_spare=is_spare,
                due=flight.next.due,
                wanted_tier=wanted_tier,
            )
            self._records.fetched(version.id, length)
            self.amplification.fetched(version.id, length)

        async def attempt() -> None:
            if (failed := flight.failed) is not None:
                flight.failed = None
                raise failed
            await fill()

        await self._lake.retrying("get", version.key, attempt)


def _blocks(span: range) -> range:
    """Return the blocks that hold the bytes *span*."""
    return range(span.start // BLOCK_BYTES, ceil_div(span.stop, BLOCK_BYTES))


def _whole_units(blocks: range, count: int) -> range:
    """Return *blocks* of an object of *count* blocks, widened to whole fetch units."""
    return range(
        blocks.start // FETCH_BLOCKS * FETCH_BLOCKS,
        min(ceil_div(blocks.stop, FETCH_BLOCKS) * FETCH_BLOCKS, count),
    )


def _lowest_run(mask: int) -> int:
    """Return the lowest run of adjacent set bits of *mask*."""
    lowest = mask & -mask
    return mask & ~(mask + lowest)
