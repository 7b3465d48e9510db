"""Finds the order of an epoch from its first opens, by comparing them with what samplers would do.

The first opens are spread over thousands of places, because loader workers read whole batches each
and ranks take turns; but whatever the interleaving, the first places of the right order are among
them. Those pick a few out of thousands of candidates, and all opens then judge these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache.policy.order.candidates import (
    LEADING_PLACES_MAX,
    Leading,
    TorchTable,
    late_starters,
    leading_of,
    torch_tables,
    whole_orders,
    work_ns,
)
from cache.policy.order.evidence import least_hits, surprise
from cache.policy.order.listings import NOWHERE, Listing, listings, unlike
from cache.policy.order.spec import Spec

FILES_MIN = 32  # Of smaller sets any order looks like any other.
_LOOKS_AT = (16, 24, 32, 48, 64, 96, 128, 192, 256)  # Opens: more each time, then it is given up.
OPENS_MAX = _LOOKS_AT[-1]
_LISTINGS_FIRST, _LISTINGS_MAX = 1, 12
_SURVIVORS_MAX = 6
_SURPRISE_MIN = 40.0  # 4e-18, for 30,000 candidates under twelve listings, in 24 ways each.
_HOPE_MIN = 30.0  # More than a few of the first places give, by which survivors were chosen.
_EXPLAINED_MIN = 0.4  # Of the opens: others may read in the same directory.
_LEADING_PLACES = (2048, 8192, LEADING_PLACES_MAX)
_KEPT_MAX = 32
_WORK_NS = 40_000_000  # For orders that must be made whole.


@dataclass(frozen=True, slots=True)
class Found:
    """The order, and the listing whose places it orders. *surprise*: see `evidence`."""

    spec: Spec
    listing: Listing
    surprise: float

    def files(self) -> NDArray[np.uint32]:
        """Return all files of the listing in the order in which this epoch reads them."""
        return self.listing.files[self.spec.order(len(self.listing))]


class _Bank:
    """The candidates for listings of one length."""

    def __init__(self, n: int, expected: Sequence[Spec], work_ns_max: int) -> None:
        self._n = n
        self._work_ns = work_ns_max - sum(work_ns(spec, n) for spec in expected)
        self._has_rarer = False
        self.tables = torch_tables(n)
        self.leading = [leading_of(spec, n) for spec in expected]
        self._made: dict[tuple[str, int, int], Leading] = {}  # Survivors come back at the next look.

    def add_rarer(self) -> None:
        """Add what costs more and is rarer. Only the first call does."""
        if not self._has_rarer:
            self._has_rarer = True
            self.leading += late_starters(self._n)
            self.leading += whole_orders(self._n, self._work_ns)

    def torch_leading(self, table: TorchTable, column: int, places_max: int) -> Leading:
        key = (table.family, column, places_max)
        if key not in self._made:
            if len(self._made) >= _KEPT_MAX:
                self._made.clear()
            self._made[key] = table.leading(column, self._n, places_max)
        return self._made[key]


class Finder:
    """For one epoch of one set. `find` is work: call it off the serving path, one at a time.

    *count* files, told by number in listing order; *get_paths* returns their paths below the set's
    directory. *expected*: what this epoch is likely to be, from the last one's `Spec.successors()`.
    """

    def __init__(
        self, count: int, get_paths: Callable[[], Sequence[bytes]], expected: Sequence[Spec] = ()
    ) -> None:
        self._count = count
        self._get_paths = get_paths
        self._expected = list(expected)
        self._looks = 0
        self._banks: dict[int, _Bank] = {}
        self._listings: list[Listing] = []
        self._more_listings: Iterator[Listing] | None = None

    @property
    def gave_up(self) -> bool:
        return self._looks == len(_LOOKS_AT) or self._count < FILES_MIN

    @property
    def has_looked(self) -> bool:
        return self._looks > 0

    def expects(self, spec: Spec | None) -> bool:
        """Return whether *spec* was given as likely, so that opens did not find it."""
        return spec in self._expected

    def wants_look(self, opens: int) -> bool:
        """Return whether with *opens* files opened `find` knows more than the last time."""
        return not self.gave_up and opens >= _LOOKS_AT[self._looks]

    def find(self, opened: Sequence[int]) -> Found | None:
        """Return the order that the files *opened* speak for beyond doubt, or None. 0.1 s of work.

        *opened*: the first ones of this epoch, each once, up to OPENS_MAX of them.
        """
        assert self.wants_look(len(opened)) and len(opened) <= OPENS_MAX, len(opened)
        while self._looks < len(_LOOKS_AT) and len(opened) >= _LOOKS_AT[self._looks]:
            self._looks += 1
        listings = self._known_listings(opened)
        found = [found for listing in listings if (found := self._find_in(listing, opened))]
        return max(found, key=lambda one: one.surprise, default=None)

    def _known_listings(self, opened: Sequence[int]) -> list[Listing]:
        """Return the likeliest listing; all of them once that led nowhere."""
        if self._more_listings is None:
            self._more_listings = listings(self._count, self._get_paths, opened)
        wanted = _LISTINGS_FIRST if self._looks == 1 else _LISTINGS_MAX
        while len(self._listings) < wanted and (listing := next(self._more_listings, None)):
            if len(listing) >= FILES_MIN and unlike(listing, self._listings):
                self._listings.append(listing)
        return self._listings

    def _find_in(self, listing: Listing, files: Sequence[int]) -> Found | None:
        places = listing.place_of[list(files)]
        opened = np.zeros(len(listing), np.bool_)
        opened[places[places != NOWHERE]] = True
        best: Found | None = None
        for spec, strength in self._judged(self._bank(len(listing)), opened, len(files)):
            if strength >= _SURPRISE_MIN and (best is None or strength > best.surprise):
                best = Found(spec, listing, strength)
        return best

    def _judged(self, bank: _Bank, opened: NDArray[np.bool_], count: int) -> Iterator[tuple[Spec, float]]:
        """Yield the candidates worth a look, with what all *count* opens say for each."""
        for leading in bank.leading:
            yield leading.spec, surprise(leading.places, opened, count, _EXPLAINED_MIN)
        for table in bank.tables:
            for column in _survivors(table, opened):
                yield table.spec(column), _judge_torch(bank, table, column, opened, count)

    def _bank(self, n: int) -> _Bank:
        if n not in self._banks:
            work_ns_max = _WORK_NS if not self._banks else _WORK_NS // 4
            self._banks[n] = _Bank(n, self._expected, work_ns_max)
        if self._looks > 1:
            self._banks[n].add_rarer()
        return self._banks[n]


def _survivors(table: TorchTable, opened: NDArray[np.bool_]) -> list[int]:
    """Return the columns most of whose first places are open, the best ones first."""
    places, seeds = table.first.shape
    hits = np.count_nonzero(opened[table.first], axis=0)
    least = least_hits(places, int(np.count_nonzero(opened)), len(opened), seeds, _SURVIVORS_MAX)
    passed = np.flatnonzero(hits >= least)
    best: list[int] = passed[np.argsort(-hits[passed], kind="stable")].tolist()
    return best[:_SURVIVORS_MAX]


def _judge_torch(bank: _Bank, table: TorchTable, column: int, opened: NDArray[np.bool_], count: int) -> float:
    """Look at ever more places for as long as the fewer ones gave hope."""
    strength = 0.0
    for places_max in _LEADING_PLACES:
        places = bank.torch_leading(table, column, places_max).places
        strength = surprise(places, opened, count, _EXPLAINED_MIN)
        if strength >= _SURPRISE_MIN or surprise(places, opened, count, 0.0) < _HOPE_MIN:
            break
    return strength
