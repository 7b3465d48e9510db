"""Brings object versions into the tiers: one flight for each block, however many wait for it."""

from __future__ import annotations

import contextlib
import logging
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
)
from cache.policy.due import SOME_TIME, Next
from cache.policy.eviction import ItemId
from cache.policy.readahead import SequentialReadAhead
from cache.quick import QuickFills
from cache.records import range_mask
from cache.residency import Residency

log = logging.getLogger(__name__)

FlightKey = tuple[bytes, GroupIndex]


class Started(Enum):
    """What `fetch_ahead_nowait` did."""

    UNDER_WAY = 1
    RESIDENT = 2  # Nothing: it is there.
    MUST_WAIT = 3  # Nothing: that is for `fetch_ahead`.


@dataclass(eq=False)
class Flight:
    """The one fetch of some blocks of a group. *error* is set before *landed*."""

    mask: int
    landed: trio.Event = field(default_factory=trio.Event)
    error: SluiceError | None = None
    demanded: trio.Event = field(default_factory=trio.Event)  # A reader waits for it.
    next: Next = SOME_TIME  # Of a small object that nobody asked for: when it will be used.
    failed: BaseException | None = None  # What its first attempt raised, if nobody has dealt with it yet.


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
        wanted = range(offset // BLOCK_BYTES, ceil_div(offset + length, BLOCK_BYTES))
        # The reader's own blocks first: joined to a flight of the read-ahead, they would wait for
        # its slot and for all of its group.
        flights = self._join(version, wanted, demand=True)
        self.read_seen(version, offset, length, stalled=True)
        await self._await_all(flights)

    async def fetch_ahead(self, version: ObjectVersion, next: Next = SOME_TIME) -> None:
        """Make a small object resident that nobody asked for yet. Raises as `fetch` does.

        *next*: when it will be used. The caller bounds how many are under way. Raises CacheFull where it
        would push out what a recognised epoch still needs, before that.
        """
        assert version.size_bytes <= SMALL_OBJECT_BYTES_MAX, version
        blocks = range(block_count(version.size_bytes))
        await self._await_all(self._join(version, blocks, demand=False, next=next))

    def fetch_ahead_nowait(
        self, version: ObjectVersion, next: Next, then: Callable[[SluiceError | None], None]
    ) -> Started:
        """Start what `fetch_ahead` does, as far as nothing has to be waited for.

        *then* is called later, if it says UNDER_WAY, with what `fetch_ahead` would raise, or None.
        """
        vid, key = version.id, (bytes(version.id), GroupIndex(0))
        if self._quick is None or key in self._flights or self._lake.failing_since_s is not None:
            return Started.MUST_WAIT
        row = self._index.version(vid)
        if row is not None:
            return Started.RESIDENT if row.whole else Started.MUST_WAIT
        flight = Flight(range_mask(0, block_count(version.size_bytes) - 1), next=next)
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

    def read_seen(self, version: ObjectVersion, offset: int, length: int, *, stalled: bool) -> None:
        """Tell the read-ahead of a read, and start what it asks for."""
        if self._readahead is None:
            return
        ahead = self._readahead.read(version.id, offset, length, version.size_bytes, stalled=stalled)
        if ahead is not None:
            blocks = range(ahead.start // BLOCK_BYTES, ceil_div(ahead.stop, BLOCK_BYTES))
            self._join(version, blocks, demand=False)

    async def read_through(self, version: ObjectVersion, offset: int, length: int) -> Body:
        """Return bytes that can't be cached, straight from the lake."""
        get = partial(self._lake.get, version, offset, length)
        return await self._lake.retrying("get", version.key, partial(self._lake.run, get))

    @property
    def flights_under_way(self) -> int:
        return sum(len(flights) for flights in self._flights.values())

    async def _await_all(self, flights: list[Flight]) -> None:
        for flight in flights:
            await flight.landed.wait()
            if flight.error is not None:
                raise flight.error

    def _join(
        self, version: ObjectVersion, blocks: range, *, demand: bool, next: Next = SOME_TIME
    ) -> list[Flight]:
        """Return the flights that bring the missing ones of *blocks*, starting those not under way.

        No await in here: two readers must not both start one.
        """
        if not blocks:
            return []
        vid, joined = version.id, []
        if version.size_bytes > SMALL_OBJECT_BYTES_MAX:
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
                joined.append(self._start(version, key, Flight(run, next=next), demand))
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
                await self._fill_as_demanded(version, key[1], flight)
            finally:
                if holds_slot:
                    self._ahead_slots.release_on_behalf_of(flight)
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
        with contextlib.suppress(trio.WouldBlock):
            self._ahead_slots.acquire_on_behalf_of_nowait(flight)
            return True

        async def stop_waiting() -> None:
            await flight.demanded.wait()
            nursery.cancel_scope.cancel()

        got = False
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stop_waiting)
            await self._ahead_slots.acquire_on_behalf_of(flight)
            got = True
            nursery.cancel_scope.cancel()
        return got

    async def _fill_as_demanded(self, version: ObjectVersion, group: GroupIndex, flight: Flight) -> None:
        demand = flight.demanded.is_set()
        try:
            await self._fill(version, group, flight, demand=demand)
        except CacheFull:
            if demand or not flight.demanded.is_set():
                raise  # Else a reader has come to wait for it, and may push out more.
            await self._fill(version, group, flight, demand=True)

    async def _fill(self, version: ObjectVersion, group: GroupIndex, flight: Flight, *, demand: bool) -> None:
        mask = flight.mask
        first = (mask & -mask).bit_length() - 1 + group * GROUP_BLOCKS
        blocks = range(first, mask.bit_length() + group * GROUP_BLOCKS)
        offset = blocks.start * BLOCK_BYTES
        length = min(blocks.stop * BLOCK_BYTES, version.size_bytes) - offset
        get = partial(self._lake.get, version, offset, length)
        fill: Callable[[], Awaitable[None]]
        if version.size_bytes <= SMALL_OBJECT_BYTES_MAX:
            fill = partial(self._residency.fill_whole, version, get, demand=demand, next=flight.next)
        else:
            fill = partial(self._residency.fill_blocks, version, blocks, get, demand=demand)

        async def attempt() -> None:
            if (failed := flight.failed) is not None:
                flight.failed = None
                raise failed
            await fill()

        await self._lake.retrying("get", version.key, attempt)


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
