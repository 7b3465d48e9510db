"""When an item is used next, and items sorted by it: of a known order, what comes last leaves first."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

K = TypeVar("K", bound=bytes)

_BUCKET = 64  # Uses. Items due so close together leave in any order: the last one put first.


class Next(NamedTuple):
    """The use of an item that comes next, as far as anybody knows.

    *due*: which use of its set that will be, counted over all epochs; None where their order is not
    known. *later*: not in this epoch but in the one after it.
    """

    due: int | None = None
    later: bool = False


SOME_TIME = Next()  # In this epoch; nobody knows when.


class ByDue(Generic[K]):
    """Items with their sizes, furthest use first.

    Invariants: `_keys` are the numbers of the buckets in ascending order, none of them is empty;
    `size_bytes` is the sum of all sizes.
    """

    def __init__(self) -> None:
        self._buckets: dict[int, OrderedDict[K, int]] = {}
        self._keys: list[int] = []
        self._bucket_bytes: dict[int, int] = {}
        self._dues: dict[K, int] = {}
        self.size_bytes = 0

    def __contains__(self, item: object) -> bool:
        return item in self._dues

    def __len__(self) -> int:
        return len(self._dues)

    def __getitem__(self, item: K) -> int:
        """Return the item's size in bytes."""
        return self._buckets[self._dues[item] // _BUCKET][item]

    def due(self, item: K) -> int | None:
        return self._dues.get(item)

    def put(self, item: K, size_bytes: int, due: int) -> None:
        assert item not in self._dues
        key = due // _BUCKET
        if key not in self._buckets:
            self._buckets[key], self._bucket_bytes[key] = OrderedDict(), 0
            insort(self._keys, key)
        self._dues[item] = due
        self._buckets[key][item] = size_bytes
        self._bucket_bytes[key] += size_bytes
        self.size_bytes += size_bytes

    def take(self, item: K) -> int | None:
        """Take *item* out; return its size in bytes, None when it is not here."""
        due = self._dues.pop(item, None)
        if due is None:
            return None
        key = due // _BUCKET
        size_bytes = self._buckets[key].pop(item)
        self._bucket_bytes[key] -= size_bytes
        self.size_bytes -= size_bytes
        if not self._buckets[key]:
            del self._buckets[key], self._bucket_bytes[key]
            del self._keys[bisect_left(self._keys, key)]
        return size_bytes

    def items(self) -> Iterator[tuple[K, int]]:
        """Yield (item, size in bytes), the one that is used last first."""
        for key in reversed(self._keys):
            yield from reversed(self._buckets[key].items())

    def values(self) -> Iterator[int]:
        return (size_bytes for _, size_bytes in self.items())

    def bytes_beyond(self, due: int, enough_bytes: int) -> int:
        """Return the bytes of what is used clearly after *due*; stops counting at *enough_bytes*."""
        total_bytes = 0
        for key in reversed(self._keys):
            if key <= due // _BUCKET + 1 or total_bytes >= enough_bytes:
                break
            total_bytes += self._bucket_bytes[key]
        return total_bytes
