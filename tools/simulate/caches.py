"""Caches of a given size, for the simulator: each is told of uses and says which are hits.

`ByPolicy` runs the product's own policies; the others are what they are compared with.
"""

from __future__ import annotations

import heapq
import random
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Protocol

from cache.policy.eviction import EvictionPolicy, ItemId
from cache.policy.policies import POLICIES


class Cache(Protocol):
    """Holds at most the bytes it was made for. An item larger than that is never held."""

    def use(self, item: int, size_bytes: int) -> bool:
        """Note a use; return whether it was a hit. After a miss the item is held."""


class ByPolicy:
    """One tier under an eviction policy of the product."""

    def __init__(self, policy: EvictionPolicy, capacity_bytes: int) -> None:
        self._policy = policy
        self._capacity_bytes = capacity_bytes
        self._held_bytes = 0

    def use(self, item: int, size_bytes: int) -> bool:
        one = ItemId(item.to_bytes(16, "big"))
        if self._policy.size_of(one) is not None:
            self._policy.touched(one)
            return True
        if size_bytes > self._capacity_bytes:
            return False
        need_bytes = self._held_bytes + size_bytes - self._capacity_bytes
        for victim in self._policy.victims(need_bytes, ()) if need_bytes > 0 else ():
            self._held_bytes -= self._policy.size_of(victim) or 0
            self._policy.removed(victim)
        self._policy.added(one, size_bytes, used=True)
        self._held_bytes += size_bytes
        assert self._held_bytes <= self._capacity_bytes
        return False


class TwoRandom:
    """Of two items drawn at random, the one used longer ago leaves."""

    def __init__(self, capacity_bytes: int, seed: int = 1) -> None:
        self._free_bytes = capacity_bytes
        self._capacity_bytes = capacity_bytes
        self._generator = random.Random(seed)
        self._items: list[int] = []
        self._at: dict[int, tuple[int, int, int]] = {}  # Where in the list, last use, bytes.
        self._uses = 0

    def use(self, item: int, size_bytes: int) -> bool:
        self._uses += 1
        if item in self._at:
            place, _, held_bytes = self._at[item]
            self._at[item] = (place, self._uses, held_bytes)
            return True
        if size_bytes > self._capacity_bytes:
            return False
        while self._free_bytes < size_bytes:
            self._evict()
        self._at[item] = (len(self._items), self._uses, size_bytes)
        self._items.append(item)
        self._free_bytes -= size_bytes
        return False

    def _evict(self) -> None:
        drawn = (self._generator.choice(self._items), self._generator.choice(self._items))
        victim = min(drawn, key=lambda item: self._at[item][1])
        place, _, size_bytes = self._at.pop(victim)
        last = self._items.pop()
        if last != victim:
            self._items[place] = last
            self._at[last] = (place, *self._at[last][1:])
        self._free_bytes += size_bytes


