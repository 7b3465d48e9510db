"""A set's coming files: in the order that was told or found, and until then as somebody else says.

This is an `Upcoming` as the read-ahead of sample sets asks for it: it hears of every first use of a
member in an epoch and is asked which member to fetch next.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from cache.policy.order.finder import OPENS_MAX, Finder
from cache.policy.order.following import GRACE_TOLD, Following
from cache.policy.order.listings import Listing, listings, make_listing
from cache.policy.order.samplers import Places, distributed
from cache.policy.order.spec import Spec
from cache.policy.order.told import ToldSampler
from cache.policy.sets import AHEAD, OPEN

T = TypeVar("T")
# Does the work elsewhere, then calls the second with its result where it was called itself.
Search = Callable[[Callable[[], T], Callable[[T], None]], None]

GRACE_NEXT = 32  # Opens before an order that follows from the last epoch's is doubted.
# An order that nobody found in so many epochs comes from a seed that nobody knows: it is looked for in every
# second epoch, then every fourth, up to this, since each search is up to 0.2 s of a thread's work.
_FRUITLESS = 2
_LOOK_EVERY_MAX = 16
_BATCH = 64
# Files fetched and not used yet: what is read while one is fetched, and as much again, since
# neither is even; so many at least, and more where readers are far apart.
_AHEAD_MIN = 48
_AHEAD_TIMES = 2.0
_REFILL_SHARE = 8  # What comes next is looked up once so much of the window is free.


class Fallback(Protocol):
    """What is asked while no order is known."""

    def used(self, places: Sequence[int], now_s: float) -> None: ...

    def epoch_began(self, epoch: int) -> None: ...

    def next_place(self, status: bytearray, frontier: int | None) -> int | None: ...


@dataclass(eq=False, slots=True)
class Order:
    """An order that is believed: how far it is, what it is called, and what the next one follows from.

    *is_guess*: it is the likeliest of several, and no opens have confirmed it yet.
    """

    following: Following
    name: str
    spec: Spec | None = None
    listing: Listing | None = None
    told: ToldSampler | None = None
    is_guess: bool = False


class _Rate:
    """How many files a second are read, batches and pauses averaged out."""

    _BIN_S, _PAUSE_S, _SOON_S = 1.0, 4.0, 0.25

    def __init__(self) -> None:
        self._rate = 0.0
        self._began_s, self._uses = -1.0, 0

    def used(self, uses: int, now_s: float) -> None:
        if self._began_s < 0:  # What is told together has gathered for a moment.
            self._began_s = now_s - self._SOON_S * (uses > 1)
        self._uses += uses
        span_s = now_s - self._began_s
        if span_s < self._BIN_S:
            return
        if span_s < self._PAUSE_S:
            rate = self._uses / span_s
            self._rate = (self._rate + rate) / 2 if self._rate else rate
        self._began_s, self._uses = now_s, 0

    def per_s(self, now_s: float) -> float:
        """Return the rate; of the first second what is known of it."""
        return self._rate or self._uses / max(self._SOON_S, now_s - self._began_s)


class OrderedUpcoming:
    """For one set of *count* files, told by their place in listing order.

    *get_paths* returns their paths below the set's directory; it is called where *search* works.
    Invariants: at most one search is under way; its result counts for the epoch it began in only, unless
    the order was told. `_then` and `_told` are of the epoch after the one that `_order` is of. The count of
    uses that `due` goes by is the same for both, so what was due later is due once its epoch has begun.
    """

    def __init__(
        self,
        count: int,
        get_paths: Callable[[], Sequence[bytes]],
        search: Search[Order | None],
        fallback: Fallback,
    ) -> None:
        self._count = count
        self._get_paths = get_paths
        self._search = search
        self._fallback = fallback
        self.name = "unknown"  # As `sluice status` shows it.
        self.is_known = False
        self.changes = 0
        self.lead_s = 0.0
        self.is_needed = True
        self._order: Order | None = None
        self._then: Order | None = None  # The next epoch's, if it follows from this one's,
        self._told: Order | None = None  # or was told.
        self._rate = _Rate()
        self._now_s = 0.0  # When the last use was.
        self._opened = array("I")  # In this epoch: for an order that is known later.
        self._finder: Finder | None = Finder(count, get_paths)
        self._is_searching = False
        self._fruitless = 0  # Epochs on end of which all looks for the order were in vain.
        self._passes = 0
        self._next: deque[int] = deque()
        self._ahead: set[int] = set()
        self._is_exhausted = False  # Until the next use.

    def tell(self, make: Callable[[], Order | None], *, is_news: bool = True) -> None:
        """Believe what *make* returns (made elsewhere), rather than what is found.

        That is at once, or where it can't be the order of the epoch under way, from the next one on. Not
        *is_news*: it was told some time ago, and then it is no order at all.
        """

        def then(order: Order | None) -> None:
            self._is_searching = False
            if order is None:
                return
            if order.following.fits(self._opened):
                self._finder = None
                order.following.catch_up(self._opened)
                self._believe(order)
            elif is_news:
                self._told = order
                self.changes += 1

        self._is_searching = True
        self._search(make, then)

    def used(self, places: Sequence[int], now_s: float) -> None:
        """Members were used for the first time in this epoch, in this order."""
        self._fallback.used(places, now_s)
        self._ahead.difference_update(places)
        self._now_s = max(self._now_s, now_s)
        self._rate.used(len(places), self._now_s)
        self._is_exhausted = False
        self._opened.extend(places)
        if self._order is not None:
            self._follow(self._order, places)
        elif self._finder is not None and self.is_needed and not self._is_searching:
            self._find(self._finder)

    def _follow(self, order: Order, places: Sequence[int]) -> None:
        """Have opens judge the order that is believed."""
        for place in places:
            order.following.note_open(place)
            if not order.following.holds:
                return self._drop()
            if order.is_guess and order.following.is_confirmed:
                order.is_guess = False
                self._know(order)

    def epoch_began(self, epoch: int) -> None:
        """Another pass has begun. Its order is expected to follow from the last one's."""
        self._fallback.epoch_began(epoch)
        order, then = self._order, self._told or self._then
        self._told = None
        self._note_looks()
        self._believe(None)
        self._ahead.clear()
        self._passes += 1
        self._opened = array("I")
        expected = _successors(order)
        is_looked_for = bool(expected) or self._passes % self._look_every == 0
        self._finder = Finder(self._count, self._get_paths, expected) if is_looked_for else None
        self._is_searching = False
        if then is not None:
            if order is not None:
                then.following.take_over(order.following)
            self._believe(then)
        elif order is not None and expected:
            self._start(lambda: succeed(order, expected[0]))

    def _note_looks(self) -> None:
        """Count epochs whose order was looked for in vain, at the end of each."""
        if self._order is not None:
            self._fruitless = 0
        elif (
            self._finder is not None
            and self._finder.has_looked
            and len(self._opened) >= min(OPENS_MAX, self._count // 2)
        ):
            self._fruitless += 1

    @property
    def _look_every(self) -> int:
        """Return in every how many epochs the order is looked for."""
        return int(min(_LOOK_EVERY_MAX, 2 ** max(0, self._fruitless - _FRUITLESS + 1)))

    def next_place(self, status: bytearray, frontier: int | None) -> int | None:
        """Return the place to fetch next, of those whose *status* is 0; None: nothing now."""
        if self._order is None:
            return self._fallback.next_place(status, frontier)
        if not self._next and not self._is_exhausted and not self._has_all(status):
            self._refill(self._order.following, status)
        while self._next:
            place = self._next.popleft()
            if status[place] != AHEAD and self._order.following.due_at(place) is not None:
                self._ahead.add(place)
                return place
        return None

    def _has_all(self, status: bytearray) -> bool:
        """Return whether a set that fits is all there: to look at its order takes 20 ms for a million."""
        return math.isinf(self.lead_s) and status.find(OPEN) < 0

    def put_back(self, place: int) -> None:
        if place in self._ahead:
            self._ahead.discard(place)
            self._next.appendleft(place)

    def due(self, place: int) -> int | None:
        order = self._order
        return None if order is None or order.is_guess else self._use_of(order, place, self._passes)

    def due_later(self, place: int) -> int | None:
        then = self._told or self._then
        return None if then is None else self._use_of(then, place, self._passes + 1)

    def _use_of(self, order: Order, place: int, passes: int) -> int | None:
        position = order.following.due_at(place)
        return None if position is None else passes * self._count + position

    def _refill(self, following: Following, status: bytearray) -> None:
        window = self._window()
        ahead_max = window + following.spread
        if len(self._ahead) + window // _REFILL_SHARE >= ahead_max:
            self._ahead = following.still_due(self._ahead)
        room = min(_BATCH, ahead_max - len(self._ahead))
        if room >= min(_BATCH, window // _REFILL_SHARE):
            wanted = self._wanted(status)
            within = max(1, int(window / following.share_here()))
            self._next.extend(following.upcoming(room, wanted, within))
        self._is_exhausted = not self._next

    def _wanted(self, status: bytearray) -> NDArray[np.bool_]:
        """Return for each member whether it is to be fetched as soon as it is due.

        Of a set that does not fit, what was resident when the epoch began may have made room for what
        is due sooner. It is looked at once more when its turn comes.
        """
        states = np.frombuffer(status, np.uint8)
        wanted: NDArray[np.bool_] = states == OPEN
        if not math.isinf(self.lead_s):
            wanted = states != AHEAD
            wanted[list(self._ahead)] = False
        return wanted

    def _window(self) -> int:
        """Return how many files to have fetched before they are read: as few as the lake's latency allows."""
        per_s = self._rate.per_s(self._now_s)
        uses = _AHEAD_TIMES * per_s * self.lead_s if per_s else 0.0  # Before the first use: the least.
        return int(min(self._count, max(_AHEAD_MIN, uses)))

    def _find(self, finder: Finder) -> None:
        opened = self._opened[:OPENS_MAX].tolist()
        if not finder.wants_look(len(opened)):
            return

        def work() -> Order | None:
            found = finder.find(opened)
            if found is None:
                return None
            following = Following(found.files(), self._count, opened=opened, grace=0)
            return Order(following, str(found.spec), found.spec, found.listing)

        self._start(work)

    def _start(self, work: Callable[[], Order | None]) -> None:
        self._is_searching = True
        began_in = self._passes

        def then(order: Order | None) -> None:
            if began_in != self._passes:
                return
            self._is_searching = False
            if order is not None and self._order is None:  # Else it was told meanwhile.
                order.following.catch_up(self._opened)
                self._believe(order)

        self._search(work, then)

    def _look_further(self, order: Order) -> None:
        """Have the next epoch's order made, for what this one has used: some of it is needed soon again."""
        expected = _successors(order)
        if not expected:
            return

        def then(following: Order | None) -> None:
            if self._order is order:
                self._then = following
                self.changes += 1

        self._search(lambda: succeed(order, expected[0]), then)

    def _drop(self) -> None:
        """Believe the order no more. One that was found is not looked for again in this epoch."""
        spec = None if self._order is None else self._order.spec
        if self._finder is not None and not self._finder.expects(spec):
            self._finder = None
        self._believe(None)

    def _believe(self, order: Order | None) -> None:
        self._order, self._then = order, None
        self._know(order)
        self._next.clear()
        self._is_exhausted = False
        if order is not None:
            self._look_further(order)

    def _know(self, order: Order | None) -> None:
        """Say what is known by now. A guess says which file to fetch next, and not what may leave for it."""
        self.changes += 1
        self.is_known = order is not None and not order.is_guess
        self.name = order.name if order is not None and self.is_known else "unknown"


def _successors(order: Order | None) -> list[Spec]:
    """Return what the next epoch's order may be, likeliest first."""
    return order.spec.successors() if order is not None and order.spec is not None else []


def succeed(order: Order, spec: Spec) -> Order:
    """Return the order of the next epoch. Work: a few microseconds for each hundred files."""
    assert order.listing is not None
    files = order.listing.files[spec.order(len(order.listing))]
    if order.told is not None:
        files = _dealt(files, order.told)
    following = order.following.then(files, grace=GRACE_NEXT)
    is_guess = order.spec is None or len(order.spec.successors()) > 1
    return Order(following, str(spec), spec, order.listing, order.told, is_guess)


def order_of_places(places: Places, count: int, name: str = "told") -> Order:
    """Return the order of exactly these places of a set of *count*."""
    return Order(Following(places, count, grace=GRACE_TOLD), name)


def order_of_sampler(told: ToldSampler, count: int, get_paths: Callable[[], Sequence[bytes]]) -> Order | None:
    """Return the order that a sampler makes of a set of *count*; None if it has no such listing."""
    listing = make_listing("names", np.arange(count, dtype=np.uint32), count)
    if told.listing != "names":
        known = {one.name: one for one in listings(count, get_paths, ())}
        if told.listing not in known:
            return None
        listing = known[told.listing]
    spec = Spec(told.family, told.seed, told.epoch, told.advance)
    files = _dealt(listing.files[spec.order(len(listing))], told)
    return Order(Following(files, count, grace=GRACE_TOLD), f"told: {spec}", spec, listing, told)


def _dealt(files: Places, told: ToldSampler) -> Places:
    return distributed(files, told.world, told.ranks, drop_last=told.drop_last)
