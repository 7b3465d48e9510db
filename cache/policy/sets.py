"""Sample sets and their epochs: what of a set has been used, how, and what to fetch next.

A sample set is the files of one dataset, an epoch one pass over them. A `SampleSet` is told of every
use of a member that anybody saw, and judges from the order of the uses what is going on:
  shuffled  members once each, in no listing order: an epoch. The rest of the set will be used.
  scan      members in listing order (cp -r, tar, grep -r, a loader that does not shuffle)
  reused    a few members again and again: no pass over the set, nothing is fetched ahead
Which file to fetch next is asked of an `Upcoming`: where the order of the epoch becomes known, its
finder takes the place of `ListingOrder`. `cache/policy/recognise.py` finds the sets.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from itertools import pairwise
from typing import NamedTuple, Protocol

from cache.model import MIB


class Pattern(Enum):
    """How the members of a set are used. The values are shown by `sluice status`."""

    FEW = "too few uses"
    SHUFFLED = "shuffled"
    SCAN = "scan"
    REUSED = "reused"
    RECORDS = "random records"  # Of large files, each read here and there: which is next says nothing.


class Members:
    """The files of a set. A member's *place* is its number in listing order, from 0.

    Listing order: depth first, each directory's entries in byte order of their names. Takes eight
    bytes a member, and as many again where inodes do not ascend in that order.
    """

    def __init__(self, inodes: Iterable[int], total_bytes: int) -> None:
        self.inodes = array("Q", inodes)
        self.total_bytes = total_bytes
        self._sorted, self._places = self.inodes, array("I")
        if any(a >= b for a, b in pairwise(self.inodes)):
            self._places = array("I", sorted(range(len(self.inodes)), key=self.inodes.__getitem__))
            self._sorted = array("Q", (self.inodes[place] for place in self._places))

    def __len__(self) -> int:
        return len(self.inodes)

    def place(self, inode: int) -> int | None:
        at = bisect_left(self._sorted, inode)
        if at == len(self._sorted) or self._sorted[at] != inode:
            return None
        return self._places[at] if self._places else at

    def places(self, inodes: Iterable[int]) -> list[int]:
        """Return the places of *inodes*, up to the first one that is no member."""
        found: list[int] = []
        for inode in inodes:
            place = self.place(inode)
            if place is None:
                break
            found.append(place)
        return found

    @property
    def mean_bytes(self) -> int:
        return self.total_bytes // max(1, len(self.inodes))


class Upcoming(Protocol):
    """Says which member of one set to fetch next. The one place where a known order plugs in.

    A set has one from its beginning (`SetReadAhead` is given the factory) and tells it of all uses,
    so a finder of orders is an `Upcoming` that answers as `ListingOrder` does until it knows.
    Synchronous and quick (microseconds): it is asked before each fetch. Long searches belong into
    a thread of the finder's own.
    """

    name: str  # `sluice status` shows it: "unknown", "told", "torch RandomSampler seed 0", ...
    is_known: bool  # Then it says itself how far ahead to go; else the set's caution does.
    changes: int  # How often what `due` and `due_later` say has become another order's.
    lead_s: float  # Told by who fetches: how long before its use a member has to be asked for.
    is_needed: bool  # Told by the set: False while all of it is resident, and no order is worth a search.

    def used(self, places: Sequence[int], now_s: float) -> None:
        """Members were used the first time in this epoch, in this order.

        *now_s*: when the last of them was, on the clock of the uses.
        """

    def epoch_began(self, epoch: int) -> None:
        """Another pass over the same members has begun; the uses seen of it so far are told next."""

    def next_place(self, status: bytearray, frontier: int | None) -> int | None:
        """Return the place of the member to fetch next; None: nothing now, ask again after a use.

        *status* holds a byte for each place; only places that are OPEN there may be returned (one
        that is not is resident, under way, used, or can't be had). Who knows the order may return a
        DONE one, too, that was not used: what was resident may have left since. *frontier*: in a scan, the
        place that was reached last.
        """

    def put_back(self, place: int) -> None:
        """The member returned last could not be fetched now: there is no room."""

    def due(self, place: int) -> int | None:
        """Return which use of the set, over all epochs, the member's in this one is; None: not known."""

    def due_later(self, place: int) -> int | None:
        """Return the same of its use in the next epoch."""


class ListingOrder:
    """While nothing is known of the order: what is cheap for the lake. In a scan, what comes next."""

    name = "unknown"
    is_known = False
    changes = 0
    lead_s = 0.0
    is_needed = True

    def used(self, places: Sequence[int], now_s: float) -> None:
        pass

    def epoch_began(self, epoch: int) -> None:
        pass

    def next_place(self, status: bytearray, frontier: int | None) -> int | None:
        place = status.find(OPEN, 0 if frontier is None else frontier)
        return None if place < 0 else place

    def put_back(self, place: int) -> None:
        pass

    def due(self, place: int) -> int | None:
        return None

    def due_later(self, place: int) -> int | None:
        return None


MakeUpcoming = Callable[[Members], Upcoming]

# Of a member, in SampleSet.status.
OPEN = 0  # Not looked at in this epoch.
DONE = 1  # Used or found resident in this epoch, or not to be had.
AHEAD = 2  # Fetched ahead or on its way, not used yet.

_EVIDENCE = 16  # Uses before a pattern is believed,
_LARGE_EVIDENCE = 2  # and in a set of large files.
_WINDOW = 64  # Uses that a pattern is judged by.
_MASK = (1 << _WINDOW) - 1
_SCAN_SHARE = 0.6  # Of the uses that follow a recent one in listing order.
_REUSED_SHARE = 0.25  # Of the uses that repeat one, above what an epoch's end explains.
# Members fetched ahead for each one seen used: a reader that stops after a few costs little, and
# after a hundredth of an epoch nobody waits for this any more.
_AHEAD_PER_USE = 32
_SCAN_PER_USE = 2
_SCAN_FILES_MAX = 256
_SCAN_BYTES_MAX = 256 * MIB
_RECENT = 64  # A use of one of the last so many is the same use, seen twice.
_AGAIN_MIN = 16
_AGAIN_SHARE = 4
_NEARLY_ALL, _SOME = 0.9, 0.1  # Shares of the set.
_AGAIN_AT_THE_END = 16  # More than a sampler pads.
_AGAIN_AT_ONCE_MIN = 8
_LATE_S = 1.0  # A hit is told of up to so late. What is older came by a clock that was set back.


class Noted(NamedTuple):
    """What became of uses: how many were noted, the last of which may have shown that an epoch has begun.

    *late*: the places of those among the *uses* that were of the last epoch.
    """

    uses: int
    has_begun: bool
    late: list[int]


class _Last(OrderedDict[int, None]):
    """The last *most* different places that were put here. Asked for each use: no search in it is linear."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def put(self, place: int) -> None:
        self[place] = None
        self.move_to_end(place)
        if len(self) > self._most:
            self.popitem(last=False)

    @property
    def newest(self) -> int:
        return next(reversed(self))


class SampleSet:
    """One set: its members and how far its epoch is. Takes ten to twenty bytes a member.

    Invariants: `used_count` is the number of set bytes of `_used`; `ahead_count` that of members
    which became AHEAD in this epoch; a used member is DONE.
    """

    def __init__(
        self, root: int, members: Members, upcoming: Upcoming, *, deep: bool, large: bool = False
    ) -> None:
        """*deep*: subdirectories of *root* are part of it. *large*: a use is one pass over a large file."""
        self.root = root
        self.deep = deep
        self.large = large
        self.in_hands = 0  # Of large members: how many are being read now.
        self.records_used = 0  # Of large members: how many are not read from start to end.
        self.members = members
        self.upcoming = upcoming
        self.epoch = 0  # 0: only a few uses so far.
        self.last_used_s = 0.0
        self.strangers = 0  # Uses of files below the root that are no members: the set has grown.
        self.status = bytearray(len(members))
        self._used = bytearray(len(members))
        self._again = bytearray(len(members))
        self.used_count = 0
        self._again_count = 0
        self._recent = _Last(max(1, min(_RECENT, len(members) // 4)))
        self._near = _Last(max(2, min(32, len(members) // 16)))
        self._follows = self._repeats = 0  # A bit for each of the last uses, the newest lowest.
        self._first_uses = self._uses = 0
        self._repeated_at_s: deque[float] = deque([0.0], maxlen=_WINDOW)  # The last ones, at least one.
        self._began_s = 0.0  # When the first use was seen that showed this epoch; 0 in the first one.
        self._ahead_count = self._ahead_used = 0

    def __repr__(self) -> str:
        return f"<set of inode {self.root}: {self.used_count}/{len(self.members)} of epoch {self.epoch}>"

    # Uses

    def used(self, place: int, now_s: float) -> bool:
        """Note a use of a member; return whether it showed that a new epoch has begun."""
        return self.used_all((place,), (now_s,)).has_begun

    def used_all(self, places: Sequence[int], at_s: Sequence[float]) -> Noted:
        """Note uses of members in this order, up to the first one that shows that a new epoch has begun.

        Nothing is noted of late ones (`is_late`).
        """
        late: list[int] = []
        first: list[int] = []  # Those that are the first of their member in this epoch.
        count, has_begun, is_again = 0, False, 0
        for place, now_s in zip(places, at_s, strict=True):
            count += 1
            if self._began_s - _LATE_S <= now_s < self._began_s:
                late.append(place)
                continue
            self.last_used_s = max(self.last_used_s, now_s)
            if place in self._recent:
                continue
            self._recent.put(place)
            self._uses += 1
            is_again = self._used[place]
            self._repeats = (self._repeats << 1 | is_again) & _MASK
            if is_again:
                has_begun = self._used_again(place, now_s)
            else:
                first.append(place)
                has_begun = self._used_first(place)
            if has_begun:
                break
        if first:
            self.upcoming.used(first, self.last_used_s)
        if has_begun and is_again:
            self._begin_epoch(now_s)
        return Noted(count, has_begun, late)

    def is_late(self, now_s: float) -> bool:
        """Return whether a use at *now_s* was one of the last epoch: this one's use is still to come."""
        return self._began_s - _LATE_S <= now_s < self._began_s

    def announce(self, now_s: float) -> None:
        """Somebody told that the first epoch is about to begin."""
        assert self.epoch == 0 and not self._uses
        self.epoch, self.last_used_s = 1, now_s

    def _used_first(self, place: int) -> bool:
        """Note the first use of a member in this epoch; return whether it shows the first epoch."""
        self._first_uses += 1
        follows = place - 1 in self._near or place - 2 in self._near  # Labels or images may be skipped.
        self._follows = (self._follows << 1 | follows) & _MASK
        self._near.put(place)
        self._used[place] = 1
        self.used_count += 1
        if self.status[place] == AHEAD:
            self._ahead_used += 1
        self.status[place] = DONE
        if self.epoch == 0:
            evidence = _LARGE_EVIDENCE if self.large else _EVIDENCE
            self.epoch = int(self.used_count >= min(evidence, len(self.members)))
            return self.epoch == 1
        return False

    def _used_again(self, place: int, now_s: float) -> bool:
        """Note a further use; return whether it shows that another epoch has begun."""
        self._repeated_at_s.append(now_s)
        if not self._again[place]:
            self._again[place] = 1
            self._again_count += 1
        return self._is_over()

    def _is_over(self) -> bool:
        """Return whether the members used again say that another epoch has begun.

        Some are never used (a sampler drops the last ones, the page cache answers unseen) and some
        twice (samplers pad, jobs share the set). Of a new epoch, as many uses are repeats as members
        were used in the old one, and that all at once; else many repeats have to gather.
        """
        count, share = len(self.members), self.used_count / len(self.members)
        repeats = self._repeats.bit_count()
        if share >= _NEARLY_ALL:
            return repeats >= max(1, min(_AGAIN_AT_THE_END, count // 8))
        if share >= _SOME and self._again_count <= 2 * repeats:
            return repeats >= max(_AGAIN_AT_ONCE_MIN, _WINDOW * share / 2)
        least = min(_AGAIN_MIN, max(2, count // _AGAIN_SHARE)) if self.large else _AGAIN_MIN
        return self._again_count > max(least, self.used_count // _AGAIN_SHARE)

    def _begin_epoch(self, now_s: float) -> None:
        """Start the next epoch with what was used again as its first uses."""
        at_once = max(1, self._repeats.bit_count())
        self._began_s = min(list(self._repeated_at_s)[-at_once:])
        if self.pattern is not Pattern.REUSED:
            self._repeats = 0
        self._used, self._again = self._again, bytearray(len(self.members))
        self.used_count, self._again_count = self._again_count, 0
        self._ahead_count = self._ahead_used = 0
        self.status = self.status.replace(bytes([AHEAD]), bytes([DONE]))
        self.epoch += 1
        self.upcoming.is_needed = not self.is_all_fetched
        self.upcoming.epoch_began(self.epoch)
        self.upcoming.used(list(self.used_places()), now_s)

    def look_again(self) -> None:
        """Forget which members are resident: something has left the tiers since the last epoch."""
        self.status = bytearray(self._used)  # A used byte is 1, which is DONE.
        self.upcoming.is_needed = True

    def used_places(self) -> Iterable[int]:
        place = self._used.find(1)
        while place >= 0:
            yield place
            place = self._used.find(1, place + 1)

    def is_used(self, place: int) -> bool:
        return bool(self._used[place])

    # Judgement

    @property
    def pattern(self) -> Pattern:
        if self.epoch == 0 or not self._uses:
            return Pattern.FEW
        if self.records_used * 2 > self.used_count:
            return Pattern.RECORDS
        repeated = self._repeats.bit_count() / min(_WINDOW, self._uses)
        if repeated > _REUSED_SHARE + self.used_count / len(self.members):
            return Pattern.REUSED
        # Of a few large files, the first, which can follow none, would weigh too much.
        judged = max(1, self._first_uses - self.large)
        follow = self._follows.bit_count() / min(_WINDOW, judged)
        return Pattern.SCAN if follow >= _SCAN_SHARE else Pattern.SHUFFLED

    # What to fetch

    def take(self) -> int | None:
        """Return the place of the member to fetch now, which is AHEAD from here on; None: none."""
        pattern = self.pattern
        is_bold = self.upcoming.is_known and not self.large
        if not is_bold and self.unused_ahead >= self._ahead_max(pattern):
            return None
        frontier = self._near.newest if pattern is Pattern.SCAN else None
        place = self.upcoming.next_place(self.status, frontier)
        if place is None:
            return None
        assert self.status[place] != AHEAD and not self._used[place], (place, self.status[place])
        self.status[place] = AHEAD
        self._ahead_count += 1
        return place

    def need_not(self, place: int) -> None:
        """A member that was taken is resident already, or can't be had."""
        if self.status[place] == AHEAD:
            self.status[place] = DONE
            self._ahead_count -= 1

    def found_resident(self, place: int) -> None:
        if self.status[place] == OPEN:
            self.status[place] = DONE

    @property
    def is_all_fetched(self) -> bool:
        return self.status.find(OPEN) < 0

    def put_back(self, place: int) -> None:
        """A member that was taken could not be fetched now: it may be taken again."""
        if self.status[place] == AHEAD:
            self.status[place] = OPEN
            self._ahead_count -= 1
            self.upcoming.put_back(place)

    @property
    def unused_ahead(self) -> int:
        """Return how many members were fetched ahead in this epoch and not used yet."""
        return self._ahead_count - self._ahead_used

    def _ahead_max(self, pattern: Pattern) -> int:
        """Return how many members may be fetched ahead and not used yet."""
        if self.large:
            return self._large_ahead_max(pattern)
        if pattern is Pattern.SHUFFLED:
            return _AHEAD_PER_USE * self.used_count
        if pattern is Pattern.SCAN:
            by_bytes = max(8, _SCAN_BYTES_MAX // max(1, self.members.mean_bytes))
            return min(_SCAN_PER_USE * self.used_count, _SCAN_FILES_MAX, by_bytes)
        return 0

    def _large_ahead_max(self, pattern: Pattern) -> int:
        if pattern not in (Pattern.SHUFFLED, Pattern.SCAN):
            return 0
        next_ones = 1 + max(1, self.in_hands)
        if pattern is Pattern.SCAN or self.upcoming.is_known:
            return next_ones
        # Which come next is not known, that they come is: as many as were used, should the reader stop.
        return next_ones + self.used_count

    # Growth

    def succeeded_by(self, members: Members, upcoming: Upcoming, now_s: float) -> SampleSet:
        """Return the set with the members that it has now, as far into its epoch as this one."""
        successor = SampleSet(self.root, members, upcoming, deep=self.deep, large=self.large)
        successor.in_hands, successor.records_used = self.in_hands, self.records_used
        successor.epoch, successor.last_used_s = self.epoch, self.last_used_s
        places = (members.place(self.members.inodes[place]) for place in self.used_places())
        used = [place for place in places if place is not None]
        for place in used:
            successor._used_first(place)
        upcoming.used(used, now_s)
        successor._began_s = self._began_s
        successor._follows, successor._repeats = self._follows, self._repeats
        successor._first_uses, successor._uses = self._first_uses, self._uses
        return successor