class Sieve:
    """SIEVE: a hand goes from the oldest to the newest and takes the first one not used since.

    After Zhang and others, "SIEVE is Simpler than LRU" (NSDI 2024).
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._free_bytes = capacity_bytes
        self._capacity_bytes = capacity_bytes
        self._newer: dict[int, int | None] = {}  # A list linked from the oldest to the newest
        self._older: dict[int, int | None] = {}  # and back.
        self._size_bytes: dict[int, int] = {}
        self._visited: set[int] = set()
        self._oldest: int | None = None
        self._newest: int | None = None
        self._hand: int | None = None

    def use(self, item: int, size_bytes: int) -> bool:
        if item in self._size_bytes:
            self._visited.add(item)
            return True
        if size_bytes > self._capacity_bytes:
            return False
        while self._free_bytes < size_bytes:
            self._evict()
        self._insert(item, size_bytes)
        return False

    def _evict(self) -> None:
        hand = self._hand if self._hand is not None else self._oldest
        while hand in self._visited:
            assert hand is not None
            self._visited.remove(hand)
            hand = self._newer[hand] if self._newer[hand] is not None else self._oldest
        assert hand is not None
        self._hand = self._newer[hand]
        self._unlink(hand)

    def _insert(self, item: int, size_bytes: int) -> None:
        self._older[item], self._newer[item] = self._newest, None
        if self._newest is None:
            self._oldest = item
        else:
            self._newer[self._newest] = item
        self._newest = item
        self._size_bytes[item] = size_bytes
        self._free_bytes -= size_bytes

    def _unlink(self, item: int) -> None:
        older, newer = self._older.pop(item), self._newer.pop(item)
        if older is None:
            self._oldest = newer
        else:
            self._newer[older] = newer
        if newer is None:
            self._newest = older
        else:
            self._older[newer] = older
        self._free_bytes += self._size_bytes.pop(item)


class S3Fifo:
    """S3-FIFO: a small queue for newcomers, a main one, and a memory of who left the small one.

    After Yang and others, "FIFO queues are all you need for cache eviction" (SOSP 2023).
    """

    _SMALL_SHARE = 10

    def __init__(self, capacity_bytes: int) -> None:
        self._free_bytes = capacity_bytes
        self._capacity_bytes = capacity_bytes
        self._small: deque[int] = deque()
        self._main: deque[int] = deque()
        self._small_bytes = 0
        self._held: dict[int, list[int]] = {}  # Bytes, and how often it was used since: 0 to 3.
        self._ghosts: OrderedDict[int, None] = OrderedDict()

    def use(self, item: int, size_bytes: int) -> bool:
        held = self._held.get(item)
        if held is not None:
            held[1] = min(3, held[1] + 1)
            return True
        if size_bytes > self._capacity_bytes:
            return False
        while self._free_bytes < size_bytes:
            self._evict()
        self._held[item] = [size_bytes, 0]
        self._free_bytes -= size_bytes
        if item in self._ghosts:
            del self._ghosts[item]
            self._main.append(item)
        else:
            self._small.append(item)
            self._small_bytes += size_bytes
        return False

    def _evict(self) -> None:
        if self._small and (not self._main or self._small_bytes * self._SMALL_SHARE >= self._capacity_bytes):
            self._evict_small()
        else:
            self._evict_main()

    def _evict_small(self) -> None:
        item = self._small.popleft()
        size_bytes, uses = self._held[item]
        self._small_bytes -= size_bytes
        if uses > 1:
            self._held[item][1] = 0
            self._main.append(item)
            return
        self._leave(item)
        self._ghosts[item] = None
        while len(self._ghosts) > max(1, len(self._main)):
            self._ghosts.popitem(last=False)

    def _evict_main(self) -> None:
        item = self._main.popleft()
        if self._held[item][1] > 0:
            self._held[item][1] -= 1
            self._main.append(item)
        else:
            self._leave(item)

    def _leave(self, item: int) -> None:
        self._free_bytes += self._held.pop(item)[0]


class Belady:
    """What is used again last leaves: the best that can be done with items of one size.

    It knows the trace. What is not used again before everything held is not held at all.
    """

    def __init__(self, capacity_bytes: int, items: Sequence[int]) -> None:
        self._free_bytes = capacity_bytes
        self._capacity_bytes = capacity_bytes
        self._next_use = _next_uses(items)
        self._now = 0
        self._held: dict[int, tuple[int, int]] = {}  # Next use, bytes.
        self._last_first: list[tuple[int, int]] = []  # A heap of (minus next use, item), some outdated.

    def use(self, item: int, size_bytes: int) -> bool:
        next_use = self._next_use[self._now]
        self._now += 1
        was_held = item in self._held
        if was_held:
            self._free_bytes += self._held.pop(item)[1]
        if size_bytes <= self._capacity_bytes and self._make_room(size_bytes, next_use):
            self._held[item] = (next_use, size_bytes)
            self._free_bytes -= size_bytes
            heapq.heappush(self._last_first, (-next_use, item))
        return was_held

    def _make_room(self, size_bytes: int, next_use: int) -> bool:
        """Evict what is used later than *next_use*; return whether that is enough."""
        while self._free_bytes < size_bytes:
            if not self._last_first or -self._last_first[0][0] <= next_use:
                return False
            minus_use, victim = heapq.heappop(self._last_first)
            if self._held.get(victim, (0, 0))[0] == -minus_use:
                self._free_bytes += self._held.pop(victim)[1]
        return True


def _next_uses(items: Sequence[int]) -> array[int]:
    """Return for each use when the item is used next; the number of uses where it is not."""
    following = array("Q", bytes(8 * len(items)))
    seen: dict[int, int] = {}
    for at in range(len(items) - 1, -1, -1):
        following[at] = seen.get(items[at], len(items))
        seen[items[at]] = at
    return following


def make_cache(name: str, capacity_bytes: int, items: Sequence[int]) -> Cache:
    """Return an empty cache. *items*: all uses to come, for those who look ahead."""
    if name in POLICIES:
        return ByPolicy(POLICIES[name](), capacity_bytes)
    if name == "belady":
        return Belady(capacity_bytes, items)
    return _OTHERS[name](capacity_bytes)


_OTHERS: dict[str, Callable[[int], Cache]] = {"2-random": TwoRandom, "s3-fifo": S3Fifo, "sieve": Sieve}
NAMES = ("lru", "2-random", "s3-fifo", "sieve", "epoch", "belady")
