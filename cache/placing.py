"""Where new content goes, and whether there is room for it without what is still needed."""

from __future__ import annotations

from collections.abc import Callable

from cache.errors import CacheFull
from cache.model import GROUP_BYTES, MIB, PASSTHROUGH_BYTES_MIN, ObjectVersion
from cache.places import Tier
from cache.sparse import SparseVersions

DRAM_SHARE_MAX = 2  # An object over half of the DRAM tier lands on NVMe.
DRAM_KEPT_SHARE = 8  # So much of the DRAM tier is kept free, see `Demotion.keep_dram_room`.
EVICT_SHARE_MAX = 1024  # What is evicted at once is no more than this part of the tier,
_EVICT_BYTES_MIN = 8 * MIB  # and so much where that is less: to have some for the next.
# Of a disk, read-ahead of sets leaves two such steps to demand, rounded up to whole items: what
# makes room for a miss then pushes out nothing that an epoch still needs.
_KEPT_STEPS = 2


def step_bytes(tier: Tier) -> int:
    """Return how many bytes leave at once when room is short."""
    return min(_EVICT_BYTES_MIN, tier.budget.size_bytes // EVICT_SHARE_MAX)


class Placing:
    """Looks at the tiers and changes nothing.

    *passes_disks*: returns whether the kernel reads large files itself from disks, and not from memory.
    """

    def __init__(self, tiers: list[Tier], sparse: SparseVersions, passes_disks: Callable[[], bool]) -> None:
        assert tiers
        self._tiers = tiers
        self._sparse = sparse
        self._passes_disks = passes_disks

    @property
    def size_bytes(self) -> int:
        """Return what all tiers together hold at most."""
        return sum(tier.budget.size_bytes for tier in self._tiers)

    def place(self, size_bytes: int, wanted: str = "") -> int:
        """Return the tier where new content of *size_bytes* goes: DRAM, else the emptiest NVMe.

        *wanted*: "dram" or "nvme", where somebody asked for one.
        """
        if (
            wanted != "nvme"
            and self._takes_in_memory(size_bytes, wanted)
            and not self._tiers[0].is_passed_over
        ):
            return 0
        return self.emptiest_disk(size_bytes)

    def _takes_in_memory(self, size_bytes: int, wanted: str) -> bool:
        first = self._tiers[0]
        if not first.files.is_memory or size_bytes > first.budget.size_bytes // DRAM_SHARE_MAX:
            return False
        return wanted == "dram" or not self.is_better_on_disk(size_bytes)

    def is_better_on_disk(self, size_bytes: int) -> bool:
        """Return whether the kernel reads content of *size_bytes* itself on a disk, but not in DRAM."""
        if size_bytes < PASSTHROUGH_BYTES_MIN or not self._passes_disks():
            return False
        return any(tier.budget.size_bytes >= size_bytes for tier in self._tiers if not tier.files.is_memory)

    def emptiest_disk(self, size_bytes: int) -> int:
        """Return the NVMe tier with the largest share free, of those that *size_bytes* fit into."""
        shares = [
            (
                tier.budget.size_bytes >= size_bytes,
                not tier.is_passed_over,
                tier.budget.room_bytes / tier.budget.size_bytes,
                -place,
            )
            for place, tier in enumerate(self._tiers)
            if not tier.files.is_memory
        ]
        return -max(shares)[-1]

    def may_read_ahead(self, size_bytes: int, due: int | None = None) -> bool:
        """Return whether an object that nobody asked for yet has room, with some left for demand.

        *due*: when it will be used, if that is known. What is used after it makes room then.
        """
        place = self.place(size_bytes)
        return self.can_spare(place, self._tiers[place].files.whole_bytes(size_bytes), due)

    def may_hold(self, version: ObjectVersion) -> bool:
        """Return whether all of a large object has room where it goes, what is there of it included."""
        state = self._sparse.get(version.id)
        place = self.place(version.size_bytes) if state is None else state.tier
        tier = self._tiers[place]
        present_bytes = self._sparse.present_bytes(version.id)
        missing_bytes = tier.files.whole_bytes(version.size_bytes) - present_bytes
        others_bytes = max(0, tier.policy.spare_bytes - present_bytes)  # Most of it may be its own.
        return missing_bytes + _KEPT_STEPS * step_bytes(tier) <= tier.room_bytes + others_bytes

    def can_spare(self, place: int, charged_bytes: int, due: int | None) -> bool:
        """Return whether so much is free, or not needed before *due*, where content ends up."""
        tier = self._tiers[place]
        disks = [other for other in self._tiers if not other.files.is_memory]
        over = [tier, *disks] if tier.files.is_memory else [tier]
        item_bytes = min(charged_bytes, GROUP_BYTES)  # What leaves at once for a miss, rounded up to items.
        kept_bytes = sum(_KEPT_STEPS * (step_bytes(each) + item_bytes) for each in over)
        if tier.files.is_memory:
            kept_bytes += tier.budget.size_bytes // DRAM_KEPT_SHARE
        short_bytes = charged_bytes + kept_bytes - sum(each.room_bytes for each in over)
        if short_bytes > 0:  # Else the policies need not be asked, twice for each file of a first epoch.
            short_bytes -= sum(each.policy.spare_bytes for each in over)
        if short_bytes > 0 and due is not None:
            short_bytes -= sum(each.policy.bytes_beyond(due, short_bytes) for each in over)
        return short_bytes <= 0

    def check_spare(self, place: int, charged_bytes: int, due: int | None) -> None:
        """Raise CacheFull unless `can_spare`."""
        if not self.can_spare(place, charged_bytes, due):
            raise CacheFull(f"{self._tiers[place].name}: no room for {charged_bytes} bytes unasked")
