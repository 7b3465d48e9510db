"""What leaves a tier next. One policy object a tier; it changes only through the three events.

An item is a whole object or one group of a sparse file; `ItemId` is the key of either: 16 bytes of
version id, and 4 of group number for a group.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from itertools import chain, islice
from typing import NewType, Protocol

ItemId = NewType("ItemId", bytes)


class EvictionPolicy(Protocol):
    name: str

    def added(self, item: ItemId, size_bytes: int, *, used: bool) -> None:
        """*item* is in the tier now. *used*: a reader asked for it, it was not read ahead."""

    def touched(self, item: ItemId) -> None:
        """A reader used *item*. Unknown items are ignored: they may just have left."""

    def removed(self, item: ItemId) -> None:
        """*item* has left the tier. Unknown items are ignored."""

    def victims(self, need_bytes: int, busy: Collection[bytes]) -> list[ItemId]:
        """Return the items to evict, first to leave first, so that *need_bytes* come free.

        Skips items of the versions in *busy*, so it may free less than asked. Changes
        nothing: call `removed()` once an item has left the disk.
        """

    def size_of(self, item: ItemId) -> int | None:
        """Return the item's size in bytes, None when it is not in the tier."""

    def order(self, limit: int) -> list[ItemId]:
        """Return the first *limit* items in the order in which they would leave."""

    def __len__(self) -> int: ...


def _take(items: Iterator[tuple[ItemId, int]], need_bytes: int, busy: Collection[bytes]) -> list[ItemId]:
    chosen: list[ItemId] = []
    for item, size_bytes in items:
        if need_bytes <= 0:
            break
        if item[:16] in busy:
            continue
        chosen.append(item)
        need_bytes -= size_bytes
    return chosen


class LruPolicy:
    """The least recently used item leaves first."""

    name = "lru"

    def __init__(self) -> None:
        self._items: OrderedDict[ItemId, int] = OrderedDict()

    def added(self, item: ItemId, size_bytes: int, *, used: bool) -> None:
        self._items[item] = size_bytes
        self._items.move_to_end(item)

    def touched(self, item: ItemId) -> None:
        if item in self._items:
            self._items.move_to_end(item)

    def removed(self, item: ItemId) -> None:
        self._items.pop(item, None)

    def victims(self, need_bytes: int, busy: Collection[bytes]) -> list[ItemId]:
        return _take(iter(self._items.items()), need_bytes, busy)

    def size_of(self, item: ItemId) -> int | None:
        return self._items.get(item)

    def order(self, limit: int) -> list[ItemId]:
        return list(islice(self._items, limit))

    def __len__(self) -> int:
        return len(self._items)


class EpochPolicy:
    """What this epoch has used leaves before what it still needs.

    Each item is in one of three queues, each in order of use:
      idle    not used in the whole of the last epoch: leaves first
      used    used in this epoch: not needed again before the next one
      needed  used in the last epoch or read ahead, not yet used in this one: leaves last
    With random orders and a fraction C of a set cached, an epoch then fetches (1 - C) of it.

    An epoch ends when items come round again: once the uses of already used items outnumber
    an eighth of the uses since it began (and 16). Then used becomes needed, and what was still
    needed is idle.
    """

    name = "epoch"
    _REUSES_MIN = 16
    _REUSE_SHARE = 8

    def __init__(self) -> None:
        self._idle: OrderedDict[ItemId, int] = OrderedDict()
        self._used: OrderedDict[ItemId, int] = OrderedDict()
        self._needed: OrderedDict[ItemId, int] = OrderedDict()
        self._uses = 0
        self._reuses = 0
        self.epochs = 0

    def added(self, item: ItemId, size_bytes: int, *, used: bool) -> None:
        self.removed(item)
        (self._used if used else self._needed)[item] = size_bytes
        self._uses += used

    def touched(self, item: ItemId) -> None:
        self._uses += 1
        for queue in (self._needed, self._idle):
            if item in queue:
                self._used[item] = queue.pop(item)
                return
        if item in self._used:
            self._used.move_to_end(item)
            self._reuses += 1
            if self._reuses > max(self._REUSES_MIN, self._uses // self._REUSE_SHARE):
                self.epoch_began()

    def epoch_began(self) -> None:
        """Start a new epoch. Recognised from reuse here; may be told from outside."""
        self._idle.update(self._needed)
        self._needed, self._used = self._used, OrderedDict()
        self._uses = self._reuses = 0
        self.epochs += 1

    def removed(self, item: ItemId) -> None:
        for queue in (self._idle, self._used, self._needed):
            if queue.pop(item, None) is not None:
                return

    def victims(self, need_bytes: int, busy: Collection[bytes]) -> list[ItemId]:
        return _take(self._in_order(), need_bytes, busy)

    def size_of(self, item: ItemId) -> int | None:
        for queue in (self._used, self._needed, self._idle):
            if item in queue:
                return queue[item]
        return None

    def order(self, limit: int) -> list[ItemId]:
        return [item for item, _ in islice(self._in_order(), limit)]

    def _in_order(self) -> Iterator[tuple[ItemId, int]]:
        return chain(self._idle.items(), self._used.items(), self._needed.items())

    def __len__(self) -> int:
        return len(self._idle) + len(self._used) + len(self._needed)


POLICIES: dict[str, Callable[[], EvictionPolicy]] = {"lru": LruPolicy, "epoch": EpochPolicy}


def make_policy(name: str) -> EvictionPolicy:
    return POLICIES[name]()
