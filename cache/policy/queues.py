"""What eviction policies are made of: queues of items, and what all policies do with them alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Container, Iterable, Iterator
from itertools import islice
from typing import NewType

from cache.policy.due import ByDue, Next

ItemId = NewType("ItemId", bytes)

PINNED = "pinned"
OUTDATED = "a later checkpoint was written since"


class Queue(OrderedDict[ItemId, int]):
    """Items to their sizes, in order of use. Invariant: size_bytes is the sum; so only these change it."""

    size_bytes = 0

    def put(self, item: ItemId, size_bytes: int) -> None:
        assert item not in self
        self[item] = size_bytes
        self.size_bytes += size_bytes

    def take(self, item: ItemId) -> int | None:
        size_bytes = self.pop(item, None)
        self.size_bytes -= size_bytes or 0
        return size_bytes

    def take_oldest(self) -> tuple[ItemId, int]:
        item, size_bytes = self.popitem(last=False)
        self.size_bytes -= size_bytes
        return item, size_bytes

    def put_all(self, other: Queue) -> None:
        self.update(other)
        self.size_bytes += other.size_bytes


AnyQueue = Queue | ByDue[ItemId]


class QueuedPolicy(ABC):
    """Items in queues, in the order in which they leave (`_in_order`).

    What is `_outdated` leaves before all others, what is `_pinned` never.
    Invariant: an item is in one of `_queues` at most; these are all queues, those in which most of what
    is used is found come first.
    """

    def __init__(self) -> None:
        self._outdated = Queue()
        self._pinned = Queue()
        self._queues: tuple[AnyQueue, ...] = ()

    # For those who derive from this

    @abstractmethod
    def _in_order(self) -> Iterator[tuple[ItemId, int]]:
        """Yield (item, size in bytes) of what is not pinned, first to leave first."""

    @abstractmethod
    def _unpinned(self, item: ItemId, size_bytes: int) -> None:
        """Put an item where it goes that was pinned until now."""

    def _queue_of(self, item: ItemId) -> AnyQueue | None:
        for queue in self._queues:
            if item in queue:
                return queue
        return None

    def _take_out(self, item: ItemId) -> int | None:
        """Take *item* out of its queue; return its size in bytes, None when it was in none."""
        queue = self._queue_of(item)
        return None if queue is None else queue.take(item)

    def _put_into(self, queue: Queue, item: ItemId) -> None:
        """Move an item, unless it is pinned or unknown."""
        if item not in self._pinned and (size_bytes := self._take_out(item)) is not None:
            queue.put(item, size_bytes)

    # The parts of EvictionPolicy that are the same for all

    @abstractmethod
    def added(self, item: ItemId, size_bytes: int, *, used: bool) -> None: ...

    @abstractmethod
    def touched_all(self, items: Iterable[ItemId]) -> None: ...

    @abstractmethod
    def expect(self, item: ItemId, next: Next) -> None: ...

    def brought(self, items: Iterable[tuple[ItemId, int, Next]]) -> None:
        for item, size_bytes, next in items:
            self.added(item, size_bytes, used=False)
            self.expect(item, next)

    def touched(self, item: ItemId) -> None:
        self.touched_all((item,))

    def pin(self, item: ItemId) -> None:
        self._put_into(self._pinned, item)

    def unpin(self, item: ItemId) -> None:
        if (size_bytes := self._pinned.take(item)) is not None:
            self._unpinned(item, size_bytes)

    def pinned(self) -> list[ItemId]:
        return list(self._pinned)

    @property
    def pinned_bytes(self) -> int:
        return self._pinned.size_bytes

    def victims(self, need_bytes: int, staying: Container[bytes]) -> list[ItemId]:
        chosen: list[ItemId] = []
        for item, size_bytes in self._in_order():
            if need_bytes <= 0:
                break
            if item in staying:
                continue
            chosen.append(item)
            need_bytes -= size_bytes
        return chosen

    def order(self, limit: int) -> list[ItemId]:
        return [item for item, _ in islice(self._in_order(), limit)]

    def size_of(self, item: ItemId) -> int | None:
        queue = self._queue_of(item)
        return None if queue is None else queue[item]

    def __len__(self) -> int:
        return sum(map(len, self._queues))
