"""A tier as the coordinators see it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import trio

from cache.errors import CacheError
from cache.model import MIB
from cache.policy.due import Next
from cache.policy.eviction import EvictionPolicy, ItemId
from cache.tier import TierBudget, TierFiles

log = logging.getLogger(__name__)

_LOW_SHARE = 10  # Memory is low with less than this part of it free.
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
    is_low: trio.Event = field(default_factory=trio.Event)  # Of memory: room is to be made ahead of need.
    unguarded_bytes: int = _GUARD_EVERY_BYTES
    full_until_s: float = 0.0  # On trio's clock: it just had no room, and others are asked first.
    landing_bytes: int = 0  # Charged, and not indexed yet: the disk may not know of them.
    _disk_room_bytes: int | None = None  # What the disk could take when it was asked last.

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

    def take(self, charged_bytes: int) -> None:
        """Charge the budget, which has room."""
        self.budget.take(charged_bytes)
        if self.files.is_memory and self.budget.room_bytes < self.budget.size_bytes // _LOW_SHARE:
            self.is_low.set()

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
        """Return what budget and disk have left, as far as the disk was asked; once it is, at least."""
        room_bytes = self.budget.room_bytes
        if self.free_min_bytes:
            if self._disk_room_bytes is None:
                self.guard_shortfall_bytes()
            assert self._disk_room_bytes is not None
            room_bytes = min(room_bytes, self._disk_room_bytes - self.unguarded_bytes)
        return max(0, room_bytes)

    @property
    def is_passed_over(self) -> bool:
        """Return whether it had no room a moment ago, so that another one is asked first."""
        return self.full_until_s > 0 and trio.current_time() < self.full_until_s

    @contextmanager
    def landing(self, charged_bytes: int) -> Iterator[None]:
        """Have the guard count bytes that are written, and indexed, for as long as the block runs."""
        self.landing_bytes += charged_bytes
        try:
            yield
        finally:
            self.landing_bytes -= charged_bytes


# A file whose row is gone and that can't be removed is no error to anybody who reads: the next
# start finds it.


def remove(files: TierFiles, vid: bytes) -> None:
    """Unlink the version's files; what can't be is logged."""
    try:
        files.remove(vid)
    except CacheError as error:
        log.warning("a cached file can't be removed: %s", error)


def punch(files: TierFiles, vid: bytes, blocks: range) -> None:
    """Give the disk space of *blocks* back; a failure is logged."""
    try:
        files.punch(vid, blocks)
    except CacheError as error:
        log.warning("a cached file's space can't be given back: %s", error)
