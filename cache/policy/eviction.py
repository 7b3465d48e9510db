"""What leaves a tier next. One policy object a tier; it changes only through the three events.

An item is a whole object or one group of a sparse file; `ItemId` is the key of either: 16 bytes of
version id, and 4 of group number for a group.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from itertools import chain, islice
from typing import Protocol

from cache.policy.due import SOME_TIME, ByDue, Next
from cache.policy.queues import OUTDATED, PINNED, AnyQueue, Queue, QueuedPolicy
from cache.policy.queues import ItemId as ItemId


class EvictionPolicy(Protocol):
    name: str

    def added(self, item: ItemId, size_bytes: int, *, used: bool) -> None:
        """*item* is in the tier now. *used*: a reader asked for it, it was not read ahead."""

    def touched(self, item: ItemId) -> None:
        """A reader used *item*. Unknown items are ignored: they may just have left."""

    def touched_all(self, items: Iterable[ItemId]) -> None:
        """Readers used *items*, in this order."""

    def brought(self, items: Iterable[tuple[ItemId, int, Next]]) -> None:
        """Items of these sizes in bytes were read ahead and are in the tier now, for the use that comes next.

        The same as `added`, with nobody having asked, and `expect` of each.
        """

    def removed(self, item: ItemId) -> None:
        """*item* has left the tier. Unknown items are ignored."""

    def expect(self, item: ItemId, next: Next = SOME_TIME) -> None:
        """A recognised epoch will use *item*: it leaves last. Unknown items are ignored.

        Of items whose turn is known, what is used last leaves first. What only the epoch after
        this one uses leaves before all that this one does.
        """

    def release(self, item: ItemId) -> None:
        """Take `expect` back: the epoch went no further."""

    def passed(self, item: ItemId) -> None:
        """A scan has read *item* and gone on: nobody will soon. Unknown items are ignored."""

    def outdated(self, item: ItemId) -> None:
        """*item* is a checkpoint that a later one has followed: it leaves first, unless it is used again.

        Unknown items are ignored.
        """

    def next_of(self, item: ItemId) -> Next | None:
        """Return what `expect` last said of the item and no use has made untrue since, else None."""

    def want(self, item: ItemId) -> None:
        """Somebody asked to have *item* here: it leaves after what nobody asked for. No use."""

    def is_wanted(self, item: ItemId) -> bool:
        """Return whether *item* is here to be used: brought unasked, or not yet used in this epoch."""

    def pin(self, item: ItemId) -> None:
        """*item* never leaves, until `unpin`. Unknown items are ignored."""

    def unpin(self, item: ItemId) -> None:
        """Take `pin` back. Items that are not pinned are ignored."""

    def pinned(self) -> list[ItemId]:
        """Return all pinned items."""

    @property
    def pinned_bytes(self) -> int: ...

    def why(self, item: ItemId) -> str | None:
        """Return what decides when *item* leaves, for people; None when it is not in the tier."""

    @property
    def expected_bytes(self) -> int:
        """Return the bytes of what this epoch of some set is expected to use."""

    @property
    def spare_bytes(self) -> int:
        """Return the bytes of what read-ahead may push out: no recognised epoch still needs it."""

    def bytes_beyond(self, due: int, enough_bytes: int) -> int:
        """Return the bytes, beside `spare_bytes`, of what is used clearly after *due*.

        Counting may stop at *enough_bytes*.
        """

    def victims(self, need_bytes: int, staying: Container[bytes]) -> list[ItemId]:
        """Return the items to evict, first to leave first, so that *need_bytes* come free.

        Skips the items in *staying*, so it may free less than asked. Changes nothing: call
        `removed()` once an item has left the disk.
        """

    def size_of(self, item: ItemId) -> int | None:
        """Return the item's size in bytes, None when it is not in the tier."""

    def order(self, limit: int) -> list[ItemId]:
        """Return the first *limit* items in the order in which they would leave, without the pinned."""

    def __len__(self) -> int: ...


class LruPolicy(QueuedPolicy):
    """The least recently used item leaves first, after the outdated ones. It knows of no future."""

    name = "lru"

    def __init__(self) -> None:
        super().__init__()
        self._items = Queue()
        self._queues = (self._items, self._outdated, self._pinned)

    def added(self, item: ItemId, size_bytes: int, *, used: bool) -> None:
        queue = self._pinned if item in self._pinned else self._items
        self._take_out(item)
        queue.put(item, size_bytes)

    def touched_all(self, items: Iterable[ItemId]) -> None:
        for item in items:
            if item in self._items:
                self._items.move_to_end(item)
            elif (size_bytes := self._outdated.take(item)) is not None:
                self._items.put(item, size_bytes)

    def removed(self, item: ItemId) -> None:
        self._take_out(item)

    def expect(self, item: ItemId, next: Next = SOME_TIME) -> None:
        pass

    def release(self, item: ItemId) -> None:
        pass

    def passed(self, item: ItemId) -> None:
        pass

    def outdated(self, item: ItemId) -> None:
        if (size_bytes := self._items.take(item)) is not None:
            self._outdated.put(item, size_bytes)

    def next_of(self, item: ItemId) -> Next | None:
        return None

    def want(self, item: ItemId) -> None:
        self.touched(item)  # It knows of uses only.

    def is_wanted(self, item: ItemId) -> bool:
        return False

    def why(self, item: ItemId) -> str | None:
        if item in self._pinned:
            return PINNED
        if item in self._outdated:
            return OUTDATED
        return "least recently used first" if item in self._items else None

    @property
    def expected_bytes(self) -> int:
        return 0

    def bytes_beyond(self, due: int, enough_bytes: int) -> int:
        return 0

    @property
    def spare_bytes(self) -> int:
        return 0  # What was used last would go for what may never be used.

    def _in_order(self) -> Iterator[tuple[ItemId, int]]:
        return chain(self._outdated.items(), self._items.items())

    def _unpinned(self, item: ItemId, size_bytes: int) -> None:
        self._items.put(item, size_bytes)


