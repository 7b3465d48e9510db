"""A tier as the coordinator sees it, and what it remembers of a version that is not whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import trio

from cache.model import MIB, ObjectVersion
from cache.policy.due import Next
from cache.policy.eviction import EvictionPolicy, ItemId
from cache.tier import TierBudget, TierFiles

_GUARD_EVERY_BYTES = 64 * MIB  # The free-space guard asks the disk again after so many at most,
_GUARD_SHARE = 16  # and after this share of the space that it guards: so much it may be off.


@dataclass
class Tier:
    """A tier's files, budget and policy. *free_min_bytes* stays free on its disk.

    *is_pinned* tells of a version whether it may not leave the cache. What memory holds may be moved
    all the same, so pins are carried out where things would leave: on disks.
    """

    files: TierFiles
    budget: TierBudget
    policy: EvictionPolicy
    free_min_bytes: int = 0
    is_pinned: Callable[[bytes], bool] = lambda vid: False
    room_lock: trio.Lock = field(default_factory=trio.Lock)
    unguarded_bytes: int = _GUARD_EVERY_BYTES
    landing_bytes: int = 0  # Charged, and not indexed yet: the disk may not know of them.
    _disk_room_bytes: int = 0  # What the disk could take when it was asked last.

    @property
    def name(self) -> str:
        return self.files.name

    def added(self, item: ItemId, size_bytes: int, *, used: bool) -> None:
        """Tell the policy, pins included. The index names the item by now."""
        self.policy.added(item, size_bytes, used=used)
        if not self.files.is_memory and self.is_pinned(item[:16]):
            self.policy.pin(item)

    def brought(self, items: list[tuple[ItemId, int, Next]]) -> None:
        """The same of what was read ahead, with sizes in bytes and when each is used next."""
        self.policy.brought(items)
        if not self.files.is_memory:
            for item, _, _ in items:
                if self.is_pinned(item[:16]):
                    self.policy.pin(item)

    def has_room(self, charged_bytes: int) -> bool:
        """Return whether budget and disk have room; the disk is asked every so many bytes."""
        if self.budget.room_bytes < charged_bytes:
            return False
        self.unguarded_bytes += charged_bytes
        if self.unguarded_bytes < min(_GUARD_EVERY_BYTES, self.free_min_bytes // _GUARD_SHARE):
            return True
        if self.guard_shortfall_bytes() > 0:
            return False
        self.unguarded_bytes = 0
        return True

    def is_all_expected(self, charged_bytes: int) -> bool:
        """Return whether room for so much would cost something that a recognised epoch still needs."""
        spare_bytes = self.room_bytes + self.policy.spare_bytes
        return self.policy.expected_bytes > 0 and spare_bytes < charged_bytes

    def guard_shortfall_bytes(self) -> int:
        """Return how many bytes are missing to the space that stays free on the tier's disk."""
        if not self.free_min_bytes:
            return 0
        self._disk_room_bytes = self.files.free_bytes() - self.landing_bytes - self.free_min_bytes
        return -self._disk_room_bytes

    @property
    def room_bytes(self) -> int:
        """Return what budget and disk have left, as far as is known without asking the disk."""
        room_bytes = self.budget.room_bytes
        if self.free_min_bytes:
            room_bytes = min(room_bytes, self._disk_room_bytes - self.unguarded_bytes)
        return max(0, room_bytes)

    @contextmanager
    def landing(self, charged_bytes: int) -> Iterator[None]:
        """Have the guard count bytes that are written, and indexed, for as long as the block runs."""
        self.landing_bytes += charged_bytes
        try:
            yield
        finally:
            self.landing_bytes -= charged_bytes


@dataclass(slots=True)
class Sparse:
    """A version under partial/: how many of its blocks are there."""

    version: ObjectVersion
    tier: int
    blocks_present: int = 0