class EpochPolicy(QueuedPolicy):
    """For shuffled epochs: a set that stays is worth more than what came last.

    Each item is in one of ten queues, each in order of use. They leave in this order:
      outdated  a checkpoint that a later one has followed, and that was not used since
      idle    not used in the whole of the last epoch
      used    used in this epoch, *newest first*: so one miss replaces the last one, and the rest
              stays for the next epoch, however late that is recognised
      again   used a second time since this epoch began: the next one may have begun
      later   told from outside: when the next epoch will use it. The furthest first
      needed  used in the last epoch or brought unasked, not yet used in this one
      asked   somebody asked in this epoch to have it here (`want`), and has not used it yet
      recent  used a moment ago: somebody may still be reading it
      planned told from outside: when this epoch will use it. The furthest first
      expected  told from outside: a recognised epoch has not used it yet, and may at any time
    The newest few of `recent` leave after `expected`. What is pinned never leaves.
    With random orders and a fraction C of a set cached, an epoch then fetches (1 - C) of it.
    Least recently used first would fetch nearly all of it (0.98 at C = 0.2, 0.85 at 0.5).

    An epoch ends when more than an eighth of the items (and 16) were used again: what was needed
    and did not come is idle then. It also ends when as many items as there are have left with not
    one of them used: another set is being read, or the first pass is over more than twice the tier.
    """

    name = "epoch"
    _AGAIN_MIN = 16
    _AGAIN_SHARE = 8
    _RECENT_SHARE = 16
    _RECENT_MAX = 64
    _IN_HANDS = 16

    def __init__(self) -> None:
        super().__init__()
        self._idle = Queue()
        self._used = Queue()
        self._again = Queue()
        self._needed = Queue()
        self._asked = Queue()
        self._expected = Queue()
        self._later: ByDue[ItemId] = ByDue()
        self._planned: ByDue[ItemId] = ByDue()
        self._recent = Queue()
        self._recent_again: set[ItemId] = set()  # Those of `recent` that go on to `again`.
        self._recent_later: dict[ItemId, int] = {}  # Those that go on to `later`, and when they are due.
        self._gone_unused = 0  # Items that left since one was used.
        self.epochs = 0
        self._queues = self._list_queues()

    def added(self, item: ItemId, size_bytes: int, *, used: bool) -> None:
        is_pinned = item in self._pinned
        self._take_out(item)
        if is_pinned:
            self._pinned.put(item, size_bytes)
        elif used:
            self._recent.put(item, size_bytes)
            self._pass_on(self._recent_max)
        else:
            self._needed.put(item, size_bytes)

    def brought(self, items: Iterable[tuple[ItemId, int, Next]]) -> None:
        for item, size_bytes, next in items:
            if self._queue_of(item) is None:
                self._put_expected(item, size_bytes, next)
            else:
                super().brought([(item, size_bytes, next)])

    def touched_all(self, items: Iterable[ItemId]) -> None:
        recent_max = self._recent_max  # No use changes how many items there are.
        for item in items:
            self._touch(item, recent_max)

    def _touch(self, item: ItemId, recent_max: int) -> None:
        if item in self._recent:  # Who reads what was just brought uses nothing that has waited here.
            self._recent.move_to_end(item)
            return
        queue = self._queue_of(item)
        if queue is None or queue is self._pinned:
            return
        self._recent.put(item, queue.take(item) or 0)
        if queue is self._used or queue is self._again:
            self._recent_again.add(item)
        self._pass_on(recent_max)
        gathered = len(self._again)
        if gathered > self._AGAIN_MIN and gathered > len(self) // self._AGAIN_SHARE:
            self.epoch_began()
        self._gone_unused = 0

    def epoch_began(self) -> None:
        """Start a new epoch. Recognised here; may be told from outside."""
        self._idle.put_all(self._needed)
        self._needed, self._used, self._again = self._used, self._again, Queue()
        self._needed.put_all(self._asked)  # No whole epoch has passed it by yet.
        self._asked = Queue()
        self._queues = self._list_queues()
        self._recent_again.clear()
        self._gone_unused = 0
        self.epochs += 1

    def removed(self, item: ItemId) -> None:
        if self._outdated.take(item) is not None:
            return  # It says nothing about epochs.
        if self._take_out(item) is not None:
            self._gone_unused += 1
            if self._gone_unused > max(self._AGAIN_MIN, len(self)):
                self.epoch_began()

    def expect(self, item: ItemId, next: Next = SOME_TIME) -> None:
        if item in self._pinned:
            return
        if next.later and next.due is not None and item in self._recent:
            self._recent_later[item] = next.due
            return
        if (size_bytes := self._take_out(item)) is not None:
            self._put_expected(item, size_bytes, next)

    def _put_expected(self, item: ItemId, size_bytes: int, next: Next) -> None:
        if next.due is None:
            self._expected.put(item, size_bytes)
        else:
            (self._later if next.later else self._planned).put(item, size_bytes, next.due)

    def release(self, item: ItemId) -> None:
        if self.next_of(item) is not None and (size_bytes := self._take_out(item)) is not None:
            self._idle.put(item, size_bytes)

    def passed(self, item: ItemId) -> None:
        pass  # What was used last leaves first in any case.

    def outdated(self, item: ItemId) -> None:
        if item not in self._recent and self.next_of(item) is None:  # Else somebody reads it, or is about to.
            self._put_into(self._outdated, item)

    def next_of(self, item: ItemId) -> Next | None:
        if item in self._expected:
            return SOME_TIME
        if (due := self._planned.due(item)) is not None:
            return Next(due)
        due = self._recent_later.get(item, self._later.due(item))
        return None if due is None else Next(due, later=True)

    def want(self, item: ItemId) -> None:
        if item not in self._expected and item not in self._planned:
            self._put_into(self._asked, item)

    def is_wanted(self, item: ItemId) -> bool:
        return item in self._needed or item in self._asked

    def why(self, item: ItemId) -> str | None:
        return next((reason for queue, reason in self._reasons() if item in queue), None)

    def _reasons(self) -> tuple[tuple[Container[ItemId], str], ...]:
        return (
            (self._pinned, PINNED),
            (self._outdated, OUTDATED),
            (self._idle, "not used in the last epoch"),
            (self._used, "used in this epoch"),
            (self._again, "used again in this epoch"),
            (self._later, "expected by the next epoch, in its order"),
            (self._needed, "not yet used in this epoch"),
            (self._asked, "asked for, not yet used"),
            (self._recent, "used a moment ago"),
            (self._planned, "expected by the running epoch, in its order"),
            (self._expected, "expected by the running epoch"),
        )

    @property
    def expected_bytes(self) -> int:
        return self._expected.size_bytes + self._planned.size_bytes

    @property
    def spare_bytes(self) -> int:
        spare = (self._outdated, self._idle, self._used, self._again, self._later, self._needed, self._asked)
        return sum(queue.size_bytes for queue in spare)

    def bytes_beyond(self, due: int, enough_bytes: int) -> int:
        return self._planned.bytes_beyond(due, enough_bytes)

    def _list_queues(self) -> tuple[AnyQueue, ...]:
        return (
            self._used,
            self._needed,
            self._asked,
            self._recent,
            self._expected,
            self._again,
            self._idle,
            self._planned,
            self._later,
            self._outdated,
            self._pinned,
        )

    def _unpinned(self, item: ItemId, size_bytes: int) -> None:
        self._asked.put(item, size_bytes)

    def _in_order(self) -> Iterator[tuple[ItemId, int]]:
        return chain(self._outdated.items(), self._leave_gladly(), self._leave_late())

    def _leave_gladly(self) -> Iterator[tuple[ItemId, int]]:
        """Yield what no epoch is known to need, first to leave first."""
        return chain(
            self._idle.items(),
            reversed(self._used.items()),
            self._again.items(),
            self._later.items(),
            self._needed.items(),
            self._asked.items(),
        )

    def _leave_late(self) -> Iterator[tuple[ItemId, int]]:
        older = max(0, len(self._recent) - self._IN_HANDS)
        return chain(
            islice(self._recent.items(), older),
            self._planned.items(),
            self._expected.items(),
            self._held(),
            islice(self._recent.items(), older, None),
        )

    def _held(self) -> Iterator[tuple[ItemId, int]]:
        """Yield what is kept longer than what epochs expect: for those who derive from this."""
        return iter(())

    @property
    def _recent_max(self) -> int:
        return max(1, min(self._RECENT_MAX, len(self) // self._RECENT_SHARE))

    def _pass_on(self, recent_max: int) -> None:
        """Move what is too much of `recent` to where it stays until its next use."""
        while len(self._recent) > recent_max:
            item, size_bytes = self._recent.take_oldest()
            due = self._recent_later.pop(item, None)
            if item in self._recent_again:
                self._recent_again.remove(item)
                queue = self._again
            else:
                queue = self._used
            if due is None:
                queue.put(item, size_bytes)
            else:
                self._later.put(item, size_bytes, due)

    def _take_out(self, item: ItemId) -> int | None:
        if item in self._recent:
            self._recent_again.discard(item)
            self._recent_later.pop(item, None)
        return super()._take_out(item)
